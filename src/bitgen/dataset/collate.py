"""Samples to batches: right padding, labels aligned with the input and never shifted here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LENGTH_STEP = 8
"""Rows are padded to a multiple of this: kernels are prepared once a shape, so few shapes serve."""
IGNORED_LABEL = -100
"""Label of positions without loss: padding, prompt; image positions have no label at all."""


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, int64 `[B, L]`, and which are tokens, bool `[B, L]`."""
    longest = max(len(row) for row in rows)
    input_ids_BL = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    return input_ids_BL, torch.arange(longest) < lengths_B1


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes:
        input_ids: token ids.
        num_prefix: how many of them form the prefix, without loss; the rest are the caption.
        labels: aligned with `input_ids`; None: the caption is its own label, the prefix has none.
        image: uint8 `[3, S, S]`, or None.
        image_features: of a frozen encoder, float16 `[P, E]`, in the place of `image`; or None.
        robot_labels: 0/1 a robot of the catalog, or None if the sample is no robot task.
        image_words: weight of each token that the picture's captions hold; they add up to 1.
        is_plan: whether the text is a plan, not a caption.
        picture: which of the set's captioned pictures it is; -1 if it is none of them.
    """

    input_ids: list[int]
    num_prefix: int
    image: torch.Tensor | None = None
    robot_labels: tuple[float, ...] | None = None
    image_words: dict[int, float] = dataclasses.field(default_factory=dict)
    labels: list[int] | None = None
    is_plan: bool = False
    picture: int = -1
    image_features: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """B rows of L text tokens.

    Attributes:
        input_ids: int64 `[B, L]`.
        attention_mask: bool `[B, L]`, True = token.
        labels: int64 `[B, L]`, aligned with `input_ids`; -100 = no loss. In captions the tokens
            themselves; in masked language modelling what stood at the chosen positions.
        prefix_lengths: int64 `[B]`, text tokens in each row's prefix.
        images: uint8 `[B, 3, H, W]`, or None if no row has a picture.
        image_features: float16 `[B, P, E]`, in the place of `images`, or None.
        image_mask: bool `[B]`, False = the row has no picture (zeros stand in its place).
        robot_labels: float32 `[B, R]`, NaN = no label.
        word_ids: int64 `[B, W]`, tokens of all captions of the row's picture.
        word_weights: float32 `[B, W]`, adding up to 1 a row; 0 = padding.
        is_plan: bool `[B]`, True = the row's text is a plan, not a caption.
        pictures: int64 `[B]`, which of the set's captioned pictures each row is of; -1 = none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    prefix_lengths: torch.Tensor
    images: torch.Tensor | None
    image_mask: torch.Tensor
    robot_labels: torch.Tensor
    word_ids: torch.Tensor
    word_weights: torch.Tensor
    is_plan: torch.Tensor
    pictures: torch.Tensor
    image_features: torch.Tensor | None = None

    @property
    def has_pictures(self) -> bool:
        """Whether image tokens stand before the text, of pictures or of their features."""
        return self.images is not None or self.image_features is not None

    def rows(self, chosen_B: torch.Tensor) -> Batch:
        """The rows where bool `[B]` is True."""
        return self._map(lambda tensor: tensor[chosen_B])

    def without_labels(self) -> Batch:
        """The batch with nothing to learn from it."""
        return dataclasses.replace(
            self,
            labels=torch.full_like(self.labels, IGNORED_LABEL),
            robot_labels=torch.full_like(self.robot_labels, float("nan")),
            word_weights=torch.zeros_like(self.word_weights),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: function(value) for name, value in tensors.items() if value is not None}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Collator:
    """Callable for DataLoader: pads rows on the right and stacks them."""

    pad_id: int
    num_robots: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch of the samples, in their order."""
        batch, longest = len(samples), max(len(sample.input_ids) for sample in samples)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        input_ids = torch.full((batch, length), self.pad_id)
        labels = torch.full((batch, length), IGNORED_LABEL)
        robot_labels = torch.full((batch, self.num_robots), float("nan"))
        num_words = max(len(sample.image_words) for sample in samples)
        word_ids = torch.zeros(batch, num_words, dtype=torch.long)
        word_weights = torch.zeros(batch, num_words)
        for row, sample in enumerate(samples):
            words = sample.image_words
            word_ids[row, : len(words)] = torch.tensor(list(words), dtype=torch.long)
            word_weights[row, : len(words)] = torch.tensor(list(words.values()))
            end = len(sample.input_ids)
            input_ids[row, :end] = torch.tensor(sample.input_ids)
            if sample.labels is None:
                labels[row, sample.num_prefix : end] = input_ids[row, sample.num_prefix : end]
            else:
                labels[row, :end] = torch.tensor(sample.labels)
            if sample.robot_labels is not None:
                robot_labels[row] = torch.tensor(sample.robot_labels)
        lengths_B = torch.tensor([len(sample.input_ids) for sample in samples])
        return Batch(
            input_ids=input_ids,
            attention_mask=torch.arange(length) < lengths_B[:, None],
            labels=labels,
            prefix_lengths=torch.tensor([sample.num_prefix for sample in samples]),
            images=_stacked([sample.image for sample in samples]),
            image_mask=torch.tensor(
                [s.image is not None or s.image_features is not None for s in samples]
            ),
            robot_labels=robot_labels,
            word_ids=word_ids,
            word_weights=word_weights,
            is_plan=torch.tensor([sample.is_plan for sample in samples]),
            pictures=torch.tensor([sample.picture for sample in samples]),
            image_features=_stacked([sample.image_features for sample in samples]),
        )


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One tensor with zeros for rows that are None; None if all are."""
    present = [row for row in rows if row is not None]
    if not present:
        return None
    blank = torch.zeros_like(present[0])
    return torch.stack([blank if row is None else row for row in rows])
