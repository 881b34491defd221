"""Scores of captions, against pycocoevalcap run alone, and of robots."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitgen.errors import InputError
from bitgen.inference import evaluate
from bitgen.inference.evaluate import (
    JAVA_TOKENIZER,
    PYTHON_TOKENIZER,
    caption_statistics,
    has_java,
    read_results,
    require_scorers,
    score_captions,
    score_robots,
    write_results,
)

pytest.importorskip("pycocoevalcap")

WORDS = {
    "who": ["a man", "two people", "the woman's dog", "a black-and-white cat", "Dr. Who"],
    "does": ["rides", "is holding", "doesn't see", "sits on", "looks at"],
    "what": ["a horse", "the T.V.", "an old bus", "a red ball", "some food"],
    "where": ["in the street.", "near a beach", "on 5th Ave.", "at 10:30 p.m.", "!"],
}


def made_up(seed: int, num_images: int = 40) -> tuple[dict[int, list[str]], dict[int, str]]:
    """References, three to five a picture, and one candidate each, drawn from a few words."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choice(choices) for choices in WORDS.values())

    ids = draw.sample(range(10_000), num_images)
    references = {i: [sentence() for _ in range(draw.randint(3, 5))] for i in ids}
    candidates = {
        i: draw.choice([sentence(), references[i][0], sentence().split()[0]]) for i in ids
    }
    return references, candidates


def reference_figures(
    references: Mapping[int, Sequence[str]], candidates: Mapping[int, str]
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """What `COCOEvalCap` says of them, its SPICE (which downloads models) aside."""
    from pycocoevalcap import eval as reference
    from pycocotools.coco import COCO

    class NoSpice:
        def method(self) -> str:
            return "SPICE"

        def compute_score(self, gts: Any, res: Any) -> tuple[float, list[float]]:
            return 0.0, [0.0] * len(gts)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(reference, "Spice", NoSpice)
        annotations = [(i, caption) for i, captions in references.items() for caption in captions]
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in references],
            "annotations": [
                {"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(annotations)
            ],
        }
        coco.createIndex()
        results = coco.loadRes([{"image_id": i, "caption": c} for i, c in candidates.items()])
        scorer = reference.COCOEvalCap(coco, results)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it leaves pipes open
            scorer.evaluate()
    return scorer.eval, {entry["image_id"]: entry for entry in scorer.evalImgs}


NAMES = {
    "bleu_1": "Bleu_1", "bleu_2": "Bleu_2", "bleu_3": "Bleu_3", "bleu_4": "Bleu_4",
    "rouge_l": "ROUGE_L", "cider": "CIDEr", "meteor": "METEOR",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not has_java(), reason="needs Java, as pycocoevalcap does")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_figures_equal_those_of_pycocoevalcap_alone() -> None:
    references, candidates = made_up(seed=1)
    whole, by_image = reference_figures(references, candidates)
    scores = score_captions(references, candidates)
    assert scores.tokenizer == JAVA_TOKENIZER
    assert {NAMES[name]: getattr(scores, name) for name in NAMES} == {
        name: whole[name] for name in NAMES.values()
    }
    assert list(scores.images) == list(references)
    for image_id, image in scores.images.items():
        for name in NAMES:
            assert getattr(image, name) == by_image[image_id][NAMES[name]]


@pytest.mark.skipif(not has_java(), reason="compares with Java")
def test_the_same_figures_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_meteor", lambda gts, res: (None, [None] * len(gts)))
    references, candidates = made_up(seed=2)
    with_java = score_captions(references, candidates, use_java=True)
    without = score_captions(references, candidates, use_java=False)
    assert without.tokenizer == PYTHON_TOKENIZER
    assert without.meteor is None
    assert without.images == with_java.images
    for name in ("bleu_4", "rouge_l", "cider"):
        assert getattr(without, name) == getattr(with_java, name)


def test_known_figures_of_a_perfect_and_a_foreign_caption() -> None:
    references = {"a": ["a cat sits on a mat"], "b": ["two dogs run over the grass"]}
    scores = score_captions(
        references, {"a": "A cat sits on a mat.", "b": "one bus"}, use_java=False
    )
    assert scores.num_images == 2
    # A caption equal to its reference has cosine 1 for every n, times 10.
    assert scores.images["a"].cider == pytest.approx(10)
    assert scores.images["a"].rouge_l == pytest.approx(1)
    assert scores.images["b"].cider == 0
    assert scores.images["b"].rouge_l == 0
    assert scores.cider == pytest.approx(5)
    # 6 of 8 words; 8 words against 12, so exp(1 - 12 / 8).
    assert scores.bleu_1 == pytest.approx(0.75 * 2.718281828459045**-0.5)


def test_pictures_without_a_candidate_are_left_out() -> None:
    references, candidates = made_up(seed=3)
    few = dict(list(candidates.items())[:20])
    kept = {image_id: references[image_id] for image_id in references if image_id in few}
    assert score_captions(references, few, use_java=False) == score_captions(
        kept, few, use_java=False
    )


def test_a_caption_without_words_is_scored() -> None:
    scores = score_captions({1: ["a dog"], 2: ["a cat"]}, {1: "", 2: "..."}, use_java=False)
    assert scores.cider == scores.rouge_l == 0


def test_refuses_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no captions to score"):
        score_captions({1: ["a dog"]}, {})
    with pytest.raises(InputError, match=r"1 of 2 captions .* such as 7"):
        score_captions({1: ["a dog"]}, {1: "a dog", 7: "a cat"}, use_java=False)
    with pytest.raises(InputError, match="no reference caption of 1"):
        score_captions({1: []}, {1: "a dog"}, use_java=False)
    monkeypatch.setattr(evaluate, "_java", lambda: None)
    with pytest.raises(InputError, match="no Java"):
        score_captions({1: ["a dog"]}, {1: "a dog"}, use_java=True)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed") as caught:
        require_scorers()
    assert caught.value.remedy == 'Run: pip install "bitgen[eval]"'


def test_robot_figures_by_hand() -> None:
    right = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]], dtype=bool)
    chosen = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=bool)
    probabilities = np.array(
        [[0.95, 0.05, 0.05], [0.9, 0.4, 0.1], [0.2, 0.6, 0.55], [0.8, 0.3, 0.2]]
    )
    scores = score_robots(["a", "b", "c"], probabilities, chosen, right, threshold=0.5)
    assert scores.num_tasks == 4
    assert scores.exact_match == 1 / 4
    assert scores.hamming_loss == pytest.approx(4 / 12)
    # F1 = 2 hits / (2 hits + wrong + missed): a 4/5, b 0, c 1.
    assert [robot.f1 for robot in scores.robots] == pytest.approx([0.8, 0.0, 1.0])
    assert scores.macro_f1 == pytest.approx(0.6)
    assert scores.micro_f1 == pytest.approx(2 * 3 / (2 * 3 + 2 + 2))
    assert scores.top_1 == 2 / 4
    assert scores.top_3 == 1
    assert scores.confusion == ((2, 0, 0), (2, 0, 0), (0, 1, 1))
    low = scores.reliability[0]
    assert (low.count, low.share_right) == (2, 0.0)
    assert low.mean_probability == pytest.approx(0.05)
    by_hand = [(2, 0.05, 0), (1, 0.1, 0), (2, 0.2, 0), (1, 0.3, 1), (1, 0.4, 1), (1, 0.55, 1),
               (1, 0.6, 0), (1, 0.8, 0), (2, 0.925, 1)]  # fmt: skip
    assert scores.calibration_error == pytest.approx(
        sum(n * abs(p - s) for n, p, s in by_hand) / 12
    )


def test_robot_f1_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    right, chosen = draw.random((2, 50, 5)) < 0.4
    scores = score_robots(list("abcde"), draw.random((50, 5)), chosen, right, threshold=0.5)
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(right, chosen, average="macro"))
    assert scores.micro_f1 == pytest.approx(metrics.f1_score(right, chosen, average="micro"))
    assert scores.hamming_loss == pytest.approx(metrics.hamming_loss(right, chosen))
    assert scores.exact_match == pytest.approx(metrics.accuracy_score(right, chosen))


def test_calibrated_probabilities_have_no_error() -> None:
    right = np.array([[True], [False], [False], [False]] * 5)
    scores = score_robots(["a"], np.full((20, 1), 0.25), right, right, threshold=0.5)
    assert scores.calibration_error == 0
    with pytest.raises(InputError, match="no robot tasks"):
        score_robots(["a"], np.zeros((0, 1)), np.zeros((0, 1)), np.zeros((0, 1)), threshold=0.5)


def test_statistics_of_captions() -> None:
    found = caption_statistics(
        ["A dog runs.", "a dog runs", "It's red, isn't it?", ""], ["a Dog runs!", "a cat"]
    )
    assert found.lengths == {0: 1, 3: 2, 6: 1}
    assert found.mean_length == 3
    # a dog runs / it 's red is n't
    assert found.vocabulary_size == 8
    assert found.distinct_share == 3 / 4
    assert found.copied_share == 1 / 2
    assert caption_statistics(["a dog"]).copied_share is None


def test_results_files_come_back(tmp_path: Path) -> None:
    captions = {3: "a caf\u00e9", "name": 'says "stop"'}
    write_results(captions, tmp_path / "new" / "results.json")
    assert read_results(tmp_path / "new" / "results.json") == captions
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]
