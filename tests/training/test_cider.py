"""CIDEr-D against pycocoevalcap's, and where that is absent against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from bitgen.dataset.penn_treebank import caption_words
from bitgen.training.cider import CiderD

Words = list[str]


def published(references: list[list[Words]], captions: list[Words]) -> np.ndarray:
    """One caption a picture, scored by the reference implementation."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    gts = {i: [" ".join(words) for words in picture] for i, picture in enumerate(references)}
    res = {i: [" ".join(words)] for i, words in enumerate(captions)}
    scores: np.ndarray = cider.Cider().compute_score(gts, res)[1]
    return scores


def spoiled(references: list[list[Words]], seed: int) -> list[Words]:
    """Captions of all kinds: right, of another picture, repeating, unknown words, short, empty."""
    draw = random.Random(seed)
    captions: list[Words] = []
    for own in references:
        other = draw.choice(draw.choice(references))
        kinds = [
            draw.choice(own),
            other,
            own[0][:4] * 3,
            [*own[0], "zebu", "zebu", *other],
            draw.sample(own[0], len(own[0])),
            ["zebu"] * draw.randrange(6),
            own[0][:1],
            [],
        ]
        captions.append(draw.choice(kinds))
    return captions


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_the_published_metric_on_random_captions(seed: int) -> None:
    draw = random.Random(seed)
    vocabulary = [f"w{index}" for index in range(draw.choice([3, 30]))]
    references = [
        [draw.choices(vocabulary, k=draw.randrange(1, 15)) for _ in range(draw.randrange(1, 6))]
        for _ in range(draw.choice([1, 40]))
    ]
    captions = spoiled(references, seed)
    scores = CiderD(references)(captions, range(len(captions)))
    np.testing.assert_allclose(scores, published(references, captions), atol=1e-9)


def test_it_equals_the_published_metric_on_coco(coco_dir: Path) -> None:
    content = json.loads((coco_dir / "annotations" / "captions_val2017.json").read_text())
    by_picture: dict[int, list[Words]] = {}
    for entry in content["annotations"]:
        by_picture.setdefault(entry["image_id"], []).append(caption_words(entry["caption"]))
    references = list(by_picture.values())[:200]
    captions = spoiled(references, 0)
    scores = CiderD(references)(captions, range(len(captions)))
    np.testing.assert_allclose(scores, published(references, captions), atol=1e-9)
    assert scores.max() > 1


def test_a_caption_is_scored_alike_beside_any_others() -> None:
    references = [[["a", "red", "ball"], ["a", "ball"]], [["a", "dog", "runs"]], [["snow"]]]
    captions, pictures = [["a", "red", "dog"], ["a", "ball"], ["snow"], []], [0, 0, 2, 1]
    scorer = CiderD(references)
    together = scorer(captions, pictures)
    alone = [
        scorer([words], [picture])[0] for words, picture in zip(captions, pictures, strict=True)
    ]
    assert together.tolist() == alone
    assert scorer([], []).tolist() == []


def test_two_words_worked_out_by_hand() -> None:
    # "a" stands in both pictures and weighs 0; what stands in one of two weighs log 2.
    scorer = CiderD([[["a", "ball"]], [["a", "dog"]]])
    same, half = scorer([["a", "ball"], ["ball"]], [0, 0])
    assert same == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)  # no three words to compare
    # One word pair less: its length is 0 instead of 1.
    assert half == pytest.approx(10 * (1 + 0 + 0 + 0) / 4 * math.exp(-1 / 72))
    assert scorer([["dog"], []], [0, 0]).tolist() == [0, 0]
