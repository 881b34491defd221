"""CIDEr-D (arXiv 1411.5726) of many captions at once, fast enough for a reward.

The numbers are those of pycocoevalcap's `Cider`: n-grams up to four words, weighted by TF-IDF with
the document frequencies of the references, cosine similarity with clipped counts, a Gaussian
penalty on differing length, times ten.

An n-gram has a number, found from those of the n-gram one word shorter and of its last word by a
search in a sorted array: exact, without hashing, in 12 bytes an n-gram.

Shapes: C captions, T words of them all, E distinct n-grams of each caption, one caption after the
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MAX_WORDS = 4  # of an n-gram
_SIGMA = 6.0
_SCALE = 10.0
_BITS = 31  # of a word's, n-gram's or caption's number, so that two make one int64


class _Captions(NamedTuple):
    """Captions as numbers of words."""

    words_T: np.ndarray
    rows_T: np.ndarray  # which caption each word is of
    lengths_C: np.ndarray


class _Vectors(NamedTuple):
    """TF-IDF vectors of captions over the n-grams of one length."""

    keys_E: np.ndarray  # row << _BITS | n-gram, sorted
    weights_E: np.ndarray
    norms_C: np.ndarray

    def rows(self) -> np.ndarray:
        """Which caption each entry is of."""
        return self.keys_E >> _BITS


class CiderD:
    """Scores captions against the references of one set of pictures.

    What a word is is the caller's choice: for the published metric, those of
    `bitgen.dataset.penn_treebank.caption_words`; as a reward, with one more for the caption's end.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        """Count document frequencies: each picture is a document.

        Args:
            references: the words of each reference of each picture.
        """
        captions = [words for picture in references for words in picture]
        self._word_ids = {
            word: i for i, word in enumerate(dict.fromkeys(w for c in captions for w in c))
        }
        counts = [len(picture) for picture in references]
        self._first_references = np.cumsum([0, *counts])
        encoded = self._encode(captions)
        self._words = encoded.words_T.astype(np.int32)
        self._ends = np.cumsum([0, *encoded.lengths_C])
        pictures_C = np.repeat(np.arange(len(references)), counts)
        pictures_T = pictures_C[encoded.rows_T]
        # Of each number of words: for one, numbers are those of the words themselves.
        self._codes = [np.arange(len(self._word_ids), dtype=np.int64)]
        self._unseen_idf = np.log(max(1, len(references)))
        self._idf: list[np.ndarray] = []
        ngrams = _ngrams_of_one(encoded)
        for num_words in range(1, _MAX_WORDS + 1):
            if num_words > 1:
                ends, codes = _lengthened(encoded, ngrams, num_words)
                known, found = np.unique(codes, return_inverse=True)
                self._codes.append(known)
                ngrams = ends, found
            documents = np.unique(pictures_T[ngrams[0]] << _BITS | ngrams[1])
            frequency = np.bincount(documents & _mask(), minlength=len(self._codes[-1]))
            self._idf.append(self._unseen_idf - np.log(np.maximum(frequency, 1)))

    def __call__(self, captions: Sequence[Sequence[str]], pictures: Sequence[int]) -> np.ndarray:
        """CIDEr-D of each caption, float64 `[C]`, about 0 to 10.

        Args:
            captions: their words.
            pictures: of each caption, which picture's references it is compared with.
        """
        if not len(captions):
            return np.zeros(0)
        pictures_C = np.asarray(pictures, dtype=np.int64)
        given = self._encode(captions)
        chosen, position_C = np.unique(pictures_C, return_inverse=True)
        references, first = self._references(chosen)
        # Every pair of a caption and a reference of its picture.
        num_references_C = np.diff(first)[position_C]
        caption_P = np.repeat(np.arange(len(captions)), num_references_C)
        reference_P = _ranges(first[position_C], num_references_C)
        total_P = np.zeros(len(caption_P))
        for mine, theirs in zip(self._vectors(given), self._vectors(references), strict=True):
            product_P = _clipped_products(mine, theirs, caption_P, reference_P)
            norm_P = mine.norms_C[caption_P] * theirs.norms_C[reference_P]
            total_P += np.divide(product_P, norm_P, out=product_P, where=norm_P != 0)
        # As published, a caption's length is the number of its word pairs.
        pairs_C, pairs_R = (np.maximum(c.lengths_C - 1, 0) for c in (given, references))
        difference_P = pairs_C[caption_P] - pairs_R[reference_P]
        total_P *= np.exp(-(difference_P**2) / (2 * _SIGMA**2))
        scores_C: np.ndarray = np.bincount(caption_P, total_P, minlength=len(captions))
        return scores_C * (_SCALE / _MAX_WORDS) / np.maximum(num_references_C, 1)

    def _encode(self, captions: Sequence[Sequence[str]]) -> _Captions:
        """Words that no reference has get numbers behind those of the others."""
        known, unknown = self._word_ids, dict[str, int]()
        words = [
            known[word] if word in known else len(known) + unknown.setdefault(word, len(unknown))
            for caption in captions
            for word in caption
        ]
        lengths_C = np.array([len(caption) for caption in captions], dtype=np.int64)
        return _Captions(
            np.array(words, dtype=np.int64),
            np.repeat(np.arange(len(captions)), lengths_C),
            lengths_C,
        )

    def _references(self, pictures: np.ndarray) -> tuple[_Captions, np.ndarray]:
        """The references of these pictures, and where those of each begin, and the last end."""
        starts, ends = self._first_references[pictures], self._first_references[pictures + 1]
        references = _ranges(starts, ends - starts)
        lengths = self._ends[references + 1] - self._ends[references]
        words = self._words[_ranges(self._ends[references], lengths)].astype(np.int64)
        rows = np.repeat(np.arange(len(references)), lengths)
        return _Captions(words, rows, lengths), np.cumsum([0, *(ends - starts)])

    def _vectors(self, captions: _Captions) -> list[_Vectors]:
        """For n-grams of one word, of two, ..."""
        ngrams = _ngrams_of_one(captions)
        vectors = []
        for num_words, (known, idf) in enumerate(zip(self._codes, self._idf, strict=True), start=1):
            if num_words > 1:
                ends, codes = _lengthened(captions, ngrams, num_words)
                ngrams = ends, _numbers(codes, known)
            ends, found = ngrams
            keys, counts = np.unique(captions.rows_T[ends] << _BITS | found, return_counts=True)
            numbers = keys & _mask()
            is_known = numbers < len(idf)
            weights = np.full(len(keys), self._unseen_idf)
            weights[is_known] = idf[numbers[is_known]]
            weights *= counts
            squares = np.bincount(keys >> _BITS, weights**2, minlength=len(captions.lengths_C))
            vectors.append(_Vectors(keys, weights, np.sqrt(squares)))
        return vectors


def _mask() -> int:
    return (1 << _BITS) - 1


def _ngrams_of_one(captions: _Captions) -> tuple[np.ndarray, np.ndarray]:
    """Where each word stands, and its number."""
    return np.arange(len(captions.words_T)), captions.words_T


def _lengthened(
    captions: _Captions, ngrams: tuple[np.ndarray, np.ndarray], num_words: int
) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams with one word more, where there is one: where they end, and a code of each.

    `ngrams` are those of one word less: where they end, and their numbers.
    """
    ends, numbers = ngrams
    follows = ends + 1 < len(captions.words_T)
    ends, numbers = ends[follows], numbers[follows]
    follows = captions.rows_T[ends] == captions.rows_T[ends + 1]
    ends, numbers = ends[follows] + 1, numbers[follows]
    return ends, numbers << _BITS | captions.words_T[ends]


def _numbers(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The position of each code among the `known`; behind them for those that are not known."""
    positions = np.searchsorted(known, codes)
    is_known = positions < len(known)
    is_known[is_known] = known[positions[is_known]] == codes[is_known]
    _, other = np.unique(codes[~is_known], return_inverse=True)
    positions[~is_known] = len(known) + other
    return positions


def _clipped_products(
    mine: _Vectors, theirs: _Vectors, caption_P: np.ndarray, reference_P: np.ndarray
) -> np.ndarray:
    """Sum of `min(caption, reference) * reference` over the n-grams of each pair, float64 `[P]`."""
    if not len(theirs.keys_E):
        return np.zeros(len(caption_P))
    first_C = np.searchsorted(mine.rows(), np.arange(len(mine.norms_C) + 1))
    counts_P = np.diff(first_C)[caption_P]
    entries = _ranges(first_C[:-1][caption_P], counts_P)
    pair = np.repeat(np.arange(len(caption_P)), counts_P)
    wanted = reference_P[pair] << _BITS | mine.keys_E[entries] & _mask()
    positions = np.searchsorted(theirs.keys_E, wanted).clip(max=len(theirs.keys_E) - 1)
    shared = theirs.keys_E[positions] == wanted
    reference = theirs.weights_E[positions[shared]]
    products = np.minimum(mine.weights_E[entries[shared]], reference) * reference
    # Of nothing at all, bincount gives whole numbers.
    return np.bincount(pair[shared], products, minlength=len(caption_P)).astype(np.float64)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`starts[0], starts[0] + 1, ...` (`lengths[0]` numbers), then those from `starts[1]` on ..."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(offsets - starts, lengths)
