"""The loss of a trained model on captions that it was not trained on, as validation computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bitgen.config import TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.samples import Pictures, TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.training.objective import FIGURES, Objective


class HeldOutLoss(NamedTuple):
    """`mean` in nats a token, over `num_tokens` of one caption a picture."""

    mean: float
    num_tokens: int


def held_out_loss(
    model: BitGenModel,
    tokenizer: Tokenizer,
    images: Sequence[CaptionedImage],
    pictures: Pictures,
    training: TrainingConfig,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> HeldOutLoss:
    """Mean cross-entropy of the next token, over one caption a picture.

    The captions are drawn by the training's seed, as its own validation drew them: its loss is
    found again, up to rounding where it ran in less than float32.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        images: captioned pictures.
        pictures: pixels by path.
        training: its seed, longest caption and objective count.
        batch_size: captions at a time.
        on_progress: called with the number of captions done.
    """
    device = next(model.parameters()).device
    samples = TrainingSet(
        images, [], pictures, tokenizer, model.config, training, (), training_mode=False
    )
    objective = Objective(model, training, device, torch.float32)
    totals = torch.zeros(len(FIGURES), dtype=torch.float64)
    for start in range(0, len(samples), batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        totals += objective.judge(samples.collate([samples[row] for row in rows])).figures
        if on_progress is not None:
            on_progress(rows.stop)
    figures = dict(zip(FIGURES, totals.tolist(), strict=True))
    return HeldOutLoss(figures["caption"] / max(1.0, figures["tokens"]), int(figures["tokens"]))
