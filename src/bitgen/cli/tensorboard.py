"""`bitgen train --logs tensorboard`: a training as TensorBoard shows it.

Scalars of every update, validation and count of the ternary weights; at each validation a few
pictures, always the same, with what the model says of them now, and where it looked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from bitgen.console import console
from bitgen.dataset.coco import CaptionedImage
from bitgen.errors import InputError
from bitgen.inference.heatmap import PatchGrid, attention_maps, patch_grid, sheet_of
from bitgen.inference.predictor import BitGen, Caption
from bitgen.inference.sheet import SheetItem, lay_out
from bitgen.training.events import (
    StepReport,
    TrainerCallback,
    TrainingStart,
    TrainingSummary,
    ValidationReport,
    WeightReport,
)
from bitgen.training.trainer import Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_FOLDER = "tensorboard"
"""Of a run, where no other folder is named."""
NUM_SAMPLES = 4
MAX_TOKENS = 24
"""Of a sample's caption: in the beginning captions do not end, and each word is drawn."""

_SECONDS_BETWEEN_WRITES = 30
_TERNARY_VALUES = ("minus_one", "zero", "plus_one")
_PICTURE_SIDE = 224


def check_tensorboard(log_dir: Path | None) -> None:
    """Raise InputError where the package is missing, or `log_dir` is no folder."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "--logs tensorboard needs the package tensorboard, which is not installed.",
            remedy="Install it: pip install 'bitgen[logs]'",
        )
    if log_dir is not None and log_dir.exists() and not log_dir.is_dir():
        raise InputError(f"--log_dir {log_dir} is a file.", remedy="Name a folder.")


class TensorBoardCallback(TrainerCallback):
    """Writes what it hears to event files; close it at the end, whatever the end is.

    A resumed training goes on in the same folder: what an earlier process logged of updates that
    come once more is hidden.
    """

    def __init__(self, trainer: Trainer, log_dir: Path) -> None:
        """Nothing is written before the training starts."""
        self._trainer = trainer
        self._log_dir = log_dir
        self._open_writer: SummaryWriter | None = None
        self._samples = _samples(trainer)
        self._grid: PatchGrid | None = None
        self._maps = True

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None

    @property
    def _writer(self) -> SummaryWriter:
        assert self._open_writer is not None, "the training has not started"
        return self._open_writer

    def on_start(self, start: TrainingStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open_writer = SummaryWriter(
            str(self._log_dir),
            purge_step=start.first_step + 1,
            flush_secs=_SECONDS_BETWEEN_WRITES,
        )
        console.note(f"Watch it with: tensorboard --logdir {self._log_dir}")

    def on_step(self, report: StepReport) -> None:
        self._write(
            report.step,
            {
                "training/loss": report.loss,
                "training/robot_loss": report.robot_loss,
                "training/image_word_loss": report.image_word_loss,
                "training/reward": report.reward,
                **{f"training/{name}_loss": value for name, value in report.other_losses.items()},
                "training/gradient_norm": report.grad_norm,
                "schedule/learning_rate": report.learning_rate,
                "schedule/weight_decay": report.weight_decay,
                "speed/tokens_per_second": report.tokens_per_second,
                "speed/images_per_second": report.images_per_second,
                "speed/padding_share": report.padding_share,
                **{
                    f"experts/largest_share_layer_{layer}": max(shares)
                    for layer, shares in enumerate(report.expert_load or ())
                },
            },
        )
        if report.skipped is not None:
            self._writer.add_text("training/skipped", report.skipped, report.step)

    def on_weights(self, report: WeightReport) -> None:
        self._write(
            report.step,
            {
                "ternary/flips": report.flips,
                "ternary/flip_share": report.flip_share,
                **{
                    f"ternary_{value}/{layer}": share
                    for layer, shares in (("all", report.total_shares), *report.shares.items())
                    for value, share in zip(_TERNARY_VALUES, shares, strict=True)
                },
            },
        )

    def on_validation(self, report: ValidationReport) -> None:
        self._write(
            report.step,
            {
                "validation/loss": report.loss,
                "validation/plan_loss": report.plan_loss,
                "validation/robot_loss": report.robot_loss,
                "validation/robot_exact_match": report.robot_exact_match,
                "validation/cider": report.cider,
                "validation/robot_threshold": report.robot_threshold,
                "validation/robot_temperature": report.robot_temperature,
                "validation/robot_word_weight": report.robot_word_weight,
            },
        )
        if self._samples:
            with _evaluation(self._trainer):
                self._write_samples(report.step)
        self._writer.flush()

    def on_end(self, summary: TrainingSummary) -> None:
        self.close()

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def _write_samples(self, step: int) -> None:
        trainer, samples = self._trainer, self._samples
        model = BitGen(trainer.model, trainer.tokenizer, device=trainer.device)
        pictures = [sample.path for sample in samples]
        captions = model.caption(pictures, max_tokens=_max_tokens(trainer))
        self._writer.add_text("samples/captions", _table(samples, captions), step)
        items = [
            SheetItem(sample.path, [caption.text or "(no words)", sample.captions[0]])
            for sample, caption in zip(samples, captions, strict=True)
        ]
        sheet = lay_out(items, columns=NUM_SAMPLES, picture_side=_PICTURE_SIDE)
        self._add_image("samples/sheet", sheet, step)
        if self._grid is None and self._maps:
            try:
                self._grid = patch_grid(model)
            except InputError:  # no square grid of patches: no maps of this model
                self._maps = False
        if self._grid is None:
            return
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start=1):
            maps = attention_maps(model, picture, caption, grid=self._grid)
            self._add_image(f"attention/{number}", sheet_of(maps), step)

    def _add_image(self, name: str, image: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")


def _samples(trainer: Trainer) -> list[CaptionedImage]:
    """Pictures from all over the validation set, the same whenever it is the same.

    None of a model that writes no captions, and none where its weights lie in pieces on several
    processes: there, one process alone cannot run it.
    """
    val_set = trainer.validation_set
    writes_captions = trainer.model.config.attention_mode != "bidirectional"
    if val_set is None or not writes_captions or trainer.is_sharded or _max_tokens(trainer) < 1:
        return []
    images = val_set.images
    number = min(NUM_SAMPLES, len(images))
    return [images[index * len(images) // number] for index in range(number)]


def _max_tokens(trainer: Trainer) -> int:
    model = trainer.model
    return min(MAX_TOKENS, model.config.max_positions - model.num_image_tokens)


@contextmanager
def _evaluation(trainer: Trainer) -> Iterator[None]:
    """Afterwards model and random numbers are as if nobody had looked."""
    model, device = trainer.model, trainer.device
    was_training = model.training
    kept: list[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(kept):
        try:
            yield
        finally:
            model.train(was_training)


def _table(samples: Sequence[CaptionedImage], captions: Sequence[Caption]) -> str:
    """Markdown: picture, caption, reference."""
    rows = [
        (sample.path.name, caption.text, sample.captions[0])
        for sample, caption in zip(samples, captions, strict=True)
    ]
    cells = [("picture", "caption", "reference"), ("---", "---", "---"), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |"
        for row in cells
    )
