"""Whether the native engine says what PyTorch says, token by token, and why where it does not.

    python benchmarks/native_equality.py --model tiny.safetensors --images data/coco/val2017

Both backends caption the same pictures from the same file: greedily, by beam search, and by a
consensus of captions that are drawn by the same random numbers. Without --model, a model with
random weights is taken.

Both compute the same integers; sums of floats are added in another order, and where a value stands
next to the border between two int8 steps, that decides. What such roundings can do is shown by
PyTorch itself: it captions the pictures once more in float64, which changes nothing else.

For each greedy caption that differs, PyTorch reads picture and words up to the first difference:
the margin is by how much it prefers its own next token, in logits. For other captions it is by how
much PyTorch scores its own higher (log-probability / length). What beam search drops on its way may
stand closer to what it keeps than the hypotheses at the end; a consensus does not rank by it.

Fails if a greedy caption differs by more than --largest_margin standard deviations of the logits,
or if more captions differ than twice as many as in float64, and five.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import first_images, make_parser, run, show_result
from models import convert, export_model

from bitgen.config import MODEL_SIZES
from bitgen.console import console
from bitgen.dataset.images import normalize_images
from bitgen.inference.pipeline import picture_pixels
from bitgen.inference.predictor import BitGen, Caption

ALLOWED_BY_CHANCE = 5
"""Captions that may differ where none does in float64."""
SHOWN = 10
"""Differences in the table; the JSON line has all."""


@dataclass(frozen=True)
class Difference:
    """One caption on which two disagree."""

    image: str
    position: int
    """Generated tokens that are the same before the first that differs."""
    margin: float
    """By how much PyTorch prefers its own: logits of greedy captions, scores of others."""
    spread: float
    """Standard deviation of PyTorch's logits where the captions part."""
    torch: str
    native: str


@dataclass(frozen=True)
class Comparison:
    """Captions of the same pictures by two."""

    equal: int
    largest_log_probability_gap: float
    """Largest difference of the log-probabilities of captions that are equal."""
    differences: list[Difference]


def main() -> int:
    arguments = read_arguments()
    images = first_images(arguments.images, arguments.num_images)
    with tempfile.TemporaryDirectory(prefix="bitgen-equality-") as temporary:
        artifact = export_model(arguments.model, arguments.model_size, Path(temporary))
        reference = BitGen.load(artifact, device="cpu", backend="torch", threads=arguments.threads)
        native = BitGen.load(artifact, device="cpu", backend="native", threads=arguments.threads)
        exact = BitGen.load(artifact, device="cpu", backend="torch")
    convert(exact, torch.float64)
    searches = {"greedy": {"beam_size": 1}}
    for name in ("beam_size", "consensus"):
        if count := getattr(arguments, name):
            searches[f"{name.replace('_', ' ')} {count}"] = {name: count}
    found: dict[str, Comparison] = {}
    as_float64: dict[str, int] = {}
    failures = []
    for search, options in searches.items():
        expected, by_native, by_float64 = (
            caption(
                model,
                images,
                options,
                arguments.batch_size,
                arguments.max_tokens,
                f"{search}, {name}",
            )
            for name, model in (
                ("PyTorch", reference), ("native", native), ("float64", exact),
            )
        )  # fmt: skip
        comparison, yardstick = (
            compare(reference, images, expected, captions, arguments.max_tokens, search == "greedy")
            for captions in (by_native, by_float64)
        )
        found[f"{search}: native"], found[f"{search}: PyTorch, float64"] = comparison, yardstick
        as_float64[search] = sum(
            one.token_ids == other.token_ids
            for one, other in zip(by_native, by_float64, strict=True)
        )
        allowed = 2 * len(yardstick.differences) + ALLOWED_BY_CHANCE
        if len(comparison.differences) > allowed:
            failures.append(f"{search}: {len(comparison.differences)} native captions differ.")
        if search == "greedy":
            failures += [
                f"{search}: {d.image} differs by {d.margin:.4f}; logits spread by {d.spread:.4f}."
                for d in comparison.differences
                if d.margin > arguments.largest_margin * d.spread
            ]
    figures = {
        "model": arguments.model.name if arguments.model else f"random {arguments.model_size}",
        "model_size": native.config.model_size,
        "num_images": len(images),
        "num_tokens": sum(len(c.token_ids) for c in expected),
        "different_captions": len({c.text for c in expected}),
        "native_equal_to_float64": as_float64,
        "comparisons": {label: asdict(comparison) for label, comparison in found.items()},
    }
    rows = [
        ("pictures", f"{len(images)}", "", ""),
        *(
            (
                label,
                f"{comparison.equal} of {len(images)}",
                f"{max((d.margin for d in comparison.differences), default=0.0):.4f}",
                f"{comparison.largest_log_probability_gap:.4f}",
            )
            for label, comparison in found.items()
        ),
        *(
            (f"{search}: native against float64", f"{number} of {len(images)}", "", "")
            for search, number in as_float64.items()
        ),
        *(
            (f"  {d.image}, token {d.position + 1}", label, f"{d.margin:.4f}", "")
            for label, comparison in found.items()
            if label.endswith("native")
            for d in comparison.differences[:SHOWN]
        ),
    ]
    columns = ("", "captions equal to PyTorch's", "largest margin", "log-probabilities apart")
    return show_result("native_equality", figures, columns, rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="tiny")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--beam_size", type=int, default=5, help="0 leaves beams out")
    parser.add_argument("--consensus", type=int, default=64, help="0 leaves it out")
    parser.add_argument("--max_tokens", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--largest_margin", type=float, default=0.1)
    return parser.parse_args()


def caption(
    model: BitGen,
    images: Sequence[Path],
    options: Mapping[str, int],
    batch_size: int,
    max_tokens: int,
    activity: str,
) -> list[Caption]:
    """Captions of all pictures, with a progress bar."""
    captions: list[Caption] = []
    step = max(64, batch_size)
    with console.progress(activity) as bar:
        for start in range(0, len(images), step):
            captions += model.caption(
                images[start : start + step],
                max_tokens=max_tokens,
                batch_size=batch_size,
                **options,
            )
            bar.update(len(captions), len(images))
    return captions


def compare(
    reference: BitGen,
    images: Sequence[Path],
    expected: Sequence[Caption],
    captions: Sequence[Caption],
    max_tokens: int,
    is_greedy: bool = True,
) -> Comparison:
    """How many captions are the same in every token, and by what margin the others differ.

    Args:
        reference: a model in PyTorch, whose captions `expected` are.
        images: the pictures.
        expected: its captions.
        captions: the other's.
        max_tokens: most tokens of both.
        is_greedy: margins are of single tokens, not of whole captions.
    """
    differences, gap = [], 0.0
    for image, own, other in zip(images, expected, captions, strict=True):
        if own.token_ids == other.token_ids:
            gap = max(gap, abs(own.log_probability - other.log_probability))
            continue
        own_ids, other_ids = (
            # A caption that was cut off has no end.
            c.token_ids + [reference.tokenizer.eos_id] * (len(c.token_ids) < max_tokens)
            for c in (own, other)
        )
        pairs = enumerate(zip(own_ids, other_ids, strict=False))
        position = next(index for index, pair in pairs if pair[0] != pair[1])
        logits_own = _logits(reference, image, own_ids)
        if is_greedy:
            logits_V = logits_own[position]
            margin = float(logits_V[own_ids[position]] - logits_V[other_ids[position]])
        else:
            logits_other = _logits(reference, image, other_ids)
            margin = _score(logits_own, own_ids) - _score(logits_other, other_ids)
        spread = float(logits_own[position].std())
        differences.append(Difference(image.name, position, margin, spread, own.text, other.text))
    return Comparison(len(images) - len(differences), gap, differences)


@torch.inference_mode()
def _logits(reference: BitGen, image: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """PyTorch's scores `[T, V]` of what stands at each place of a caption, all in one pass."""
    config, model = reference.config, reference.model
    pixels_13SS = torch.from_numpy(picture_pixels(image, config)[None])
    input_ids_1L = torch.tensor([[reference.tokenizer.bos_id, *token_ids[:-1]]])
    output = model(
        input_ids_1L,
        images=normalize_images(pixels_13SS, config.image_mean, config.image_std),
        attention_mask=model.build_attention_mask(
            torch.ones_like(input_ids_1L), prefix_lengths_B=torch.tensor([1])
        ),
    )
    logits_TV: torch.Tensor = output.logits[0].float()
    return logits_TV


def _score(logits_TV: torch.Tensor, token_ids: Sequence[int]) -> float:
    """What beam search ranks a finished hypothesis by."""
    log_probability_T = torch.log_softmax(logits_TV, dim=-1)[
        torch.arange(len(token_ids)), torch.tensor(token_ids)
    ]
    return float(log_probability_T.sum()) / len(token_ids)


if __name__ == "__main__":
    run(main)
