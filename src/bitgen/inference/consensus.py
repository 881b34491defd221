"""Minimum Bayes risk decoding: of many captions that were drawn, the one most like all of them.

    captions drawn of one picture -> TF-IDF of their tokens and pairs of tokens -> CIDEr-D of each
    against all -> the highest

The likeliest caption is often a safe one that says little; what most draws have in common is what
the model is sure of (Kumar and Byrne, HLT-NAACL 2004; Eikema and Aziz, arXiv 2005.10283; of
captions: arXiv 1505.04467). Likeness is CIDEr-D (arXiv 1411.5726) of one and two tokens: a single
draw is a small sample of longer phrases, and judging by them chooses worse (docs/training.md).

Shapes: S captions drawn, U of them different, E distinct n-grams, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitgen.config import CAPTION_IDF

_LONGEST_NGRAM = 2
_SIGMA = 6.0  # of CIDEr-D's penalty on differing length

Floats = npt.NDArray[np.floating[Any]]


def caption_idf_of(tensors: Mapping[str, npt.NDArray[Any]]) -> Floats | None:
    """The inverse document frequencies among a model's tensors; None where it has none."""
    found = tensors.get(CAPTION_IDF)
    return None if found is None else found.astype(np.float64)


def most_agreed(captions: Sequence[Sequence[int]], idf_V: Floats | None) -> int:
    """Which of the captions is most like all of them.

    Args:
        captions: S lists of token ids, without the end of text.
        idf_V: inverse document frequency of each token; an n-gram weighs the sum of its tokens'.
            None: all tokens weigh the same.

    Returns:
        Its index; of equal captions, or equally good ones, that of the first.
    """
    counts = Counter(tuple(caption) for caption in captions)
    if len(counts) == 1:  # greedy captions, too
        return 0
    different = list(counts)  # in the order of their first
    agreement_U = _cider_d(different, idf_V) @ np.array(list(counts.values()))
    best = different[int(agreement_U.argmax())]
    return next(index for index, caption in enumerate(captions) if tuple(caption) == best)


def _cider_d(captions: Sequence[tuple[int, ...]], idf_V: Floats | None) -> Floats:
    """float64 `[U, U]`: CIDEr-D of the caption of each row against that of each column, 0 to 1."""
    lengths_U = np.array([len(caption) for caption in captions])
    penalty_UU = np.exp(-((lengths_U[:, None] - lengths_U) ** 2) / (2 * _SIGMA**2))
    similarity_UU = np.zeros((len(captions), len(captions)))
    for num_tokens in range(1, _LONGEST_NGRAM + 1):
        tfidf_UE = _tfidf(captions, num_tokens, idf_V)
        norm_U = np.sqrt((tfidf_UE**2).sum(axis=1))
        norm_U[norm_U == 0] = 1.0
        for row_U, row_E, norm in zip(similarity_UU, tfidf_UE, norm_U, strict=True):
            row_U += (np.minimum(row_E, tfidf_UE) * tfidf_UE).sum(axis=1) / (norm * norm_U)
    return similarity_UU * penalty_UU / _LONGEST_NGRAM


def _tfidf(captions: Sequence[tuple[int, ...]], num_tokens: int, idf_V: Floats | None) -> Floats:
    """float64 `[U, E]`: how often each n-gram of so many tokens comes, times its weight."""
    column_of: dict[tuple[int, ...], int] = {}
    cells = []
    for row, caption in enumerate(captions):
        for start in range(len(caption) - num_tokens + 1):
            ngram = caption[start : start + num_tokens]
            cells.append((row, column_of.setdefault(ngram, len(column_of))))
    tfidf_UE = np.zeros((len(captions), len(column_of)))
    for row, column in cells:
        tfidf_UE[row, column] += 1.0
    if idf_V is not None and column_of:
        tfidf_UE *= idf_V[np.array(list(column_of))].sum(axis=1)
    return tfidf_UE
