"""The training loop. It reports through callbacks and never prints.

    epoch order -> groups of micro-batches -> one update a group -> metrics, validation, checkpoint

One update divides the summed loss of all its micro-batches once, by the number of tokens (and of
robot labels) that all of them hold together. Everything random depends on the seed, the epoch and
the sample, or on torch's generators, which checkpoints hold: on a CPU a run that was stopped and
resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from bitgen.config import TrainingConfig
from bitgen.dataset.collate import Batch, pad_rows
from bitgen.dataset.images import normalize_images
from bitgen.dataset.robots import Robot, catalog_to_json
from bitgen.errors import ConfigError, DatasetError, Interrupted, TrainingError
from bitgen.model.device import resolve_device
from bitgen.training.allocator import keep_freed_memory
from bitgen.training.amp import autocast, make_grad_scaler, resolve_precision
from bitgen.training.checkpoint import (
    MetricsLog,
    RunFiles,
    create_run,
    load_checkpoint,
    load_model_tensors,
    open_run,
    remove_temporaries,
    save_checkpoint,
    update_run_config,
)
from bitgen.training.curves import draw_curves
from bitgen.training.losses import (
    caption_loss,
    count_caption_targets,
    count_exact_matches,
    count_image_words,
    count_robot_labels,
    image_word_loss,
    robot_loss,
    robot_positive_weight,
)
from bitgen.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from bitgen.training.schedule import learning_rate_at

if TYPE_CHECKING:
    from bitgen.dataset.samples import TrainingSet
    from bitgen.dataset.tokenizer import Tokenizer
    from bitgen.model.bitgen import BitGenModel

CURVES_FILE = "curves.png"

_SKIPS_IN_A_ROW = 10  # updates without a finite loss before training gives up
_SPEED_WINDOW = 20  # updates over which speed and remaining time are averaged

# Settings that a resumed run may change without its result being another experiment's.
_FREE_ON_RESUME = frozenset(
    (
        "num_epochs", "max_steps", "num_workers", "save_every", "eval_every", "patience",
        "keep_checkpoints",
    )
)  # fmt: skip


# What callbacks hear ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingStart:
    """What is about to be trained."""

    run_dir: Path
    first_step: int  # updates already made, by the run that is resumed
    total_steps: int
    num_epochs: int
    device: str
    precision: str  # fp32, bf16 or fp16
    num_parameters: int  # those that are trained
    train_samples: int
    val_samples: int
    differences: tuple[str, ...]  # settings of a resumed run that differ from the recorded ones


@dataclass(frozen=True)
class StepReport:
    """One update. Losses are in nats; None where the update held nothing of the kind."""

    step: int  # updates made, this one counted
    total_steps: int
    epoch: int  # from 1
    num_epochs: int
    loss: float | None  # caption loss per valid token
    robot_loss: float | None  # per robot label
    image_word_loss: float | None  # per picture
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # with a caption loss
    images: int
    tokens_per_second: float  # over the last updates, validation and saving not counted
    images_per_second: float
    seconds_remaining: float
    skipped: bool  # loss or gradients were not finite: the weights stayed as they were


@dataclass(frozen=True)
class ValidationReport:
    """One pass over the validation set."""

    step: int
    epoch: int
    loss: float | None  # caption loss per valid token, without label smoothing
    robot_loss: float | None
    robot_exact_match: float | None  # share of tasks with every robot judged right, 0 to 1
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class TrainingSummary:
    """What a training did."""

    run_dir: Path
    checkpoint_dir: Path
    steps: int
    epochs: float
    first_loss: float | None  # of the first update that had captions
    loss: float | None  # of the last update that had captions
    validation: ValidationReport | None  # the last one of this process
    best_step: int | None
    best_loss: float | None  # caption loss + robot_loss_weight x robot loss, at `best_step`
    skipped_steps: int
    seconds: float  # spent in updates, also before a resume
    tokens_per_second: float
    images_per_second: float
    curves: Path | None
    differences: tuple[str, ...]


class TrainerCallback:
    """Hears of the training's events; does nothing. Override what is of interest."""

    def on_start(self, start: TrainingStart) -> None:
        """The run's folder is there; the first update comes next."""

    def on_step(self, report: StepReport) -> None:
        """An update was made, or skipped."""

    def on_validation_progress(self, done: int, total: int) -> None:
        """`done` of `total` validation batches are judged."""

    def on_validation(self, report: ValidationReport) -> None:
        """The validation set was judged."""

    def on_checkpoint(self, path: Path, step: int, is_best: bool) -> None:
        """A checkpoint is written."""

    def on_warning(self, message: str) -> None:
        """Something that a person should look at."""

    def on_end(self, summary: TrainingSummary) -> None:
        """All updates are made and saved."""


# Data order -------------------------------------------------------------------------------------


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in one epoch; the same for the same arguments, everywhere."""
    generator = np.random.default_rng([seed % 2**63, epoch])
    order: list[int] = generator.permutation(num_samples).tolist()
    return order


def _split(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


@dataclass
class _Progress:
    """Where a training stands: with the tensors, all that resuming needs."""

    step: int = 0
    epoch: int = 0  # from 0
    samples_seen: int = 0  # of this epoch
    tokens: int = 0
    images: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    loss: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    validations_since_best: int = 0


@dataclass(frozen=True)
class _Update:
    loss: float | None
    robot_loss: float | None
    image_word_loss: float | None
    grad_norm: float
    tokens: int
    skipped: bool
    overflowed: bool  # skipped because float16 gradients were scaled too high: that is routine


# The trainer ------------------------------------------------------------------------------------


class Trainer:
    """Trains a model and writes its run.

    Attributes:
        device: where it trains.
        dtype: of the forward pass; trained weights are float32.
        max_validation_batches: cap on the batches of a validation; None judges the whole set.
    """

    def __init__(
        self,
        model: BitGenModel,
        train_set: TrainingSet,
        val_set: TrainingSet | None,
        tokenizer: Tokenizer,
        catalog: Sequence[Robot],
        training: TrainingConfig,
        output_dir: Path,
        data_info: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Prepare; nothing is written before `train`.

        Args:
            model: its weights are trained in place, and moved to the device.
            train_set: what is learnt.
            val_set: what is validated on; None or empty for no validation.
            tokenizer: the one that made the sets; it is saved with the run.
            catalog: the robots, in the order of the sets' robot labels; may be empty.
            training: how to train.
            output_dir: the run's own folder.
            data_info: JSON values that say what is trained on, for `bitgen info`.
            callbacks: hear of every event, in this order.

        Raises:
            DatasetError: the training set is empty.
            ConfigError: a device or precision that this machine does not have, or nothing that
                has a loss.
        """
        if len(train_set) == 0:
            raise DatasetError(
                "The training set is empty: there is nothing to learn from.",
                remedy="Give a data set that holds captions or robot tasks.",
            )
        if model.config.attention_mode == "bidirectional" and not (
            train_set.tasks or training.image_word_weight
        ):
            raise ConfigError(
                "There is nothing to learn: in bidirectional mode captions have no loss, there are"
                " no robot tasks, and image_word_weight is 0.",
                remedy="Give --robot_data, or take --attention_mode prefix.",
            )
        self.device = resolve_device(training.device)
        self.dtype = resolve_precision(training.precision, self.device)
        self.max_validation_batches: int | None = None
        self._model = model
        self._train_set = train_set
        self._val_set = val_set if val_set is not None and len(val_set) else None
        self._tokenizer = tokenizer
        self._catalog = list(catalog)
        self._training = training
        self._run_dir = Path(output_dir)
        self._data_info: dict[str, Any] = json.loads(json.dumps(dict(data_info)))
        self._callbacks = list(callbacks)
        self._progress = _Progress()
        self._checkpoint_dir: Path | None = None
        self._speed: deque[tuple[int, int, float]] = deque(maxlen=_SPEED_WINDOW)
        self._differences: tuple[str, ...] = ()

    def train(self, resume: bool = False) -> TrainingSummary:
        """Train to the end, from the start or (with `resume`) from the run's last checkpoint.

        Raises:
            OutputExistsError: the run exists already and `resume` was not asked for.
            ModelFileError: there is no run to resume, or it is damaged.
            ConfigError: the run to resume has another architecture or tokenizer.
            TrainingError: the loss was not finite in ten updates in a row.
            DiskFullError: no room for metrics or a checkpoint; earlier checkpoints are intact.
            Interrupted: SIGINT or SIGTERM; the update was finished and a checkpoint written.
        """
        run = self._open_for_resume() if resume else None
        self._prepare_model()
        if run is None:
            create_run(
                self._run_dir,
                config=self._model.config,
                training=self._training,
                data=self._data_info,
                tokenizer_json=self._tokenizer.to_json(),
                robots_json=catalog_to_json(self._catalog),
            )
        else:
            remove_temporaries(self._run_dir)
            update_run_config(self._run_dir, self._model.config, self._training, self._data_info)
        if run is not None and run.checkpoint_dir is not None:
            self._restore(run.checkpoint_dir)
        else:
            torch.manual_seed(self._training.seed)
        total_steps = self._total_steps()
        self._announce(total_steps)
        with (
            closing(MetricsLog(self._run_dir, self._progress.step)) as metrics,
            _DeferredSignals() as signals,
        ):
            validation = self._loop(total_steps, metrics, signals)
        summary = self._summary(validation, self._draw_curves(metrics.path))
        self._tell("on_end", summary)
        return summary

    # Before the first update --------------------------------------------------------------------

    def _prepare_model(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        model = self._model
        model.to(self.device)
        names = [robot.name for robot in self._catalog]
        if names:
            texts = [self._tokenizer.encode_robot(robot.text()) for robot in self._catalog]
            model.set_robots(names, *pad_rows(texts, self._tokenizer.pad_id))
        weight = robot_positive_weight(self._train_set.tasks, names)
        self._positive_weight_R = weight.to(self.device)
        self._optimizer = make_optimizer(
            model, self._training.learning_rate, self._training.weight_decay
        )
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._scaler = make_grad_scaler(self.device, self.dtype)

    def _open_for_resume(self) -> RunFiles:
        run = open_run(self._run_dir, prefer="last")
        recorded, present = run.config.to_dict(), self._model.config.to_dict()
        different = _differences(recorded, present)
        if different:
            raise ConfigError(
                f"The run {self._run_dir} has another architecture: {'; '.join(different)}.",
                remedy="Resume with the recorded settings, or start a run in another --output_dir.",
            )
        if json.loads(run.tokenizer_json) != json.loads(self._tokenizer.to_json()):
            raise ConfigError(
                f"The tokenizer is not the one that {self._run_dir} was trained with.",
                remedy=f"Resume with --tokenizer {self._run_dir / 'tokenizer.json'}.",
            )
        settings = {
            name: value
            for name, value in self._training.to_dict().items()
            if name not in _FREE_ON_RESUME
        }
        self._differences = (
            *_differences(run.training.to_dict(), settings),
            *_differences(run.data, self._data_info, "data."),
        )
        return run

    def _restore(self, checkpoint_dir: Path) -> None:
        checkpoint = load_checkpoint(checkpoint_dir)
        load_model_tensors(self._model, checkpoint.model, checkpoint_dir)
        load_optimizer_tensors(self._optimizer, self._model, checkpoint.training)
        if self._scaler.is_enabled() and checkpoint.state["scaler"]:
            self._scaler.load_state_dict(checkpoint.state["scaler"])
        self._progress = _Progress(**checkpoint.state["progress"])
        self._checkpoint_dir = checkpoint_dir
        if checkpoint.state["train_samples"] != len(self._train_set):
            self._differences += (
                f"training samples: {checkpoint.state['train_samples']} in the run,"
                f" {len(self._train_set)} now",
            )
        _set_random_state(checkpoint.training)

    def _total_steps(self) -> int:
        """Updates of the whole training, counting those that are made already."""
        if self._training.max_steps is not None:
            return self._training.max_steps
        progress, num_samples = self._progress, len(self._train_set)
        if progress.epoch >= self._training.num_epochs:
            return progress.step
        later_epochs = self._training.num_epochs - progress.epoch - 1
        left = self._updates(max(0, num_samples - progress.samples_seen))
        return progress.step + left + later_epochs * self._updates(num_samples)

    def _updates(self, num_samples: int) -> int:
        batches = math.ceil(num_samples / self._training.batch_size)
        return math.ceil(batches / self._training.grad_accumulation)

    def _announce(self, total_steps: int) -> None:
        precisions = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        self._tell(
            "on_start",
            TrainingStart(
                run_dir=self._run_dir,
                first_step=self._progress.step,
                total_steps=total_steps,
                num_epochs=self._num_epochs(total_steps),
                device=str(self.device),
                precision=precisions[self.dtype],
                num_parameters=sum(p.numel() for p in self._parameters),
                train_samples=len(self._train_set),
                val_samples=0 if self._val_set is None else len(self._val_set),
                differences=self._differences,
            ),
        )
        if self._differences:
            self._tell(
                "on_warning",
                f"Settings differ from the run's: {'; '.join(self._differences)}."
                " The present ones are used.",
            )
        has_captions = len(self._train_set) > len(self._train_set.tasks)
        if has_captions and self._model.config.attention_mode == "bidirectional":
            self._tell(
                "on_warning",
                "In bidirectional mode a position sees the word that it would have to foretell:"
                " captions have no loss. The image encoder learns their words, and the robot"
                " selector its tasks; the model will not write captions.",
            )
        if self._training.warmup_steps >= total_steps:
            self._tell(
                "on_warning",
                f"The warm-up of {self._training.warmup_steps} updates is not over within the"
                f" {total_steps} of this training: the learning rate does not reach its peak"
                " for long. Set a smaller --warmup_steps.",
            )

    def _num_epochs(self, total_steps: int) -> int:
        if self._training.max_steps is None:
            return self._training.num_epochs
        return math.ceil(total_steps / self._updates(len(self._train_set)))

    # The loop -----------------------------------------------------------------------------------

    def _loop(
        self, total_steps: int, metrics: MetricsLog, signals: _DeferredSignals
    ) -> ValidationReport | None:
        training, progress = self._training, self._progress
        validation: ValidationReport | None = None
        self._model.train()
        if progress.step >= total_steps:
            return validation
        num_epochs = self._num_epochs(total_steps)
        started = time.perf_counter()
        with closing(self._groups()) as groups:
            for batches in groups:
                rate = learning_rate_at(
                    progress.step,
                    peak=training.learning_rate,
                    minimum=training.min_learning_rate,
                    warmup_steps=training.warmup_steps,
                    total_steps=total_steps,
                    pretraining_steps=training.word_pretraining_steps,
                )
                epoch = progress.epoch + 1
                images = sum(self._count_images(batch) for batch in batches)
                update = self._update(batches, rate)
                seconds = time.perf_counter() - started
                self._advance(batches, update, images, seconds)
                self._report_step(update, rate, images, epoch, num_epochs, total_steps, metrics)
                if progress.skipped_in_a_row >= _SKIPS_IN_A_ROW:
                    raise self._not_finite()
                is_last = progress.step >= total_steps
                is_best = False
                if (progress.step % training.eval_every == 0 or is_last) and not signals.received:
                    report = self._validate(epoch, signals)
                    if report is not None:
                        validation, is_best = report, report.is_best
                        metrics.write(_metrics("validation", report))
                        self._tell("on_validation", report)
                if not is_last and self._is_out_of_patience():
                    is_last = True
                    self._tell(
                        "on_warning",
                        f"Stopped at step {progress.step} of {total_steps}: the last"
                        f" {progress.validations_since_best} validations were no better than that"
                        f" of step {progress.best_step} (patience {training.patience}).",
                    )
                stop = bool(signals.received) and not is_last
                if is_best or is_last or stop or progress.step % training.save_every == 0:
                    self._save(is_best)
                if stop:
                    raise Interrupted(
                        f"Training was interrupted at step {progress.step} of {total_steps};"
                        f" it is saved in {self._checkpoint_dir}.",
                        remedy=f"Continue it with --resume --output_dir {self._run_dir}.",
                    )
                if is_last:
                    break
                started = time.perf_counter()
        return validation

    def _groups(self) -> Generator[list[Batch], None, None]:
        """The micro-batches of one update after the other, from where the training stands."""
        training = self._training
        while True:
            epoch = self._progress.epoch
            order = epoch_order(len(self._train_set), training.seed, epoch)
            batches = _split(order[self._progress.samples_seen :], training.batch_size)
            self._train_set.set_epoch(epoch)
            loader = iter(self._loader(self._train_set, batches))
            while group := list(itertools.islice(loader, training.grad_accumulation)):
                yield group
            if self._progress.epoch == epoch:  # resumed on a set that is smaller now
                self._progress.epoch, self._progress.samples_seen = epoch + 1, 0

    def _loader(self, samples: TrainingSet, batches: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_sampler=batches,
            collate_fn=samples.collate,
            num_workers=self._training.num_workers,
            pin_memory=self.device.type == "cuda",
            # Its own generator: starting workers must not advance the one of the training.
            generator=torch.Generator(),
            worker_init_fn=_outlive_signals,
        )

    def _update(self, batches: Sequence[Batch], learning_rate: float) -> _Update:
        """One update of the weights from the gradients of all micro-batches."""
        training, optimizer, scaler = self._training, self._optimizer, self._scaler
        counts = {"image_word": sum(count_image_words(batch.word_weights) for batch in batches)}
        words_only = self._is_word_pretraining()
        if not words_only:
            counts["caption"] = sum(count_caption_targets(batch.labels) for batch in batches)
            counts["robot"] = sum(count_robot_labels(batch.robot_labels) for batch in batches)
        weights = {
            "caption": 1.0,
            "robot": training.robot_loss_weight,
            "image_word": training.image_word_weight,
        }
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        totals = {name: torch.zeros((), device=self.device) for name in counts}
        for batch in batches:
            loss = torch.zeros((), device=self.device)
            losses = self._word_losses(batch) if words_only else self._losses(batch)
            for name, loss_sum in losses.items():
                loss = loss + weights[name] * loss_sum / max(1, counts[name])
                totals[name] += loss_sum.detach()
            if loss.requires_grad:
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, training.grad_clip or math.inf)
        # One transfer for all: each one waits for the device.
        *sums, grad_norm = torch.stack(
            [*totals.values(), norm.to(self.device, torch.float32)]
        ).tolist()
        finite_loss = all(math.isfinite(value) for value in sums)
        means = {
            name: value / counts[name] if counts[name] else None
            for name, value in zip(totals, sums, strict=True)
        }
        skipped = not (finite_loss and math.isfinite(grad_norm))
        overflowed = skipped and finite_loss and scaler.is_enabled() and scaler.get_scale() > 1
        if not skipped:
            scaler.step(optimizer)
        scaler.update()
        return _Update(
            loss=means.get("caption"),
            robot_loss=means.get("robot"),
            image_word_loss=means["image_word"],
            grad_norm=grad_norm,
            tokens=counts.get("caption", 0),
            skipped=skipped,
            overflowed=overflowed,
        )

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Each loss that the batch has labels for, summed."""
        output, batch = self._forward(batch, self._training.image_word_weight > 0)
        smoothing = self._training.label_smoothing
        sums = {"caption": caption_loss(output.logits, batch.labels, smoothing)[0]}
        if output.robot_logits is not None:
            sums["robot"], _ = robot_loss(
                output.robot_logits, batch.robot_labels, self._positive_weight_R
            )
        if output.image_words is not None:
            sums["image_word"], _ = image_word_loss(
                output.image_words, batch.word_ids, batch.word_weights
            )
        return sums

    def _is_word_pretraining(self) -> bool:
        return self._progress.step < self._training.word_pretraining_steps

    def _count_images(self, batch: Batch) -> int:
        """How many pictures the coming update encodes."""
        if self._is_word_pretraining():
            return count_image_words(batch.word_weights)
        return int(batch.image_mask.sum())

    def _word_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The image word loss alone, of the rows that have words; no text is read."""
        rows = batch.word_weights.sum(dim=1) > 0
        if batch.images is None or not rows.any():
            return {}
        batch = batch.rows(rows).to(self.device)
        assert batch.images is not None
        config = self._model.config
        images = normalize_images(batch.images, config.image_mean, config.image_std)
        with autocast(self.device, self.dtype):
            scores_BV = self._model.image_words(images)
        loss, _ = image_word_loss(scores_BV, batch.word_ids, batch.word_weights)
        return {"image_word": loss}

    def _forward(self, batch: Batch, with_image_words: bool = False) -> tuple[Any, Batch]:
        has_robot_labels = count_robot_labels(batch.robot_labels) > 0
        # Built before the batch is moved: to look for padding would wait for an accelerator.
        mask = self._model.build_attention_mask(
            batch.attention_mask,
            batch.prefix_lengths,
            batch.image_mask,
            has_images=batch.images is not None,
        )
        batch = batch.to(self.device)
        config = self._model.config
        images = batch.images
        if images is not None:
            images = normalize_images(images, config.image_mean, config.image_std)
        with autocast(self.device, self.dtype):
            output = self._model(
                batch.input_ids,
                images=images,
                attention_mask=mask,
                return_robot_selection=has_robot_labels,
                return_image_words=with_image_words,
            )
        return output, batch

    def _advance(
        self, batches: Sequence[Batch], update: _Update, images: int, seconds: float
    ) -> None:
        progress = self._progress
        progress.step += 1
        progress.samples_seen += sum(len(batch.input_ids) for batch in batches)
        if progress.samples_seen >= len(self._train_set):
            progress.epoch, progress.samples_seen = progress.epoch + 1, 0
        progress.tokens += update.tokens
        progress.images += images
        progress.seconds += seconds
        self._speed.append((update.tokens, images, seconds))
        if update.skipped:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += not update.overflowed
            return
        progress.skipped_in_a_row = 0
        if update.loss is not None:
            progress.loss = update.loss
            if progress.first_loss is None:
                progress.first_loss = update.loss

    def _report_step(
        self,
        update: _Update,
        learning_rate: float,
        images: int,
        epoch: int,
        num_epochs: int,
        total_steps: int,
        metrics: MetricsLog,
    ) -> None:
        tokens, pictures, seconds = (sum(column) for column in zip(*self._speed, strict=True))
        seconds = max(seconds, 1e-9)
        report = StepReport(
            step=self._progress.step,
            total_steps=total_steps,
            epoch=epoch,
            num_epochs=num_epochs,
            loss=update.loss,
            robot_loss=update.robot_loss,
            image_word_loss=update.image_word_loss,
            grad_norm=update.grad_norm,
            learning_rate=learning_rate,
            tokens=update.tokens,
            images=images,
            tokens_per_second=tokens / seconds,
            images_per_second=pictures / seconds,
            seconds_remaining=(total_steps - self._progress.step) * seconds / len(self._speed),
            skipped=update.skipped,
        )
        metrics.write(_metrics("train", report, leave_out=("total_steps", "num_epochs")))
        self._tell("on_step", report)

    def _not_finite(self) -> TrainingError:
        where = (
            f"The last good checkpoint is {self._checkpoint_dir}."
            if self._checkpoint_dir is not None
            else "No checkpoint was written before."
        )
        return TrainingError(
            f"The loss or its gradient was not finite in {_SKIPS_IN_A_ROW} updates in a row,"
            f" up to step {self._progress.step}.",
            remedy=f"{where} Try a smaller --learning_rate, or --precision fp32.",
        )

    # Validation and checkpoints -----------------------------------------------------------------

    def _validate(self, epoch: int, signals: _DeferredSignals) -> ValidationReport | None:
        """Judge the validation set; None without one, or where a signal cuts it short."""
        if self._val_set is None:
            return None
        started = time.perf_counter()
        batches = _split(range(len(self._val_set)), self._training.batch_size)
        batches = batches[: self.max_validation_batches]
        totals = torch.zeros(6, dtype=torch.float64)
        self._model.eval()
        try:
            with torch.no_grad():
                loader = iter(self._loader(self._val_set, batches))
                for done, batch in enumerate(loader, start=1):
                    totals += self._judge(batch)
                    self._tell("on_validation_progress", done, len(batches))
                    if signals.received:
                        return None
        finally:
            self._model.train()
        caption, tokens, robot, labels, matches, tasks = totals.tolist()
        loss = caption / tokens if tokens else None
        robot_part = robot / labels if labels else None
        score = (loss or 0.0) + self._training.robot_loss_weight * (robot_part or 0.0)
        progress = self._progress
        is_judged = loss is not None or robot_part is not None
        is_best = (
            is_judged
            and math.isfinite(score)
            and (progress.best_loss is None or score < progress.best_loss)
        )
        if is_best:
            progress.best_loss, progress.best_step = score, progress.step
            progress.validations_since_best = 0
        elif is_judged:
            progress.validations_since_best += 1
        return ValidationReport(
            step=progress.step,
            epoch=epoch,
            loss=loss,
            robot_loss=robot_part,
            robot_exact_match=matches / tasks if tasks else None,
            is_best=is_best,
            seconds=time.perf_counter() - started,
        )

    def _is_out_of_patience(self) -> bool:
        """Whether to stop at this step; a resumed run gets at least to its next validation."""
        patience = self._training.patience
        return (
            patience > 0
            and self._progress.step % self._training.eval_every == 0
            and self._progress.validations_since_best >= patience
        )

    def _judge(self, batch: Batch) -> torch.Tensor:
        """Caption loss and tokens, robot loss and labels, exact matches and tasks: float64 [6]."""
        output, batch = self._forward(batch)
        figures = list(caption_loss(output.logits, batch.labels))
        if output.robot_logits is None:
            figures += [torch.zeros((), device=self.device)] * 4
        else:
            labels = batch.robot_labels
            figures += robot_loss(output.robot_logits, labels, self._positive_weight_R)
            figures += count_exact_matches(output.robot_logits, labels)
        return torch.stack([figure.double() for figure in figures]).cpu()

    def _save(self, is_best: bool) -> None:
        self._checkpoint_dir = save_checkpoint(
            self._run_dir,
            self._progress.step,
            model=self._model.state_dict(),
            training={**optimizer_tensors(self._optimizer, self._model), **_random_state()},
            state={
                "progress": dataclasses.asdict(self._progress),
                "train_samples": len(self._train_set),
                "scaler": self._scaler.state_dict(),
            },
            is_best=is_best,
            keep=self._training.keep_checkpoints,
        )
        self._tell("on_checkpoint", self._checkpoint_dir, self._progress.step, is_best)

    # After the last update ----------------------------------------------------------------------

    def _draw_curves(self, metrics_path: Path) -> Path | None:
        output = self._run_dir / CURVES_FILE
        try:
            draw_curves(metrics_path, output)
        except ImportError:
            self._tell(
                "on_warning", f"Without matplotlib no {CURVES_FILE} is drawn: install matplotlib."
            )
            return None
        return output

    def _summary(self, validation: ValidationReport | None, curves: Path | None) -> TrainingSummary:
        progress = self._progress
        assert self._checkpoint_dir is not None  # the last update always saves
        seconds = max(progress.seconds, 1e-9)
        return TrainingSummary(
            run_dir=self._run_dir,
            checkpoint_dir=self._checkpoint_dir,
            steps=progress.step,
            epochs=progress.epoch + progress.samples_seen / len(self._train_set),
            first_loss=progress.first_loss,
            loss=progress.loss,
            validation=validation,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            skipped_steps=progress.skipped_steps,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / seconds,
            images_per_second=progress.images / seconds,
            curves=curves,
            differences=self._differences,
        )

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*arguments)


# Helpers ----------------------------------------------------------------------------------------


def _differences(
    recorded: Mapping[str, Any], present: Mapping[str, Any], prefix: str = ""
) -> tuple[str, ...]:
    """What differs, of the fields that `present` has."""
    plain = json.loads(json.dumps([dict(recorded), dict(present)]))
    return tuple(
        f"{prefix}{name} is {plain[0].get(name)!r} in the run, {value!r} now"
        for name, value in plain[1].items()
        if plain[0].get(name) != value
    )


def _metrics(
    kind: str, report: StepReport | ValidationReport, leave_out: Sequence[str] = ()
) -> dict[str, Any]:
    values = dataclasses.asdict(report).items()
    return {"kind": kind, **{name: value for name, value in values if name not in leave_out}}


def _random_state() -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"random.cuda.{index}"] = state
    return states


def _set_random_state(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"random.cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"random.cuda.{index}"], index)


def _outlive_signals(worker: int) -> None:
    """Make a loading process leave the signals of its process group to the training one.

    A second SIGTERM ends it, so that it can never keep the program from exiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_next_signal)


def _end_at_next_signal(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


class _DeferredSignals:
    """Remembers SIGINT and SIGTERM until the loop can act on them; a second one acts at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _DeferredSignals:
        # Python delivers signals to the main thread only; elsewhere the caller stays in charge.
        if threading.current_thread() is threading.main_thread():
            for number in self._SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
