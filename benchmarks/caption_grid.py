"""Captions of several sizes, of ternary and full-precision weights, over seeds: trained and scored.

    python benchmarks/caption_grid.py --coco_data ../shared/coco --coco_data ../shared/flickr8k \\
        --sizes tiny --seeds 0 1 2 --runs runs/grid -- --image_size 96 --patch_size 32 \\
        --stem_residual_convolutions 1 --word_pretraining_steps 1000 --max_steps 1400 \\
        --batch_size 64

Each model is one `bitgen train` with the options behind `--`, and one `bitgen evaluate` on the
validation pictures of the first data set, greedy. What is done already in `--runs` is not done
again, so an interrupted grid goes on. "shuffled" is the CIDEr of the same model where it is shown
another picture each time. With `--blind`, one more model of the first size and seed learns and
answers with every picture grey: what captions can be had from words alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import make_parser, run, show_result
from PIL import Image

from bitgen.config import MODEL_SIZES, QUANTIZATIONS
from bitgen.dataset.coco import load_coco

FIGURES = ("cider", "bleu_4", "rouge_l", "loss", "distinct_share")


def main() -> int:
    arguments = read_arguments()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    table = []
    for size in arguments.sizes:
        for quantization in arguments.quantizations:
            found = [
                measure(arguments, size, quantization, seed, arguments.coco_data)
                for seed in arguments.seeds
            ]
            table.append(summary(f"{size} {quantization}", found))
    if arguments.blind:
        folders = [without_pictures(folder, arguments.runs) for folder in arguments.coco_data]
        found = [measure(arguments, arguments.sizes[0], "ternary", arguments.seeds[0], folders)]
        table.append(summary(f"{arguments.sizes[0]} ternary, blind", found))
    columns = (*FIGURES, "shuffled")
    rows = [
        [row["model"], *(f"{row[c]['mean']:.3f} ± {row[c]['deviation']:.3f}" for c in columns)]
        for row in table
    ]
    figures = {
        "training_options": arguments.training_options,
        "seeds": arguments.seeds,
        "models": table,
    }
    return show_result("caption_grid", figures, ("model", *columns), rows)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--coco_data", type=Path, action="append", required=True)
    parser.add_argument("--sizes", nargs="+", choices=MODEL_SIZES, default=["tiny"])
    parser.add_argument(
        "--quantizations", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, required=True, help="Folder for the trained models.")
    parser.add_argument("--blind", action="store_true", help="One more model, without pictures.")
    parser.add_argument("training_options", nargs="*", help="Behind --: options of bitgen train.")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace,
    size: str,
    quantization: str,
    seed: int,
    data: Sequence[Path],
) -> dict[str, float]:
    """Train one model, unless that is done, and score it with its pictures and with others."""
    blind = "-blind" if data is not arguments.coco_data else ""
    folder = arguments.runs / f"{size}-{quantization}-{seed}{blind}"
    result = folder / "scores.json"
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        of_data = [part for name in data for part in ("--coco_data", str(name))]
        kind = ["--model_size", size, "--quantization", quantization, "--seed", str(seed)]
        options = [*of_data, *kind, *arguments.training_options]
        bitgen("train", *options, "--output_dir", str(folder))
        scores = evaluate(folder, data[0], "given")
        scores["shuffled"] = evaluate(folder, data[0], "shuffled")["cider"]
        result.write_text(json.dumps(scores) + "\n")
        print(f"{folder.name}: CIDEr {scores['cider']:.3f}", file=sys.stderr, flush=True)
    found: dict[str, float] = json.loads(result.read_text())
    return found


def evaluate(model: Path, data: Path, pictures: str) -> dict[str, Any]:
    options = ["--model", str(model), "--coco_data", str(data), "--pictures", pictures, "--json"]
    options += ["--beam_size", "1"]
    scores: dict[str, Any] = json.loads(bitgen("evaluate", *options))
    return scores


def bitgen(*arguments: str) -> str:
    """What `bitgen` prints; its log and bars go to standard error."""
    command = [sys.executable, "-m", "bitgen", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def without_pictures(folder: Path, runs: Path) -> Path:
    """A copy of a data set of which every picture is grey."""
    copy = runs / "blind" / folder.name
    shutil.copytree(folder / "annotations", copy / "annotations", dirs_exist_ok=True)
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    for split in ("train", "val"):
        first: Path | None = None
        for image in load_coco([folder], split):
            path = copy / image.path.relative_to(folder)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if first is None:
                grey.save(path)
                first = path
            else:
                os.link(first, path)
    return copy


def summary(name: str, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    row: dict[str, Any] = {"model": name}
    for figure in (*FIGURES, "shuffled"):
        values = [scores[figure] for scores in found]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        row[figure] = {"mean": statistics.mean(values), "deviation": deviation, "each": values}
    return row


if __name__ == "__main__":
    run(main)
