"""Cold start, captions a second and peak memory of `bitgen infer`: native, PyTorch, and a twin.

    python benchmarks/infer_speed.py --model tiny.safetensors --images data/coco/val2017

Three caption the same pictures: the native engine, PyTorch with the same file, and PyTorch with a
twin of the same architecture in full precision, its weights those of the model (captions/s in
bfloat16, cold start in float32, since a file holds no bfloat16). Without --model, a model with
random weights is taken.

First the captions are compared: more than --largest_share of the native ones that differ from
PyTorch's fail it (benchmarks/native_equality.py says why single ones do).

Cold start: whole processes, from their start to their end: `bitgen --help`, and one picture by
`bitgen infer PICTURE --model MODEL --json`. One call of each goes before and is not counted, so
that files come from the page cache and bytecode is compiled.

Captions: greedy, from picture files (decoding and resizing included) to text, by backend and number
of threads. Each measurement is a process of its own, which loads the model, captions one batch, and
then all pictures; its peak memory is the whole process's. Captions have as many tokens as the model
gives them, so tokens/s stand beside captions/s.

Every figure is the median of several rounds; a round measures each case once, in turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import first_images, interleave, make_parser, run, seconds_of, show_result
from models import export_model, export_twin
from native_equality import caption, compare

from bitgen.config import MODEL_SIZES
from bitgen.errors import BitGenError
from bitgen.inference.predictor import BitGen

WORKER = Path(__file__).with_name("infer_worker.py")


@dataclass(frozen=True)
class Case:
    """One way to run one file."""

    name: str
    model: Path
    backend: str
    threads: int
    options: tuple[str, ...] = ()


def main() -> int:
    arguments = read_arguments()
    images = first_images(arguments.images, arguments.num_images)
    with tempfile.TemporaryDirectory(prefix="bitgen-infer-") as temporary:
        directory = Path(temporary)
        artifact = export_model(arguments.model, arguments.model_size, directory)
        twin = export_twin(artifact, directory)
        return measure(arguments, images, artifact, twin)


def measure(
    arguments: argparse.Namespace, images: Sequence[Path], artifact: Path, twin: Path
) -> int:
    compared = images[: arguments.num_compared]
    reference = BitGen.load(artifact, device="cpu", backend="torch")
    native = BitGen.load(artifact, device="cpu", backend="native")
    expected, found = (
        caption(model, compared, 1, arguments.batch_size, arguments.max_tokens, f"Captions, {name}")
        for name, model in (("PyTorch", reference), ("native", native))
    )
    comparison = compare(reference, compared, expected, found, arguments.max_tokens)
    num_different = len(comparison.differences)
    failures = []
    if num_different > arguments.largest_share * len(compared):
        failures.append(f"{num_different} of {len(compared)} native captions differ.")
    config = native.config
    del native, reference

    command = bitgen_command()
    greedy = ["--beam_size", "1"]
    infer = [*command, "infer", str(images[0]), "--json", *greedy, "--device", "cpu", "--model"]
    starts = interleave(
        {
            name: functools.partial(seconds_of, functools.partial(call, words))
            for name, words in (
                ("bitgen --help", [*command, "--help"]),
                ("native", [*infer, str(artifact), "--backend", "native"]),
                ("PyTorch", [*infer, str(artifact), "--backend", "torch"]),
                ("full precision", [*infer, str(twin), "--backend", "torch"]),
            )
        },
        arguments.rounds,
        warm_up=1,
    )
    cold_start = {name: statistics.median(seconds) for name, seconds in starts.items()}

    cases = [
        case
        for threads in arguments.threads
        for case in (
            Case("native", artifact, "native", threads),
            Case("PyTorch", artifact, "torch", threads),
            Case("full precision, bfloat16", twin, "torch", threads, ("--bfloat16",)),
        )
    ]
    outcomes: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}

    def work(case: Case) -> float:
        outcomes[case].append(call_worker(case, images, arguments))
        return outcomes[case][-1]["seconds"]

    interleave({case: functools.partial(work, case) for case in cases}, arguments.caption_rounds)
    results = [
        {
            **{name: value for name, value in asdict(case).items() if name in ("name", "threads")},
            "captions_per_second": len(images) / median_of(outcomes[case], "seconds"),
            "tokens_per_second": outcomes[case][0]["tokens"] / median_of(outcomes[case], "seconds"),
            "tokens_per_caption": outcomes[case][0]["tokens"] / len(images),
            "peak_bytes": median_of(outcomes[case], "peak_bytes"),
            "torch_imported": bool(outcomes[case][0]["torch_imported"]),
        }
        for case in cases
    ]
    if any(result["torch_imported"] for result in results if result["name"] == "native"):
        failures.append("The native backend imported torch.")
    figures = {
        "model": arguments.model.name if arguments.model else f"random {arguments.model_size}",
        "model_size": config.model_size,
        "image_size": config.image_size,
        "num_images": len(images),
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "caption_rounds": arguments.caption_rounds,
        "num_compared": len(compared),
        "num_different": num_different,
        "cold_start_seconds": cold_start,
        "captions": results,
    }
    rows = [
        ("captions equal to PyTorch's", f"{comparison.equal} of {len(compared)}", "", "", ""),
        *(
            (f"cold start: {name}", f"{value:.3f} s", "", "", "")
            for name, value in cold_start.items()
        ),
        *(
            (
                f"captions: {result['name']}, threads: {result['threads']}",
                f"{result['captions_per_second']:.2f}/s",
                f"{result['tokens_per_second']:.0f}",
                f"{result['tokens_per_caption']:.1f}",
                f"{result['peak_bytes'] / 1e6:.0f} MB",
            )
            for result in results
        ),
    ]
    columns = ("", "median", "tokens/s", "tokens a caption", "peak memory")
    return show_result("infer_speed", figures, columns, rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="tiny")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--num_compared", type=int, default=64)
    parser.add_argument("--largest_share", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--caption_rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max_tokens", type=int, default=40)
    return parser.parse_args()


def bitgen_command() -> list[str]:
    """The installed command of this Python, else the module."""
    installed = Path(sys.executable).with_name("bitgen")
    if os.access(installed, os.X_OK):
        return [str(installed)]
    return [sys.executable, "-m", "bitgen"]


def call(command: Sequence[str]) -> str:
    """Run a command to its end; its output. Raises BitGenError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise BitGenError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def call_worker(
    case: Case, images: Sequence[Path], arguments: argparse.Namespace
) -> dict[str, float]:
    """Caption the pictures in a process of their own."""
    output = call(
        [
            *(sys.executable, str(WORKER), "--model", str(case.model), "--backend", case.backend),
            *("--threads", str(case.threads), "--batch_size", str(arguments.batch_size)),
            *("--max_tokens", str(arguments.max_tokens), *case.options, *map(str, images)),
        ]
    )
    figures: dict[str, float] = json.loads(output)
    return figures


def median_of(outcomes: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(outcome[name] for outcome in outcomes)


if __name__ == "__main__":
    run(main)
