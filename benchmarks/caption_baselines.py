"""What captions score that no model wrote: the figures that a model has to beat, and to reach.

    python benchmarks/caption_baselines.py --coco_data ../shared/coco

commonest: the caption that most training pictures share, for every picture. nearest: a caption of
the most similar training picture, by an 8 x 8 thumbnail and a colour histogram. person: the first
caption of each picture against the others (a reference fewer than the two above have).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.inference.evaluate import CaptionScores, caption_statistics, score_captions

FIGURES = ("bleu_1", "bleu_4", "rouge_l", "cider", "meteor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coco_data", type=Path, action="append", required=True)
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--java", action="store_true", help="Java's tokenizer and METEOR as well")
    arguments = parser.parse_args()
    train = load_coco(arguments.coco_data, "train")
    held_out = load_coco(arguments.coco_data, arguments.split)
    references = {image.image_id: image.captions for image in held_out}
    trained_on = [caption for image in train for caption in image.captions]
    several = {i: texts for i, texts in references.items() if len(texts) > 1}
    contestants: dict[str, tuple[Mapping[int, Sequence[str]], dict[int, str]]] = {
        "commonest": (references, dict.fromkeys(references, commonest(train))),
        "nearest": (references, nearest(train, held_out)),
        "person": (
            {i: texts[1:] for i, texts in several.items()},
            {i: texts[0] for i, texts in several.items()},
        ),
    }
    found = {}
    print(f"{'':<10}" + "".join(f"{name:>10}" for name in (*FIGURES, "words", "copied")))
    for name, (people, captions) in contestants.items():
        scores = score_captions(people, captions, use_java=arguments.java)
        statistics = caption_statistics(list(captions.values()), trained_on)
        found[name] = row(scores) | {
            "mean_length": statistics.mean_length,
            "copied_share": statistics.copied_share,
        }
        cells = [getattr(scores, figure) for figure in FIGURES]
        cells += [statistics.mean_length, statistics.copied_share]
        print(f"{name:<10}" + "".join(f"{'-' if c is None else f'{c:.3f}':>10}" for c in cells))
    print(json.dumps({"split": arguments.split, "pictures": len(held_out), **found}))


def row(scores: CaptionScores) -> dict[str, object]:
    return {name: value for name, value in asdict(scores).items() if name != "images"}


def commonest(images: Sequence[CaptionedImage]) -> str:
    """The caption that most pictures have; case and punctuation do not count."""
    of_key: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for image in images:
        for caption in image.captions:
            key = "".join(c for c in caption.lower() if c.isalnum() or c == " ").strip()
            of_key.setdefault(key, caption)
            counts[key] += 1
    return of_key[counts.most_common(1)[0][0]]


def nearest(train: Sequence[CaptionedImage], held_out: Sequence[CaptionedImage]) -> dict[int, str]:
    """The first caption of the most similar training picture."""
    known_ND = np.stack([features(image.path) for image in train])
    captions = {}
    for image in held_out:
        distance_N = ((known_ND - features(image.path)) ** 2).sum(axis=1)
        captions[image.image_id] = train[int(distance_N.argmin())].captions[0]
    return captions


def features(path: Path) -> np.ndarray:
    """An 8 x 8 thumbnail and a 4 x 4 x 4 colour histogram, each of mean square about one."""
    with Image.open(path) as opened:
        opened.draft("RGB", (64, 64))
        picture = opened.convert("RGB").resize((32, 32), Image.Resampling.BOX)
    pixels = np.asarray(picture)
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.float32) / 255
    bins = (pixels // 64).reshape(-1, 3).astype(int) @ (16, 4, 1)
    histogram = np.sqrt(np.bincount(bins, minlength=64) / len(bins)).astype(np.float32)
    return np.concatenate([small.ravel() / small.size**0.5 * 2, histogram])


if __name__ == "__main__":
    main()
