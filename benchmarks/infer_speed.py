"""How fast `bitgen` starts, and how many pictures it captions a second.

    python benchmarks/infer_speed.py --model tiny.safetensors --images data/coco/val2017

Start: wall time of whole processes, from the call to their end: `bitgen --help`, and one picture by
`bitgen infer PICTURE --model MODEL --json`. One call of each goes before and is not counted, so
that files come from the page cache and bytecode is compiled.

Captions: greedy, in this process with the model loaded, from picture files (decoding and resizing
included) to text, by batch size and number of torch's threads. One batch goes before.

Every figure is the median of several rounds; a round measures each case once, in turn.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import first_images, interleave, make_parser, run, seconds_of, show_result

from bitgen.errors import BitGenError
from bitgen.inference.predictor import BitGen, Caption


def main() -> int:
    arguments = read_arguments()
    images = first_images(arguments.images, arguments.num_images)
    # Loaded first, so that a model that cannot be read is reported as such.
    model = BitGen.load(arguments.model, device="cpu")

    command = bitgen_command()
    infer = [*command, "infer", str(images[0]), "--model", str(arguments.model), "--json"]
    starts = interleave(
        {
            "bitgen --help": lambda: seconds_of(lambda: call([*command, "--help"])),
            "bitgen infer, one picture": lambda: seconds_of(lambda: call(infer)),
        },
        arguments.rounds,
        warm_up=1,
    )
    help_seconds, cold_start_seconds = map(statistics.median, starts.values())
    captions: list[Caption] = []

    def caption(threads: int, batch_size: int) -> float:
        nonlocal captions
        torch.set_num_threads(threads)
        started = time.perf_counter()
        captions = model.caption(images, max_tokens=arguments.max_tokens, batch_size=batch_size)
        return len(images) / (time.perf_counter() - started)

    threads_before = torch.get_num_threads()
    model.caption(images[: max(arguments.batch_sizes)], max_tokens=arguments.max_tokens)
    rates = interleave(
        {
            (threads, batch_size): functools.partial(caption, threads, batch_size)
            for threads in arguments.threads
            for batch_size in arguments.batch_sizes
        },
        arguments.rounds,
    )
    torch.set_num_threads(threads_before)

    tokens_per_caption = sum(len(caption.token_ids) for caption in captions) / len(images)
    figures = {
        "model": arguments.model.name,
        "model_size": model.config.model_size,
        "image_size": model.config.image_size,
        "rounds": arguments.rounds,
        "num_images": len(images),
        "tokens_per_caption": tokens_per_caption,
        "help_seconds": help_seconds,
        "cold_start_seconds": cold_start_seconds,
        "captions": [
            {
                "threads": threads,
                "batch_size": batch_size,
                "images_per_second": statistics.median(values),
            }
            for (threads, batch_size), values in rates.items()
        ],
    }
    rows = [
        ("bitgen --help", f"{help_seconds:.3f} s"),
        ("bitgen infer, one picture", f"{cold_start_seconds:.3f} s"),
        *(
            (
                f"captions, threads: {threads}, batch: {batch_size}",
                f"{statistics.median(values):.2f} images/s",
            )
            for (threads, batch_size), values in rates.items()
        ),
        ("length of a caption", f"{tokens_per_caption:.1f} tokens"),
    ]
    return show_result("infer_speed", figures, ("", f"median of {arguments.rounds}"), rows)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="RUN_OR_FILE")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max_tokens", type=int, default=40)
    return parser.parse_args()


def bitgen_command() -> list[str]:
    """The installed command of this Python, else the module."""
    installed = Path(sys.executable).with_name("bitgen")
    if os.access(installed, os.X_OK):
        return [str(installed)]
    return [sys.executable, "-m", "bitgen"]


def call(command: Sequence[str]) -> None:
    """Run a command to its end. Raises BitGenError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise BitGenError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}")


if __name__ == "__main__":
    run(main)
