"""Whether an exported file says what its run says, token by token, and how large it is.

    python benchmarks/export_equality.py --model runs/tiny --images data/coco/val2017

The run is exported to temporary files, packed at 2 bits a ternary weight and at 1.6. Four models
caption the same pictures greedily, all in PyTorch: the run with the layers it was trained with, the
run with packed weights, and the files (benchmarks/native_equality.py compares the native engine). A
caption counts as equal if all token ids and the log-probability, bit by bit, are those of the
training layers. The size of a file is set against its bits a ternary weight plus the float parts.

Fails if one caption differs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import first_images, make_parser, run, show_result

from bitgen.config import DEVICES
from bitgen.console import console
from bitgen.export.artifact import PACKINGS
from bitgen.export.safetensors import ExportReport, export_safetensors
from bitgen.inference.predictor import BitGen, Caption


def main() -> int:
    arguments = read_arguments()
    images = first_images(arguments.images, arguments.num_images)
    with tempfile.TemporaryDirectory(prefix="bitgen-export-") as temporary:
        models = {
            "training layers": BitGen.load(
                arguments.model, arguments.device, packed=False, backend="torch"
            ),
            "packed run": BitGen.load(arguments.model, arguments.device, backend="torch"),
        }
        is_ternary = models["packed run"].config.quantization == "ternary"
        reports = {}
        for packing in PACKINGS if is_ternary else PACKINGS[:1]:
            artifact = Path(temporary) / f"{packing}.safetensors"
            reports[packing] = export_safetensors(arguments.model, artifact, packing=packing)
            models[f"file, {packing} bits"] = BitGen.load(
                artifact, arguments.device, backend="torch"
            )
        captions = {
            name: describe(model, images, arguments, name) for name, model in models.items()
        }
    reference = captions.pop("training layers")
    num_tokens = sum(len(caption.token_ids) for caption in reference)
    equal = {name: count_equal(reference, others) for name, others in captions.items()}
    failures = [
        f"{len(images) - number} of {len(images)} captions of the {name} differ."
        for name, number in equal.items()
        if number != len(images)
    ]
    sizes = {packing: compare_size(report) for packing, report in reports.items()}
    figures = {
        "model": arguments.model.name,
        "num_images": len(images),
        "batch_size": arguments.batch_size,
        "num_tokens": num_tokens,
        "different_captions": len({caption.text for caption in reference}),
        "equal": equal,
        "files": sizes,
    }
    rows = [
        ("pictures", f"{len(images)} ({num_tokens:,} tokens, batches of {arguments.batch_size})"),
        ("captions that differ from each other", f"{figures['different_captions']}"),
        *(
            (f"{name} equal to training layers", f"{n} of {len(images)}")
            for name, n in equal.items()
        ),
        *(
            row
            for packing in reports
            for row in size_rows(packing, reports[packing], sizes[packing])
        ),
    ]
    return show_result("export_equality", figures, ("", ""), rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="RUN")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_tokens", type=int, default=40)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    return parser.parse_args()


def describe(
    model: BitGen, images: Sequence[Path], arguments: argparse.Namespace, name: str
) -> list[Caption]:
    """Greedy captions of all pictures, with a progress bar."""
    captions: list[Caption] = []
    step = arguments.batch_size
    with console.progress(f"Describing, {name}") as bar:
        for start in range(0, len(images), step):
            captions += model.caption(
                images[start : start + step], max_tokens=arguments.max_tokens, batch_size=step
            )
            bar.update(len(captions), len(images))
    return captions


def count_equal(captions: Sequence[Caption], others: Sequence[Caption]) -> int:
    """How many agree in every token and in the log-probability."""
    return sum(
        caption.token_ids == other.token_ids and caption.log_probability == other.log_probability
        for caption, other in zip(captions, others, strict=True)
    )


def compare_size(size: ExportReport) -> dict[str, Any]:
    """Bytes by part, and by how much the file exceeds its bits a ternary weight plus the floats."""
    bits = Fraction(0 if size.packing is None else size.packing)
    ideal = math.ceil(size.ternary_weights * bits / 8) + size.float_bytes
    return {
        "bytes": size.bytes,
        "ternary_weights": size.ternary_weights,
        "ternary_bytes": size.ternary_bytes,
        "float_weights": size.float_weights,
        "float_bytes": size.float_bytes,
        "metadata_bytes": size.metadata_bytes,
        "ideal_bytes": ideal,
        "overhead": size.bytes / ideal - 1,
    }


def size_rows(packing: str, size: ExportReport, compared: dict[str, Any]) -> list[tuple[str, str]]:
    """A file's size as rows of the table."""
    name = f"file, {packing} bits"
    return [
        (f"{name}: {size.ternary_weights:,} ternary weights", f"{size.ternary_bytes:,} bytes"),
        (f"{name}: {size.float_weights:,} float values", f"{size.float_bytes:,} bytes"),
        (f"{name}: header (config, tokenizer, robots)", f"{size.metadata_bytes:,} bytes"),
        (f"{name}: whole", f"{size.bytes:,} bytes"),
        (f"{packing} bits x ternary weights + float", f"{compared['ideal_bytes']:,} bytes"),
        ("overhead", f"{compared['overhead']:.2%}"),
    ]


if __name__ == "__main__":
    run(main)
