"""What ternary weights add to a training step: a model with and one without, step by step in turn.

    python benchmarks/twin.py --model_sizes tiny small base --precisions fp32 bf16

Two models of the same size train side by side in one process, one with ternary and one with
full-precision weights (`--quantization none`), on the same batches. A round is one whole step of
each, forward, losses, backward, clipping and update, so that whatever else the machine does meets
both; the ratio is the median over rounds of ternary to full precision. Then both are compiled
(`BitGenModel.compile_layers`, as `--compile` does), the seconds of their first steps are given
apart, and the rounds go on.

Pictures and captions are random numbers, captions of the lengths that COCO's have; two batches of
different lengths take turns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import add_stem_options, interleave, make_parser, run, show_result, stem_of

from bitgen.config import DEVICES, MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.dataset.collate import Batch, Collator, Sample
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import resolve_device
from bitgen.training.allocator import keep_freed_memory
from bitgen.training.amp import autocast, resolve_precision
from bitgen.training.losses import caption_loss, image_word_loss
from bitgen.training.optimizer import make_optimizer

MODES = ("eager", "compiled")
BATCH_SIZES = {"nano": 32, "tiny": 16, "small": 8, "base": 4, "large": 1}
"""For each size: a step takes some seconds at most."""
CAPTION_LENGTHS = ((8, 15), (12, 23))
"""Fewest and most tokens of the captions of each batch."""
WORDS_A_PICTURE = 20


@dataclass
class Twin:
    """A model in training."""

    model: BitGenModel
    step: Callable[[], None]


def main() -> int:
    arguments = read_arguments()
    device = resolve_device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    cases = [
        case
        for size in arguments.model_sizes
        for precision in arguments.precisions
        for case in time_twins(arguments, device, size, precision)
    ]
    rows = [
        (
            case["model_size"],
            case["precision"],
            case["batch_size"],
            case["mode"],
            f"{1000 * case['seconds']['ternary']:.0f}",
            f"{1000 * case['seconds']['none']:.0f}",
            f"{case['ratio']:.2f}",
            "" if case["first_steps"] is None else f"{case['first_steps']:.0f}",
        )
        for case in cases
    ]
    figures = {
        "rounds": arguments.rounds,
        "clock": arguments.clock,
        "device": str(device),
        **stem_of(arguments),
        "cases": cases,
    }
    columns = (
        *("model", "precision", "batch", "mode", "ternary ms", "full ms", "ratio", "compiling s"),
    )
    return show_result("twin", figures, columns, rows)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_sizes", nargs="+", choices=MODEL_SIZES, default=["tiny"])
    add_stem_options(parser)
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch_size", type=int, help="Default: by the size of the model.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm_up", type=int, default=2, help="Rounds before, not timed.")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of this process, where others keep the machine busy (take one"
        " thread: OMP_NUM_THREADS=1).",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    return parser.parse_args()


def time_twins(
    arguments: argparse.Namespace, device: torch.device, size: str, precision: str
) -> Iterator[dict[str, object]]:
    """The figures of one size and precision, a mode after the other."""
    batch_size = arguments.batch_size or BATCH_SIZES[size]
    twins = {
        quantization: make_twin(
            BitGenConfig.preset(size, quantization=quantization, **stem_of(arguments)),
            precision,
            batch_size,
            device,
        )
        for quantization in ("ternary", "none")
    }
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def seconds_of(function: Callable[[], object]) -> float:
        started = clock()
        function()
        return clock() - started

    for mode in MODES:
        first_steps = None
        if mode == "compiled" and mode in arguments.modes:
            torch.compiler.reset()  # graphs of other sizes count towards torch's limit
            for twin in twins.values():
                twin.model.compile_layers()
            started = time.perf_counter()  # the C++ compiler is another process
            for twin, _ in itertools.product(twins.values(), CAPTION_LENGTHS):
                twin.step()
            first_steps = time.perf_counter() - started
        if mode not in arguments.modes:
            continue
        steps = {name: (lambda twin=twin: seconds_of(twin.step)) for name, twin in twins.items()}
        seconds = interleave(steps, arguments.rounds, arguments.warm_up)
        ratios = [t / f for t, f in zip(seconds["ternary"], seconds["none"], strict=True)]
        yield {
            "model_size": size,
            "precision": precision,
            "batch_size": batch_size,
            "mode": mode,
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "first_steps": first_steps,
        }
    del twins
    gc.collect()


def make_twin(config: BitGenConfig, precision: str, batch_size: int, device: torch.device) -> Twin:
    """A model, and what trains it by one step on the next batch."""
    torch.manual_seed(0)
    model = BitGenModel(config).to(device)
    model.train()
    training = TrainingConfig()
    optimizer = make_optimizer(model, training.learning_rate, training.weight_decay)
    dtype = resolve_precision(precision, device)
    batches = itertools.cycle(
        [random_batch(model.config, batch_size, *lengths) for lengths in CAPTION_LENGTHS]
    )

    def step() -> None:
        batch = next(batches)
        mask = model.build_attention_mask(
            batch.attention_mask, batch.prefix_lengths, batch.image_mask
        )
        batch = batch.to(device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            output = model(
                batch.input_ids, batch.images, attention_mask=mask, return_image_words=True
            )
        captions, num_tokens = caption_loss(output.logits, batch.labels)
        words, num_pictures = image_word_loss(
            output.image_words, batch.word_ids, batch.word_weights
        )
        (captions / num_tokens + words / num_pictures).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        norm.item()  # as the trainer does: it waits for the device
        optimizer.step()

    return Twin(model, step)


def random_batch(config: BitGenConfig, batch_size: int, fewest: int, most: int) -> Batch:
    """Captions of random tokens and lengths, each with a picture of noise, already normalised."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(3, config.image_size, config.image_size)

    def integers(low: int, high: int, count: int) -> list[int]:
        drawn: list[int] = torch.randint(low, high, (count,), generator=generator).tolist()
        return drawn

    samples = [
        Sample(
            input_ids=integers(0, config.vocab_size, length),
            num_prefix=1,
            image=image.normal_(generator=generator).clone(),
            image_words=dict.fromkeys(
                integers(0, config.vocab_size, WORDS_A_PICTURE), 1 / WORDS_A_PICTURE
            ),
        )
        for length in [most, *integers(fewest, most + 1, batch_size - 1)]
    ]
    return Collator(pad_id=0, num_robots=0)(samples)


if __name__ == "__main__":
    run(main)
