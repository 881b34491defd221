"""Self-critical sequence training: captions that the model draws, each judged by the others.

    pictures -> K captions drawn of each -> CIDEr-D r_k against the picture's references
             -> advantage r_k - mean of the other K - 1  -> loss -advantage * log p(caption)

REINFORCE with CIDEr as reward: arXiv 1612.00563. The baseline of the other captions, instead of a
greedy one, costs no pass of its own: arXiv 2003.09971. The end of a caption is a word of the
reward's n-grams, in captions and references alike: else captions learn to end in "on a".

The captions of a picture stand side by side in one row (`caption_sampling.caption_mask`), so that a
picture is encoded and read once in the pass with gradient, too.

Shapes: B rows of a batch, R of them with captions, K captions of each, L text columns, M tokens
that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitgen.config import TrainingConfig
from bitgen.dataset.collate import IGNORED_LABEL, LENGTH_STEP, Batch
from bitgen.dataset.penn_treebank import caption_words
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask
from bitgen.training.caption_sampling import PREFIX, caption_mask, never_ids, write_captions
from bitgen.training.cider import CiderD

_END = "<end>"  # no caption has a word like this


@dataclass(frozen=True)
class SampledCaptions:
    """Captions drawn for the rows of a batch, laid out side by side for the pass with gradient.

    Attributes:
        rows_B: bool, the rows of the batch that have captions.
        input_ids_RL: int64.
        segments_RL: int64, which caption each column is of; `PREFIX` for `<bos>`.
        positions_RL: int64, where it stands behind the picture; -1 = padding.
        sources_M: int64, columns of the flattened `[R * L]` whose logits score a token.
        targets_M: int64, that token.
        advantages_M: float32, of the token's caption; 0 for references.
        is_reference_M: bool, tokens of the data's own captions, which have the caption loss.
        num_captions: drawn, R * K.
        reward_sum: sum of their CIDEr-D.
    """

    rows_B: torch.Tensor
    input_ids_RL: torch.Tensor
    segments_RL: torch.Tensor
    positions_RL: torch.Tensor
    sources_M: torch.Tensor
    targets_M: torch.Tensor
    advantages_M: torch.Tensor
    is_reference_M: torch.Tensor
    num_captions: int
    reward_sum: float

    @property
    def num_tokens(self) -> int:
        """Of the captions that were drawn."""
        return int((~self.is_reference_M).sum())

    def attention_mask(self, model: BitGenModel) -> AttentionMask:
        """Over image and text columns."""
        images = model.num_image_tokens
        rows = len(self.input_ids_RL)
        segments_RS = torch.cat([torch.full((rows, images), PREFIX), self.segments_RL], dim=1)
        text_RL = torch.where(self.positions_RL < 0, -1, self.positions_RL + images)
        positions_RS = torch.cat([torch.arange(images).expand(rows, -1), text_RL], dim=1)
        if model.config.attention_mode == "causal":
            base = AttentionMask.causal()
        else:
            base = AttentionMask.prefix(images + 1)
        return caption_mask(base, segments_RS, positions_RS)


class SelfCritic:
    """Has the model write captions of training pictures, and judges them."""

    def __init__(
        self, tokenizer: Tokenizer, references: Sequence[Sequence[str]], training: TrainingConfig
    ) -> None:
        """
        Args:
            tokenizer: the model's.
            references: the captions of each picture of the training set.
            training: how many captions are drawn, and how long they may be.
        """
        self._tokenizer, self._training = tokenizer, training
        self._scorer = CiderD(
            [[[*caption_words(text), _END] for text in captions] for captions in references]
        )

    def sample(
        self, model: BitGenModel, batch: Batch, images_B3HW: torch.Tensor
    ) -> SampledCaptions | None:
        """Draw captions for the batch; None where none of its rows has a caption to learn from.

        Args:
            model: on the device of the pictures; call this under the forward pass's autocast.
            batch: on the host.
            images_B3HW: its pictures, normalised, on the device.
        """
        rows_B = (batch.labels != IGNORED_LABEL).any(dim=1) & (batch.pictures >= 0)
        if not rows_B.any():
            return None
        captions = write_captions(
            model,
            images_B3HW[rows_B.to(images_B3HW.device)],
            self._tokenizer.bos_id,
            self._tokenizer.eos_id,
            self._training.max_caption_tokens,
            never_ids=never_ids(self._tokenizer, model),
            num_captions=self._training.num_sampled_captions,
        )
        rewards_RK = self.rewards(captions, batch.pictures[rows_B].tolist())
        return lay_out(
            batch,
            rows_B,
            captions,
            rewards_RK,
            with_references=self._training.cross_entropy_weight > 0,
            bos_id=self._tokenizer.bos_id,
            pad_id=self._tokenizer.pad_id,
        )

    def rewards(
        self, captions: Sequence[Sequence[Sequence[int]]], pictures: Sequence[int]
    ) -> np.ndarray:
        """CIDEr-D of K captions (token ids) of each of R pictures, float64 `[R, K]`."""
        tokenizer, words = self._tokenizer, []
        for of_picture in captions:
            for ids in of_picture:
                ends = [_END] if ids and ids[-1] == tokenizer.eos_id else []
                words.append([*caption_words(tokenizer.decode(ids)), *ends])
        repeated = np.repeat(np.asarray(pictures), [len(of_picture) for of_picture in captions])
        return self._scorer(words, repeated.tolist()).reshape(len(captions), -1)


def lay_out(
    batch: Batch,
    rows_B: torch.Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    rewards_RK: np.ndarray,
    with_references: bool,
    bos_id: int,
    pad_id: int,
) -> SampledCaptions:
    """Captions with their rewards, for the pass with gradient.

    Args:
        batch: on the host.
        rows_B: bool, the rows that the captions are of.
        captions: token ids, K for each of R rows.
        rewards_RK: of each.
        with_references: whether the batch's own captions stand beside them.
        bos_id: begins each row.
        pad_id: fills rows up.
    """
    advantages_RK = leave_one_out_advantages(rewards_RK)
    rows = []
    for number, drawn, advantages in zip(
        rows_B.nonzero().flatten().tolist(), captions, advantages_RK.tolist(), strict=True
    ):
        row = _Row(bos_id)
        for ids, advantage in zip(drawn, advantages, strict=True):
            row.add(ids, advantage)
        if with_references:
            valid_L = batch.attention_mask[number]
            ids_L, labels_L = batch.input_ids[number][valid_L], batch.labels[number][valid_L]
            row.add(ids_L[1:].tolist(), None, labels_L[1:].tolist())
        rows.append(row)
    longest = max(len(row.input_ids) for row in rows)
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP

    def padded(values: Sequence[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filling] * (length - len(row))] for row in values])

    scored = [
        (number * length + column, token, advantage or 0.0, advantage is None)
        for number, row in enumerate(rows)
        for column, token, advantage in row.scored
    ]
    sources, targets, advantages, is_reference = zip(*scored, strict=True)
    return SampledCaptions(
        rows_B=rows_B,
        input_ids_RL=padded([row.input_ids for row in rows], pad_id),
        segments_RL=padded([row.segments for row in rows], 0),
        positions_RL=padded([row.positions for row in rows], -1),
        sources_M=torch.tensor(sources),
        targets_M=torch.tensor(targets),
        advantages_M=torch.tensor(advantages),
        is_reference_M=torch.tensor(is_reference),
        num_captions=rewards_RK.size,
        reward_sum=float(rewards_RK.sum()),
    )


class _Row:
    """One picture's captions side by side. The last token of each scores none, and is left out."""

    def __init__(self, bos_id: int) -> None:
        self.input_ids, self.segments, self.positions = [bos_id], [PREFIX], [0]
        self.scored: list[tuple[int, int, float | None]] = []  # column, its next token, advantage
        self._num_captions = 0

    def add(
        self, ids: Sequence[int], advantage: float | None, labels: Sequence[int] | None = None
    ) -> None:
        """Add a caption; `labels` says which of its tokens are scored, None all."""
        first = len(self.input_ids)
        for index, token in enumerate(ids):
            if labels is None or labels[index] != IGNORED_LABEL:
                column = first + index - 1 if index else 0
                self.scored.append((column, token, advantage))
        self.input_ids += ids[:-1]
        self.segments += [self._num_captions] * (len(ids) - 1)
        self.positions += range(1, len(ids))
        self._num_captions += 1


def leave_one_out_advantages(rewards_RK: np.ndarray) -> np.ndarray:
    """Each reward less the mean of the other K - 1 of its row (arXiv 2003.09971, equation 4)."""
    num_captions = rewards_RK.shape[1]
    mean_R1 = rewards_RK.mean(axis=1, keepdims=True)
    return (rewards_RK - mean_R1) * (num_captions / (num_captions - 1))
