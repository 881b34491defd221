"""Which of many captions is most like all of them, against CIDEr-D plainly written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from bitgen.inference import consensus
from bitgen.inference.consensus import caption_idf_of, most_agreed

TokenIds = tuple[int, ...]


def cider_d(candidate: TokenIds, reference: TokenIds, idf: Sequence[float]) -> float:
    """arXiv 1411.5726, section 8 (CIDEr-D), of one and two tokens and without the factor 10."""
    total = 0.0
    for n in (1, 2):
        one, other = (
            {
                ngram: count * sum(idf[token] for token in ngram)
                for ngram, count in Counter(zip(*(ids[i:] for i in range(n)), strict=False)).items()
            }
            for ids in (candidate, reference)
        )
        dot = sum(min(one.get(ngram, 0.0), weight) * weight for ngram, weight in other.items())
        norms = [math.sqrt(sum(w * w for w in side.values())) for side in (one, other)]
        total += dot / (norms[0] * norms[1]) if all(norms) else 0.0
    return total / 2 * math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * 6.0**2))


@pytest.mark.parametrize("has_idf", [True, False])
def test_captions_are_compared_by_cider_d_and_the_best_is_taken(has_idf: bool) -> None:
    random = np.random.default_rng(5)
    winners = set()
    for _ in range(30):
        idf = random.uniform(0, 5, 9) * (random.random(9) > 0.2)
        captions = [
            tuple(random.integers(0, 9, random.integers(0, 8)).tolist()) for _ in range(12)
        ] + [(1, 2, 3)] * int(random.integers(0, 4))
        weights = idf if has_idf else np.ones(9)
        different = list(dict.fromkeys(captions))
        found = consensus._cider_d(different, idf if has_idf else None)
        expected = [[cider_d(one, other, weights) for other in different] for one in different]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        sums = [sum(cider_d(one, other, weights) for other in captions) for one in captions]
        winner = most_agreed(captions, idf if has_idf else None)
        assert sums[winner] == pytest.approx(max(sums))
        assert captions[winner] not in captions[:winner]
        winners.add(winner)
    assert len(winners) > 5


def test_what_most_say_wins_and_rare_tokens_count_more() -> None:
    assert most_agreed([(1, 2, 3), (4, 5), (1, 2, 6), (4, 5)], None) == 1
    assert most_agreed([(1, 2, 3), (7, 8, 9), (1, 2, 6)], None) == 0
    # 0 is said by most; 5 is rare, and those who say it agree.
    captions = [(0, 1), (0, 2), (0, 3), (5, 4), (5, 6)]
    assert most_agreed(captions, None) == 0
    assert most_agreed(captions, np.array([0.01, 3, 3, 3, 1, 4, 1.0])) == 3


def test_captions_without_words_and_a_single_one() -> None:
    assert most_agreed([()], None) == 0
    assert most_agreed([(), ()], np.ones(3)) == 0
    assert most_agreed([(), (1,), (1,)], None) == 1
    assert most_agreed([[2, 1], [2, 1]], np.zeros(3)) == 0


def test_a_models_frequencies_are_read_in_double_precision() -> None:
    idf_V = np.array([0.5, 2.25], np.float16)
    found = caption_idf_of({"caption_idf": idf_V, "other": np.zeros(2)})
    assert found is not None
    assert found.dtype == np.float64 and found.tolist() == [0.5, 2.25]
    assert caption_idf_of({"other": idf_V}) is None
