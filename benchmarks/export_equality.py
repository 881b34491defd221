"""Whether an exported file says what its run says, token by token, and how large it is.

    python benchmarks/export_equality.py --model runs/tiny --images data/coco/val2017

The run is exported to a temporary file. Three models caption the same pictures greedily: the run
with the layers it was trained with, the run with packed weights (what `bitgen infer` uses), and the
file. A caption counts as equal if all token ids and the log-probability, bit by bit, are those of
the training layers. The file's size is set against 2 bits a ternary weight plus the float parts.

Fails if one caption differs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import first_images, make_parser, run, show_result

from bitgen.config import DEVICES
from bitgen.console import console
from bitgen.export.safetensors import ExportReport, export_safetensors
from bitgen.inference.predictor import BitGen, Caption

TERNARY_BITS = 2


def main() -> int:
    arguments = read_arguments()
    images = first_images(arguments.images, arguments.num_images)
    with tempfile.TemporaryDirectory(prefix="bitgen-export-") as temporary:
        artifact = Path(temporary) / "model.safetensors"
        size = export_safetensors(arguments.model, artifact)
        models = {
            "training layers": BitGen.load(arguments.model, arguments.device, packed=False),
            "packed run": BitGen.load(arguments.model, arguments.device),
            "exported file": BitGen.load(artifact, arguments.device),
        }
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
    sizes = compare_size(size)
    figures = {
        "model": arguments.model.name,
        "num_images": len(images),
        "batch_size": arguments.batch_size,
        "num_tokens": num_tokens,
        "different_captions": len({caption.text for caption in reference}),
        "packed_run_equal": equal["packed run"],
        "exported_file_equal": equal["exported file"],
        **sizes,
    }
    rows = [
        ("pictures", f"{len(images)} ({num_tokens:,} tokens, batches of {arguments.batch_size})"),
        ("captions that differ from each other", f"{figures['different_captions']}"),
        *(
            (f"{name} equal to training layers", f"{n} of {len(images)}")
            for name, n in equal.items()
        ),
        (f"ternary weights, {size.ternary_weights:,}", f"{size.ternary_bytes:,} bytes"),
        (f"float values, {size.float_weights:,}", f"{size.float_bytes:,} bytes"),
        ("header: config, tokenizer, robots", f"{size.metadata_bytes:,} bytes"),
        ("file", f"{size.bytes:,} bytes"),
        ("2 bits x ternary weights + float", f"{sizes['ideal_bytes']:,} bytes"),
        ("overhead", f"{sizes['overhead']:.2%}"),
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
    """Bytes by part, and by how much the file exceeds 2 bits a ternary weight plus the floats."""
    ideal = (size.ternary_weights * TERNARY_BITS + 7) // 8 + size.float_bytes
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


if __name__ == "__main__":
    run(main)
