"""Masked language modelling: which tokens of a caption are hidden, and behind what.

BERT (arXiv 1810.04805, section 3.1): some tokens are chosen; of these 80% become the mask token,
10% a random one, 10% stay, and the model says what stood there. Drawn anew in every epoch, as in
RoBERTa (arXiv 1907.11692, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.collate import IGNORED_LABEL
from bitgen.dataset.tokenizer import MASK_TOKEN, Tokenizer
from bitgen.errors import ConfigError

_SHARE_MASKED, _SHARE_RANDOM = 0.8, 0.1


def check_objective(
    config: BitGenConfig, training: TrainingConfig, tokenizer: Tokenizer | None = None
) -> None:
    """Raise ConfigError where model or tokenizer (None: not made yet) are not fit for it."""
    writes_captions = training.objective == "self_critical" or training.judges_by_cider
    if writes_captions and config.attention_mode == "bidirectional":
        raise ConfigError(
            "A bidirectional model writes no captions: it can neither be rewarded for them"
            " (--objective self_critical) nor be judged by them (--best_by cider).",
            remedy="Give --attention_mode prefix or causal.",
        )
    if training.objective != "mlm":
        return
    if config.attention_mode != "bidirectional":
        raise ConfigError(
            "Masked language modelling hides words that are foretold from both sides; in attention"
            f" mode {config.attention_mode} a position sees one side alone.",
            remedy="Give --attention_mode bidirectional, or --objective caption.",
        )
    if tokenizer is not None and tokenizer.mask_id is None:
        raise ConfigError(
            f"Masked language modelling needs the token {MASK_TOKEN}, which the tokenizer lacks.",
            remedy="Leave --tokenizer out, so that one is made that has it, or take"
            " --objective caption.",
        )


class TokenMasker:
    """Hides tokens of one row after the other.

    A share `probability` of a row's ordinary tokens is chosen, each with equal chance and at least
    one a row. The number is rounded up or down at random, so that the share holds on average in
    short rows too. Special tokens are neither chosen nor put in place of others.
    """

    def __init__(self, tokenizer: Tokenizer, probability: float) -> None:
        """`tokenizer` must have a mask token: see `check_objective`."""
        assert tokenizer.mask_id is not None
        self._mask_id, self._probability = tokenizer.mask_id, probability
        self._ordinary_ids = np.array(tokenizer.ordinary_ids())
        largest = max(self._ordinary_ids.max(), *tokenizer.special_ids)
        self._is_ordinary_V = np.zeros(largest + 1, dtype=bool)
        self._is_ordinary_V[self._ordinary_ids] = True

    def __call__(
        self, input_ids: Sequence[int], random: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """The row with tokens hidden, and its labels: what stood there, -100 elsewhere."""
        ids_L = np.array(input_ids)
        ordinary = np.flatnonzero(self._is_ordinary_V[ids_L])
        count = max(1, int(len(ordinary) * self._probability + random.random()))
        chosen = random.choice(ordinary, min(count, len(ordinary)), replace=False)
        fate = random.random(len(chosen))
        other = random.choice(self._ordinary_ids, len(chosen))
        labels_L = np.full_like(ids_L, IGNORED_LABEL)
        labels_L[chosen] = ids_L[chosen]
        hidden = np.where(fate < _SHARE_MASKED + _SHARE_RANDOM, other, ids_L[chosen])
        ids_L[chosen] = np.where(fate < _SHARE_MASKED, self._mask_id, hidden)
        return ids_L.tolist(), labels_L.tolist()
