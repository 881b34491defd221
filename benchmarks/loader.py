"""Samples a second that are loaded, against those that training takes; padding with and without
length buckets.

    python benchmarks/loader.py --coco_data ../shared/coco

    loader    pictures from the cache, varied, and captions, collated to batches: nothing else runs,
              with the workers that load kept over all rounds
    training  real updates of the model with the precision that `auto` chooses, loading included
    padding   text positions that are padding, of all, in every batch of one epoch
    lengths   finding the length of each sample of an epoch, which the buckets need

Fast enough is five times what training takes. Padding at batch size 1 is what rounding rows up to a
multiple of eight costs alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    STEM_FIELDS,
    add_stem_options,
    interleave,
    make_parser,
    run,
    seconds_of,
    show_result,
    stem_of,
)
from training_step import StepClock

from bitgen.config import DEVICES, MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.dataset.collate import LENGTH_STEP
from bitgen.dataset.images import ImageCache, default_cache_dir
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import resolve_device
from bitgen.training.data_order import epoch_updates
from bitgen.training.loader import BatchLoader
from bitgen.training.trainer import Trainer

LEAST_RATIO = 5.0
COCO_IMAGES = 118_000
MOST_LENGTH_SECONDS = 3.0


def main() -> int:
    arguments = read_arguments()
    config = BitGenConfig.preset(arguments.model_size, **stem_of(arguments))
    training = TrainingConfig(device=arguments.device, batch_size=arguments.batch_size)
    images = load_coco([arguments.coco_data], "train")
    if len(images) < arguments.batch_size:
        raise InputError(
            f"{arguments.coco_data} holds {len(images)} pictures; a batch has"
            f" {arguments.batch_size}.",
            remedy="Give another folder, or a smaller --batch_size.",
        )
    few = images[: arguments.num_images]
    texts = [caption for image in images for caption in image.captions]
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    cache = ImageCache(default_cache_dir(), config.image_size, config.image_resize)
    cache.prepare([image.path for image in few])

    def make_set(chosen: Sequence[CaptionedImage]) -> TrainingSet:
        return TrainingSet(chosen, [], cache, tokenizer, config, training, [], training_mode=True)

    samples, everything = make_set(few), make_set(images)
    batches = epoch_updates(len(few), arguments.batch_size, 0, 0, samples.lengths(0))
    batches = batches[: arguments.batches]
    loaders = {n: BatchLoader(samples, n, pin_memory=False) for n in arguments.workers}
    rates = interleave(
        {n: partial(samples_per_second, loader, batches) for n, loader in loaders.items()},
        arguments.rounds,
        warm_up=1,
    )
    loaded = {n: statistics.median(values) for n, values in rates.items()}
    del loaders  # their workers would take part in what follows
    trained = training_rate(arguments, config, training, samples, tokenizer)
    padding = [
        {
            "batch_size": size,
            "length_buckets": buckets,
            "padding_share": padding_share(everything, size, buckets),
        }
        for size in arguments.padding_batch_sizes
        for buckets in (False, True)
    ]
    length_seconds = min(seconds_of(partial(everything.lengths, epoch)) for epoch in range(3))
    length_seconds *= COCO_IMAGES / len(everything)

    figures: dict[str, Any] = {
        "model_size": arguments.model_size,
        "image_size": config.image_size,
        **{name: getattr(config, name) for name in STEM_FIELDS},
        "batch_size": arguments.batch_size,
        "device": str(resolve_device(arguments.device)),
        "images": len(images),
        "loader": [
            {"workers": n, "samples_per_second": rate, "ratio": rate / trained, "rounds": rates[n]}
            for n, rate in loaded.items()
        ],
        "training_samples_per_second": trained,
        "padding": padding,
        "length_seconds_of_118000": length_seconds,
    }
    failures = []
    best = max(loaded.values()) / trained
    if best < LEAST_RATIO:
        failures.append(
            f"The loader is {best:.1f} times as fast as training; at least {LEAST_RATIO} is wanted."
        )
    if length_seconds > MOST_LENGTH_SECONDS:
        failures.append(
            f"Lengths of {COCO_IMAGES:,} samples take {length_seconds:.1f} s; at most"
            f" {MOST_LENGTH_SECONDS} is wanted."
        )
    rows: list[tuple[object, ...]] = [
        *(
            (f"loader, {n} workers", f"{rate:.0f} samples/s", f"{rate / trained:.1f} x training")
            for n, rate in loaded.items()
        ),
        (f"training, {arguments.model_size}", f"{trained:.1f} samples/s", ""),
        *(
            (
                f"padding, batch {entry['batch_size']}",
                f"{entry['padding_share']:.1%}",
                "length buckets" if entry["length_buckets"] else "random order",
            )
            for entry in padding
        ),
        (f"lengths of {COCO_IMAGES:,}", f"{length_seconds:.2f} s", "an epoch"),
    ]
    return show_result("loader", figures, ("what", "figure", ""), rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--coco_data", type=Path, default=Path("../shared/coco"))
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="tiny")
    add_stem_options(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=1024, help="Loaded and trained on.")
    parser.add_argument("--batches", type=int, default=32, help="Loaded in a round.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="Of training, timed.")
    parser.add_argument("--padding_batch_sizes", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--device", choices=DEVICES, default="auto")
    return parser.parse_args()


def samples_per_second(loader: BatchLoader, batches: Sequence[Sequence[int]]) -> float:
    """Of one pass over the batches."""
    started = time.perf_counter()
    count = sum(len(batch.input_ids) for batch in loader.load(batches, 0) if batch is not None)
    return count / (time.perf_counter() - started)


def training_rate(
    arguments: argparse.Namespace,
    config: BitGenConfig,
    training: TrainingConfig,
    samples: TrainingSet,
    tokenizer: Tokenizer,
) -> float:
    """Samples a second of the median update, after some that do not count."""
    num_steps = arguments.steps + 3
    # Among the values that decide nothing here: how long it lasts, and that nothing is saved.
    values = {
        **training.to_dict(),
        **dict.fromkeys(("max_steps", "eval_every", "save_every"), num_steps),
    }
    clock = StepClock()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bitgen-loader-") as temporary:
        Trainer(
            model=BitGenModel(config),
            train_set=samples,
            val_set=None,
            tokenizer=tokenizer,
            catalog=[],
            training=TrainingConfig.from_dict(values),
            output_dir=Path(temporary) / "run",
            data_info={},
            callbacks=[clock],
        ).train()
    ends = clock.ends[-arguments.steps - 1 :]
    return arguments.batch_size / statistics.median(b - a for a, b in itertools.pairwise(ends))


def padding_share(samples: TrainingSet, batch_size: int, buckets: bool) -> float:
    """Padded text positions of all text positions of one epoch's batches."""
    lengths = samples.lengths(0)
    batches = epoch_updates(len(samples), batch_size, 0, 0, lengths if buckets else None)
    positions = sum(
        len(batch) * -(-int(lengths[batch].max()) // LENGTH_STEP) * LENGTH_STEP for batch in batches
    )
    return 1 - float(np.sum(lengths)) / positions


if __name__ == "__main__":
    run(main)
