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
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitgen.config import TrainingConfig
from bitgen.dataset.collate import Batch, pad_rows
from bitgen.dataset.robots import Robot, catalog_to_json
from bitgen.dataset.task_words import TaskWords
from bitgen.errors import ConfigError, DatasetError, Interrupted, TrainingError
from bitgen.model.device import resolve_device
from bitgen.training.allocator import keep_freed_memory
from bitgen.training.amp import make_grad_scaler, resolve_precision
from bitgen.training.caption_judge import CaptionJudge
from bitgen.training.checkpoint import (
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    Checkpoint,
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
from bitgen.training.data_order import micro_batches, remaining_updates
from bitgen.training.distributed import (
    World,
    average_buffers,
    replicated,
    shard,
    synchronized,
    whole,
)
from bitgen.training.events import (
    StepReport,
    TrainerCallback,
    TrainingStart,
    TrainingSummary,
    ValidationReport,
    WeightReport,
)
from bitgen.training.gradients import GradientBuffers
from bitgen.training.interrupts import DeferredSignals
from bitgen.training.loader import BatchLoader
from bitgen.training.losses import count_image_words, expert_load
from bitgen.training.objective import FIGURES, Objective
from bitgen.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rates,
)
from bitgen.training.robot_calibration import RobotCalibration, calibrate_robots
from bitgen.training.schedule import learning_rate_at, weight_decay_at
from bitgen.training.self_critical import SampledCaptions, SelfCritic
from bitgen.training.task_words import fit_task_words
from bitgen.training.weight_statistics import TernaryStatistics

if TYPE_CHECKING:
    from bitgen.dataset.samples import TrainingSet
    from bitgen.dataset.tokenizer import Tokenizer
    from bitgen.model.bitgen import BitGenModel

CURVES_FILE = "curves.png"

_SKIPS_IN_A_ROW = 10  # updates whose loss cannot be trusted before training gives up
_SPEED_WINDOW = 20  # updates over which speed and remaining time are averaged

# An update explodes where its loss is that of guessing so many times over, or its gradient's norm
# so many times the usual one, once so many updates have shown what is usual.
_EXPLODED_LOSS = 5.0
_EXPLODED_GRADIENT = 100.0
_USUAL_AFTER = 20
_USUAL_MOMENTUM = 0.1

# Settings that a resumed run may change without its result being another experiment's.
_FREE_ON_RESUME = frozenset(
    (
        "num_epochs", "max_steps", "num_workers", "save_every", "eval_every", "patience",
        "keep_checkpoints", "weights_every", "parallel", "activation_checkpointing",
        "compile", "best_by", "cider_images",
    )
)  # fmt: skip


# State --------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """Where a training stands: with the tensors, all that resuming needs."""

    step: int = 0
    epoch: int = 0  # from 0
    samples_seen: int = 0  # of this epoch
    stretches: list[list[int]] = dataclasses.field(default_factory=list)  # samples an update, seen
    tokens: int = 0
    images: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    loss: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    best_cider: float | None = None
    robot_threshold: float | None = None  # the best ones at the last validation
    robot_temperature: float | None = None
    robot_word_weight: float | None = None
    validations_since_best: int = 0
    validation_pending: bool = False  # a signal came before this step's validation was done
    usual_log_norm: float = 0.0  # running mean of the logarithm of the gradient norm
    usual_log_norm_steps: int = 0  # over how many updates


@dataclass(frozen=True)
class _Group:
    batches: list[Batch]  # micro-batches of this process
    num_own: int  # of them, those that come first; the others are for company, without labels
    num_samples: int  # of all processes


@dataclass(frozen=True)
class _Update:
    losses: Mapping[str, float]  # by name, each divided by its count
    expert_load: list[list[float]] | None
    grad_norm: float
    tokens: int
    text_positions: int
    padded_positions: int
    images: int
    skipped: str | None
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
        world: World | None = None,
        validate_first: bool = False,
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
            callbacks: hear of every event, in this order; in the first process alone.
            world: the processes that share the training; None: this one alone.
            validate_first: judge and save a new run before its first update too: what it starts
                from may be the best.

        Raises:
            DatasetError: the training set is empty.
            ConfigError: a device or precision that this machine does not have, nothing that has a
                loss, or captions to be written by a model that lies in pieces.
        """
        if len(train_set) == 0:
            raise DatasetError(
                "The training set is empty: there is nothing to learn from.",
                remedy="Give a data set that holds captions or robot tasks.",
            )
        if not (train_set.texts_have_loss or train_set.tasks or training.image_word_weight):
            raise ConfigError(
                "There is nothing to learn: in bidirectional mode captions have no loss, there are"
                " no robot tasks, and image_word_weight is 0.",
                remedy="Take --objective mlm or --attention_mode prefix, or give --robot_data.",
            )
        self._world = world or World()
        if self.is_sharded_by(training) and (
            training.objective == "self_critical" or training.judges_by_cider
        ):
            raise ConfigError(
                "While it trains by --parallel fsdp a model lies in pieces on several processes,"
                " and cannot write captions: neither for self_critical nor for best_by cider.",
                remedy="Take --parallel ddp, or for other objectives --best_by loss.",
            )
        self.device = self._world.device(resolve_device(training.device))
        self.dtype = resolve_precision(training.precision, self.device)
        self.max_validation_batches: int | None = None
        self._model = model
        self._train_set = train_set
        self._val_set = val_set if val_set is not None and len(val_set) else None
        self._validate_first = validate_first
        self._judge: CaptionJudge | None = None
        if self._val_set is not None and self._val_set.images and training.judges_by_cider:
            self._judge = CaptionJudge(tokenizer, self._val_set.images, training)
        options = (training.num_workers, self.device.type == "cuda")
        self._train_loader = BatchLoader(train_set, *options)
        self._val_loader = BatchLoader(self._val_set or train_set, *options)
        self._tokenizer = tokenizer
        self._catalog = list(catalog)
        self._run_dir = Path(output_dir)
        self._data_info: dict[str, Any] = json.loads(json.dumps(dict(data_info)))
        self._callbacks = list(callbacks) if self._world.is_main else []
        self._progress = _Progress()
        self._training = training
        # Without captioned pictures there are no words to learn.
        self._word_steps = training.count_word_pretraining(
            self._total_steps() if train_set.images else 0
        )
        self._training = dataclasses.replace(training, word_pretraining_steps=self._word_steps)
        self._checkpoint_dir: Path | None = None
        self._speed: deque[tuple[int, int, float]] = deque(maxlen=_SPEED_WINDOW)
        self._differences: tuple[str, ...] = ()

    @property
    def model(self) -> BitGenModel:
        """What is trained."""
        return self._model

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds pieces of the weights only."""
        return self.is_sharded_by(self._training)

    def is_sharded_by(self, training: TrainingConfig) -> bool:
        """Whether each process would hold pieces of the weights only."""
        return self._world.size > 1 and training.parallel == "fsdp"

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that made the sets."""
        return self._tokenizer

    @property
    def validation_set(self) -> TrainingSet | None:
        """What is validated on; None where nothing is."""
        return self._val_set

    def add_callback(self, callback: TrainerCallback) -> None:
        """Let it hear of every event, after the others."""
        if self._world.is_main:
            self._callbacks.append(callback)

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
        began = time.perf_counter()
        run = self._open_for_resume() if resume else None
        checkpoint_dir = None if run is None else run.checkpoint_dir
        self._world.wait()  # nobody writes before everybody has read
        if self._world.is_main:
            self._write_run(is_new=run is None)
        self._prepare_model(checkpoint_dir)
        total_steps = self._total_steps()
        start = self._announce(total_steps)
        with ExitStack() as stack:
            metrics = None
            if self._world.is_main:
                metrics = stack.enter_context(
                    closing(MetricsLog(self._run_dir, self._last_recorded_step()))
                )
            signals = stack.enter_context(DeferredSignals())
            for loader in (self._train_loader, self._val_loader):
                stack.callback(loader.close)
            validation = self._loop(total_steps, metrics, signals)
        self._set_robots()
        summary = self._summary(start, began, validation, self._draw_curves())
        self._tell("on_end", summary)
        self._world.wait()
        return summary

    def _last_recorded_step(self) -> int:
        return -1 if self._checkpoint_dir is None else self._progress.step

    # Before the first update --------------------------------------------------------------------

    def _write_run(self, is_new: bool) -> None:
        if is_new:
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

    def _prepare_model(self, checkpoint_dir: Path | None) -> None:
        """Model, losses and optimizer on the device, as the checkpoint has them."""
        if self.device.type == "cpu":
            keep_freed_memory()
        training, model, world = self._training, self._model, self._world
        checkpoint = None if checkpoint_dir is None else load_checkpoint(checkpoint_dir)
        if checkpoint is not None:
            load_model_tensors(model, checkpoint.model, checkpoint.path)
        model.to(self.device)
        model.set_activation_checkpointing(training.activation_checkpointing)
        model.set_norm_batch(training.norm_batch)
        if training.compile:
            model.compile_layers()
        self._set_robots()
        selector = model.robot_selector
        names, tasks = [robot.name for robot in self._catalog], self._train_set.tasks
        # Other weights than a fresh model's have learnt how often each robot suits.
        is_fresh = checkpoint is None and not selector.robot_bias.any()
        if is_fresh and tasks and names == list(selector.robot_names):
            shares = [sum(name in task.robots for task in tasks) / len(tasks) for name in names]
            with torch.no_grad():
                selector.start_from_shares(shares, model.eval().encode_robots())
        if checkpoint is None and tasks and model.config.robot_sets:
            words = fit_task_words(
                tasks,
                model.config.robot_names,
                model.config.robot_sets,
                model.config.task_word_bins,
            )
            fitted = {name: torch.from_numpy(array) for name, array in words.tensors().items()}
            model.load_state_dict(fitted, strict=False)
        if checkpoint is None and model.config.caption_idf and self._train_set.images:
            model.caption_idf.copy_(torch.from_numpy(self._train_set.caption_idf()))
        self._objective = Objective(
            model,
            training,
            self.device,
            self.dtype,
            world.size,
            self.is_sharded,
            self._critic(),
        )
        self._shared_objective: torch.nn.Module = self._objective
        if self.is_sharded:
            shard(self._objective, model.text_decoder.layers, ["judge"], self.device)
        elif world.size > 1:
            self._shared_objective = replicated(self._objective, self.device)
        self._optimizer = make_optimizer(
            model, training.learning_rate, training.weight_decay, training.encoder_learning_rate
        )
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        # Of several processes, the library that adds gradients up owns their memory.
        self._gradients = GradientBuffers(self._parameters, allocate=world.size == 1)
        self._scaler = make_grad_scaler(self.device, self.dtype)
        self._weights = TernaryStatistics(model)
        torch.manual_seed(training.seed + world.rank)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self._validate_first:
            self._progress.validation_pending = self._val_set is not None

    def _critic(self) -> SelfCritic | None:
        if self._training.objective != "self_critical":
            return None
        references = [image.captions for image in self._train_set.images]
        return SelfCritic(self._tokenizer, references, self._training)

    def _set_robots(self, step: int | None = None) -> None:
        """Give the model the catalog's texts; those of an update, given its step, are varied."""
        if not self._catalog:
            return
        dropout = self._training.robot_phrase_dropout
        if step is None or not dropout:
            texts = [robot.text() for robot in self._catalog]
        else:
            # By the seed and the step alone: alike in all processes, and where a run is resumed.
            random = np.random.default_rng((self._training.seed, step))
            texts = [robot.varied_text(random, dropout) for robot in self._catalog]
        rows = [self._tokenizer.encode_robot(text) for text in texts]
        names = [robot.name for robot in self._catalog]
        self._model.set_robots(names, *pad_rows(rows, self._tokenizer.pad_id))

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

    def _restore(self, checkpoint: Checkpoint) -> None:
        load_optimizer_tensors(self._optimizer, self._model, checkpoint.training)
        if self._scaler.is_enabled() and checkpoint.state["scaler"]:
            self._scaler.load_state_dict(checkpoint.state["scaler"])
        self._progress = _Progress(**checkpoint.state["progress"])
        self._checkpoint_dir = checkpoint.path
        if checkpoint.state["train_samples"] != len(self._train_set):
            self._differences += (
                f"training samples: {checkpoint.state['train_samples']} in the run,"
                f" {len(self._train_set)} now",
            )
        _set_random_state(checkpoint.training, self._world.rank)

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
        return math.ceil(num_samples / self._samples_per_update())

    def _samples_per_update(self) -> int:
        """Of all processes together."""
        training = self._training
        return training.batch_size * training.grad_accumulation * self._world.size

    def _announce(self, total_steps: int) -> TrainingStart:
        precisions = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        start = TrainingStart(
            run_dir=self._run_dir,
            first_step=self._progress.step,
            total_steps=total_steps,
            word_pretraining_steps=self._word_steps,
            num_epochs=self._num_epochs(total_steps),
            device=str(self.device),
            num_processes=self._world.size,
            precision=precisions[self.dtype],
            num_parameters=sum(p.numel() for p in self._parameters),
            train_samples=len(self._train_set),
            val_samples=0 if self._val_set is None else len(self._val_set),
            differences=self._differences,
        )
        self._tell("on_start", start)
        if self._differences:
            self._tell(
                "on_warning",
                f"Settings differ from the run's: {'; '.join(self._differences)}."
                " The present ones are used.",
            )
        if self._train_set.images and not self._train_set.captions_have_loss:
            self._tell(
                "on_warning",
                "In bidirectional mode a position sees the word that it would have to foretell:"
                " captions have no loss. The image encoder learns their words, and the robot"
                " selector its tasks; the model will not write captions. --objective mlm trains on"
                " their hidden words.",
            )
        self._warn_of_long_warmup(total_steps)
        return start

    def _warn_of_long_warmup(self, total_steps: int) -> None:
        """Each part of a training has a warm-up of its own."""
        words, warmup = self._word_steps, self._training.warmup_steps
        parts = {"this training": total_steps}
        if words:
            parts = {"word pretraining": words, "what follows": total_steps - words}
        short = [f"the {count} of {part}" for part, count in parts.items() if 0 < count <= warmup]
        if short:
            self._tell(
                "on_warning",
                f"The warm-up of {warmup} updates is not over within {' and '.join(short)}: the"
                " learning rate does not reach its peak for long. Set a smaller --warmup_steps.",
            )

    def _num_epochs(self, total_steps: int) -> int:
        if self._training.max_steps is None:
            return self._training.num_epochs
        return math.ceil(total_steps / self._updates(len(self._train_set)))

    # The loop -----------------------------------------------------------------------------------

    def _loop(
        self, total_steps: int, metrics: MetricsLog | None, signals: DeferredSignals
    ) -> ValidationReport | None:
        training, progress = self._training, self._progress
        validation: ValidationReport | None = None
        self._model.train()
        if progress.validation_pending:
            validation = self._validate(metrics, signals)
            self._save(validation is not None and validation.is_best)
            if self._stops_for(signals):
                raise self._interrupted(total_steps)
        if progress.step >= total_steps:
            return validation
        num_epochs = self._num_epochs(total_steps)
        started = time.perf_counter()
        with closing(self._groups()) as groups:
            for group in groups:
                epoch = progress.epoch + 1
                rate, decay = self._rates(total_steps)
                counts_weights = self._counts_weights()
                if counts_weights:
                    self._weights.remember()
                update = self._update(group, rate, decay)
                self._advance(update, group.num_samples, time.perf_counter() - started)
                report = self._step_report(update, rate, decay, epoch, num_epochs, total_steps)
                if metrics is not None:
                    metrics.write(_step_metrics(report))
                self._tell("on_step", report)
                if counts_weights:
                    self._report_weights(metrics)
                if progress.skipped_in_a_row >= _SKIPS_IN_A_ROW:
                    raise self._not_to_be_trusted(update)
                is_last = progress.step >= total_steps
                stops = self._stops_for(signals)
                is_best = False
                if progress.step % training.eval_every == 0 or is_last:
                    progress.validation_pending = self._val_set is not None
                    if not stops:
                        judged = self._validate(metrics, signals)
                        if judged is not None:
                            validation, is_best = judged, judged.is_best
                        stops = self._stops_for(signals)
                if not is_last and self._is_out_of_patience():
                    is_last = True
                    self._tell(
                        "on_warning",
                        f"Stopped at step {progress.step} of {total_steps}: the last"
                        f" {progress.validations_since_best} validations were no better than that"
                        f" of step {progress.best_step} (patience {training.patience}).",
                    )
                if is_best or is_last or stops or progress.step % training.save_every == 0:
                    self._save(is_best)
                if is_last:
                    break
                if stops:
                    raise self._interrupted(total_steps)
                started = time.perf_counter()
        return validation

    def _rates(self, total_steps: int) -> tuple[float, float]:
        """Learning rate and weight decay of the coming update."""
        training, step = self._training, self._progress.step
        rate = learning_rate_at(
            step,
            peak=training.learning_rate,
            minimum=training.min_learning_rate,
            warmup_steps=training.warmup_steps,
            total_steps=total_steps,
            pretraining_steps=self._word_steps,
            schedule=training.schedule,
        )
        decay = weight_decay_at(
            step,
            peak=training.weight_decay,
            total_steps=total_steps,
            pretraining_steps=self._word_steps,
            schedule=training.schedule,
        )
        return rate, decay

    def _stops_for(self, signals: DeferredSignals) -> bool:
        """Whether any of the processes was told to stop."""
        return bool(self._world.sum(torch.tensor([float(signals.received)])).item())

    def _interrupted(self, total_steps: int) -> Interrupted:
        return Interrupted(
            f"Training was interrupted at step {self._progress.step} of {total_steps};"
            f" it is saved in {self._checkpoint_dir}.",
            remedy=f"Continue it with --resume --output_dir {self._run_dir}.",
        )

    def _groups(self) -> Generator[_Group, None, None]:
        """What one update after the other learns from, from where the training stands."""
        training, world, progress = self._training, self._world, self._progress
        while True:
            epoch = progress.epoch
            updates = remaining_updates(
                len(self._train_set),
                self._stretches(),
                training.seed,
                epoch,
                self._train_set.lengths(epoch) if training.length_buckets else None,
            )
            shares = [
                micro_batches(update, training.batch_size, world.rank, world.size)
                for update in updates
            ]
            # With nothing left for it, a process computes a sample for company, without labels.
            indices = [
                own or update[:1]
                for update, share in zip(updates, shares, strict=True)
                for own in share
            ]
            loaded = self._train_loader.load(indices, epoch)
            for update, share in zip(updates, shares, strict=True):
                batches = list(itertools.islice(loaded, len(share)))
                yield _Group(
                    [
                        batch if own else batch.without_labels()
                        for own, batch in zip(share, batches, strict=True)
                    ],
                    num_own=sum(map(bool, share)),
                    num_samples=len(update),
                )
            if progress.epoch == epoch:  # resumed on a set that is smaller now
                self._begin_epoch()

    def _stretches(self) -> list[tuple[int, int]]:
        """Samples an update, and samples seen so, of this epoch; the last one is going on."""
        size = self._samples_per_update()
        stretches = [(size_then, seen) for size_then, seen in self._progress.stretches]
        if not stretches:  # nothing seen yet, or so by a version that kept no stretches
            return [(size, self._progress.samples_seen)]
        if stretches[-1][0] == size:
            return stretches
        return [*stretches, (size, 0)]

    def _begin_epoch(self) -> None:
        progress = self._progress
        progress.epoch, progress.samples_seen, progress.stretches = progress.epoch + 1, 0, []

    def _update(self, group: _Group, learning_rate: float, weight_decay: float) -> _Update:
        """One update of the weights from the gradients of all micro-batches of all processes."""
        world, scaler, optimizer = self._world, self._scaler, self._optimizer
        words_only = self._is_word_pretraining()
        own = group.batches[: group.num_own]
        sampled = [None if words_only else self._objective.sample(batch) for batch in own]
        own_counts = {
            **self._objective.counts(own, words_only, sampled),
            "images": sum(self._count_images(batch) for batch in own),
            "positions": sum(batch.attention_mask.numel() for batch in own),
            "padding": sum(int((~batch.attention_mask).sum()) for batch in own),
        }
        summed = world.sum(torch.tensor(list(own_counts.values()), dtype=torch.float64))
        counts = {name: int(n) for name, n in zip(own_counts, summed.tolist(), strict=True)}
        set_rates(optimizer, learning_rate, weight_decay)
        self._set_robots(self._progress.step)
        self._gradients.zero()
        totals, chosen_NE = self._add_gradients(group, sampled, counts, words_only)
        world.sum(self._gradients.reached)
        with self._gradients.only_reached():
            scaler.unscale_(optimizer)
            norm = whole(
                torch.nn.utils.clip_grad_norm_(
                    self._parameters, self._training.grad_clip or math.inf
                )
            )
            # One transfer for all: each one waits for the device.
            *own_sums, grad_norm = (
                torch.stack([*totals.values(), norm.to(self.device, torch.float32)]).cpu().double()
            ).tolist()
            sums = world.sum(torch.tensor(own_sums, dtype=torch.float64)).tolist()
            losses = {
                name: value / counts[name]
                for name, value in zip(totals, sums, strict=True)
                if counts[name]
            }
            is_finite = all(math.isfinite(value) for value in sums)
            skipped = self._why_skipped(losses, is_finite, grad_norm)
            if skipped is None:
                scaler.step(optimizer)
        overflowed = (
            is_finite
            and not math.isfinite(grad_norm)
            and scaler.is_enabled()
            and scaler.get_scale() > 1
        )
        scaler.update()
        return _Update(
            losses=losses,
            expert_load=None if chosen_NE is None else expert_load(world.sum(chosen_NE.cpu())),
            grad_norm=grad_norm,
            tokens=counts.get("caption", 0) + counts.get("sampled_tokens", 0),
            text_positions=counts["positions"],
            padded_positions=counts["padding"],
            images=counts["images"],
            skipped=skipped,
            overflowed=overflowed,
        )

    def _add_gradients(
        self,
        group: _Group,
        sampled: Sequence[SampledCaptions | None],
        counts: Mapping[str, int],
        words_only: bool,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Run all micro-batches forward and backward.

        Returns the sum of each loss and how often each expert was chosen, on the device.
        """
        size = self._world.size
        names = [name for name in self._objective.weights if name in counts]
        totals = {name: torch.zeros((), device=self.device) for name in names}
        chosen_NE: torch.Tensor | None = None
        # No captions are drawn for batches that are computed for company.
        of_all = itertools.zip_longest(group.batches, sampled)
        for index, (batch, captions) in enumerate(of_all):
            if index == group.num_own:
                self._model.eval()  # what is computed for company leaves running statistics alone
            is_last = index == len(group.batches) - 1
            with synchronized(self._shared_objective, enabled=is_last):
                found = self._shared_objective(batch, words_only, captions)
                for name in totals.keys() & found.sums.keys():
                    totals[name] += found.sums[name].detach()
                loss = self._objective.total(found.sums, counts)
                if loss.requires_grad:
                    # The mean over processes, which the libraries take, of what is to be a sum.
                    self._scaler.scale(loss * size if size > 1 else loss).backward()
            if found.chosen_NE is not None:
                # Never None with experts: all processes add theirs up, also one without samples.
                own_NE = found.chosen_NE * (index < group.num_own)
                chosen_NE = own_NE if chosen_NE is None else chosen_NE + own_NE
        self._model.train()
        return totals, chosen_NE

    def _why_skipped(
        self, losses: Mapping[str, float], is_finite: bool, grad_norm: float
    ) -> str | None:
        """Why the weights should stay as they are; None where all is well."""
        if not (is_finite and math.isfinite(grad_norm)):
            return "loss or gradients not finite"
        guessing = math.log(self._model.config.vocab_size)
        if losses.get("caption", 0.0) > _EXPLODED_LOSS * guessing:
            return f"loss {losses['caption']:.3g} exploded (guessing costs {guessing:.3g})"
        progress = self._progress
        usual = math.exp(progress.usual_log_norm)
        if progress.usual_log_norm_steps >= _USUAL_AFTER and grad_norm > _EXPLODED_GRADIENT * usual:
            return f"gradient norm {grad_norm:.3g} exploded (usually {usual:.3g})"
        return None

    def _is_word_pretraining(self) -> bool:
        return self._progress.step < self._word_steps

    def _count_images(self, batch: Batch) -> int:
        """How many pictures the coming update encodes."""
        if self._is_word_pretraining():
            return count_image_words(batch.word_weights)
        return int(batch.image_mask.sum())

    def _advance(self, update: _Update, num_samples: int, seconds: float) -> None:
        progress = self._progress
        was_word_pretraining = self._is_word_pretraining()
        progress.step += 1
        *earlier, (size, seen) = self._stretches()
        progress.samples_seen += num_samples
        progress.stretches = [list(stretch) for stretch in (*earlier, (size, seen + num_samples))]
        if progress.samples_seen >= len(self._train_set):
            self._begin_epoch()
        progress.tokens += update.tokens
        progress.images += update.images
        progress.seconds += seconds
        self._speed.append((update.tokens, update.images, seconds))
        if update.skipped is not None:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += not update.overflowed
            return
        progress.skipped_in_a_row = 0
        if update.grad_norm > 0:  # an update without anything to learn from says nothing of others
            progress.usual_log_norm_steps += 1
            momentum = max(_USUAL_MOMENTUM, 1 / progress.usual_log_norm_steps)
            logarithm = math.log(update.grad_norm)
            progress.usual_log_norm += momentum * (logarithm - progress.usual_log_norm)
        if was_word_pretraining and not self._is_word_pretraining():
            progress.usual_log_norm_steps = 0  # other losses have other gradients
        loss = update.losses.get("caption")
        if loss is not None:
            progress.loss = loss
            if progress.first_loss is None:
                progress.first_loss = loss

    def _step_report(
        self,
        update: _Update,
        learning_rate: float,
        weight_decay: float,
        epoch: int,
        num_epochs: int,
        total_steps: int,
    ) -> StepReport:
        tokens, pictures, seconds = (sum(column) for column in zip(*self._speed, strict=True))
        seconds = max(seconds, 1e-9)
        losses = dict(update.losses)
        return StepReport(
            step=self._progress.step,
            total_steps=total_steps,
            epoch=epoch,
            num_epochs=num_epochs,
            loss=losses.pop("caption", None),
            robot_loss=losses.pop("robot", None),
            image_word_loss=losses.pop("image_word", None),
            reward=losses.pop("reward", None),
            other_losses=losses,
            expert_load=update.expert_load,
            grad_norm=update.grad_norm,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            tokens=update.tokens,
            images=update.images,
            padding_share=update.padded_positions / max(1, update.text_positions),
            tokens_per_second=tokens / seconds,
            images_per_second=pictures / seconds,
            seconds_remaining=(total_steps - self._progress.step) * seconds / len(self._speed),
            skipped=update.skipped,
        )

    def _counts_weights(self) -> bool:
        """Whether the ternary weights are counted before and after the coming update."""
        every = self._training.weights_every
        return (
            every > 0 and self._weights.num_weights > 0 and (self._progress.step + 1) % every == 0
        )

    def _report_weights(self, metrics: MetricsLog | None) -> None:
        flips, shares = self._weights.flips(), self._weights.shares()
        report = WeightReport(
            step=self._progress.step,
            flips=flips,
            flip_share=flips / self._weights.num_weights,
            shares=shares,
            total_shares=self._weights.total(shares),
        )
        if metrics is not None:
            metrics.write(_metrics("weights", report))
        self._tell("on_weights", report)

    def _not_to_be_trusted(self, update: _Update) -> TrainingError:
        where = (
            f"The last good checkpoint is {self._checkpoint_dir}."
            if self._checkpoint_dir is not None
            else "No checkpoint was written before."
        )
        return TrainingError(
            f"{_SKIPS_IN_A_ROW} updates in a row were skipped, up to step {self._progress.step};"
            f" the last one: {update.skipped}.",
            remedy=f"{where} Try a smaller --learning_rate, or --precision fp32.",
        )

    # Validation and checkpoints -----------------------------------------------------------------

    def _validate(
        self, metrics: MetricsLog | None, signals: DeferredSignals
    ) -> ValidationReport | None:
        """Judge the validation set; None without one, or where a signal cuts it short."""
        if self._val_set is None:
            return None
        started = time.perf_counter()
        progress, world = self._progress, self._world
        average_buffers(self._model, world)
        batches = micro_batches(range(len(self._val_set)), self._training.batch_size, 0, 1)
        batches = batches[: self.max_validation_batches]
        share = batches[world.rank :: world.size]
        to_caption = [] if self._judge is None else self._judge.batches(self._training.batch_size)
        to_caption = to_caption[: self.max_validation_batches]
        own_to_caption = to_caption[world.rank :: world.size]
        # As many in each process: where one has nothing left, it computes for company.
        most = math.ceil(len(batches) / world.size)
        indices = share + [batches[0][:1]] * (most - len(share))
        totals = torch.zeros(len(FIGURES), dtype=torch.float64)
        # Of each task the robots' logits, and whether it was judged.
        tasks_NR = torch.zeros(
            len(self._val_set.tasks), len(self._catalog) + 1, dtype=torch.float64
        )
        self._set_robots()
        ciders = torch.zeros(2, dtype=torch.float64)  # their sum, and how many
        self._model.eval()
        try:
            for done, batch in enumerate(self._val_loader.load(indices, 0), start=1):
                judged = self._objective.judge(batch)
                if done <= len(share):
                    totals += judged.figures
                    self._note_robots(tasks_NR, share[done - 1], judged.robot_logits)
                self._tell("on_validation_progress", done, most + len(own_to_caption))
                if signals.received and world.size == 1:
                    return None
            loaded = self._val_loader.load(own_to_caption, 0)
            for done, batch in enumerate(loaded, start=most + 1):
                assert self._judge is not None
                ciders += self._objective.judge_captions(self._judge, batch)
                self._tell("on_validation_progress", done, most + len(own_to_caption))
                if signals.received and world.size == 1:
                    return None
        finally:
            self._model.train()
        figures = dict(zip(FIGURES, world.sum(totals).tolist(), strict=True))
        progress.validation_pending = False
        loss = figures["caption"] / figures["tokens"] if figures["tokens"] else None
        robot_loss = figures["robot"] / figures["labels"] if figures["labels"] else None
        plan_loss = figures["plan"] / figures["plan_tokens"] if figures["plan_tokens"] else None
        # Beside captions, a few plans must not say which checkpoint is the best.
        text_loss = plan_loss if loss is None else loss
        score = (text_loss or 0.0) + self._training.robot_loss_weight * (robot_loss or 0.0)
        cider_sum, num_captioned = world.sum(ciders).tolist()
        cider = cider_sum / num_captioned if num_captioned else None
        calibration = self._calibrate(world.sum(tasks_NR).numpy())
        if calibration is not None:
            progress.robot_temperature = calibration.temperature
            progress.robot_word_weight = calibration.word_weight
            progress.robot_threshold = calibration.threshold
        is_judged = text_loss is not None or robot_loss is not None
        if cider is not None:
            is_better = progress.best_cider is None or cider > progress.best_cider
        else:
            is_better = progress.best_loss is None or score < progress.best_loss
        is_best = is_judged and math.isfinite(score) and is_better
        if is_best:
            progress.best_loss, progress.best_step = score, progress.step
            progress.best_cider = cider
            progress.validations_since_best = 0
        elif is_judged and progress.step > self._word_steps:  # before, captions are not learnt
            progress.validations_since_best += 1
        report = ValidationReport(
            step=progress.step,
            epoch=progress.epoch + (progress.samples_seen > 0),
            loss=loss,
            plan_loss=plan_loss,
            robot_loss=robot_loss,
            robot_exact_match=calibration.exact_match if calibration else None,
            robot_threshold=calibration.threshold if calibration else None,
            robot_temperature=calibration.temperature if calibration else None,
            robot_word_weight=calibration.word_weight if calibration else None,
            cider=cider,
            is_best=is_best,
            seconds=time.perf_counter() - started,
        )
        if metrics is not None:
            metrics.write(_metrics("validation", report))
        self._tell("on_validation", report)
        return report

    def _task_words(self) -> TaskWords | None:
        """The linear model of tasks' words that goes with the weights."""
        buffers = self._model.robot_selector.named_buffers(prefix="robot_selector")
        tensors = {name: buffer.cpu().numpy() for name, buffer in buffers}
        return TaskWords.of_model(self._model.config, tensors)

    def _note_robots(
        self, tasks_NR: torch.Tensor, indices: Sequence[int], logits_BR: torch.Tensor | None
    ) -> None:
        """Write the logits of a batch's robot tasks down, and that they are there."""
        assert self._val_set is not None
        if logits_BR is None:
            return
        for index, logits_R in zip(indices, logits_BR, strict=True):
            number = self._val_set.task_number(index)
            if number is not None:
                tasks_NR[number] = torch.cat([logits_R, torch.ones(1)])

    def _calibrate(self, tasks_NR: np.ndarray) -> RobotCalibration | None:
        """What the tasks that were judged find; None if there are none."""
        assert self._val_set is not None
        tasks = [t for t, seen in zip(self._val_set.tasks, tasks_NR[:, -1], strict=True) if seen]
        if not tasks:
            return None
        names = [robot.name for robot in self._catalog]
        words = self._task_words()
        return calibrate_robots(
            tasks_NR[tasks_NR[:, -1] > 0, :-1],
            None if words is None else words.log_odds([task.task for task in tasks]),
            np.array([[name in task.robots for name in names] for task in tasks]),
        )

    def _is_out_of_patience(self) -> bool:
        """Whether to stop at this step; a resumed run gets at least to its next validation."""
        patience = self._training.patience
        return (
            patience > 0
            and self._progress.step % self._training.eval_every == 0
            and self._progress.validations_since_best >= patience
        )

    def _save(self, is_best: bool) -> None:
        world = self._world
        average_buffers(self._model, world)
        model = {name: whole(value) for name, value in self._model.state_dict().items()}
        training = {
            **optimizer_tensors(self._optimizer, self._model),
            **_random_state(world),
        }
        if not world.is_main:
            return
        self._checkpoint_dir = save_checkpoint(
            self._run_dir,
            self._progress.step,
            model=model,
            training=training,
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

    def _draw_curves(self) -> Path | None:
        if not self._world.is_main:
            return None
        output = self._run_dir / CURVES_FILE
        try:
            draw_curves(self._run_dir / METRICS_FILE, output)
        except ImportError:
            self._tell(
                "on_warning", f"Without matplotlib no {CURVES_FILE} is drawn: install matplotlib."
            )
            return None
        return output

    def _summary(
        self,
        start: TrainingStart,
        began: float,
        validation: ValidationReport | None,
        curves: Path | None,
    ) -> TrainingSummary:
        progress = self._progress
        checkpoint_dir = self._checkpoint_dir  # the last update always saves
        if checkpoint_dir is None:  # in another process
            checkpoint_dir = self._run_dir / CHECKPOINTS_FOLDER / "last"
        seconds = max(progress.seconds, 1e-9)
        return TrainingSummary(
            start=start,
            run_dir=self._run_dir,
            checkpoint_dir=checkpoint_dir,
            steps=progress.step,
            epochs=progress.epoch + progress.samples_seen / len(self._train_set),
            first_loss=progress.first_loss,
            loss=progress.loss,
            validation=validation,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            best_cider=progress.best_cider,
            skipped_steps=progress.skipped_steps,
            seconds=progress.seconds,
            wall_seconds=time.perf_counter() - began,
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


def _metrics(kind: str, report: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    values = dataclasses.asdict(report).items()
    return {"kind": kind, **{name: value for name, value in values if name not in leave_out}}


def _step_metrics(report: StepReport) -> dict[str, Any]:
    values = _metrics("train", report, leave_out=("total_steps", "num_epochs", "other_losses"))
    losses = {f"{name}_loss": value for name, value in report.other_losses.items()}
    return {**values, "true_loss": report.true_loss, **losses}


def _random_state(world: World) -> dict[str, torch.Tensor]:
    """The states of torch's generators in all processes, which all have to ask."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        _random_name(kind, rank): of_rank
        for kind, state in states.items()
        for rank, of_rank in enumerate(world.gather(state))
    }


def _set_random_state(states: Mapping[str, torch.Tensor], rank: int) -> None:
    """Go on with this process's random numbers; a process that is new begins its own."""
    if _random_name("cpu", rank) in states:
        torch.set_rng_state(states[_random_name("cpu", rank)])
    if torch.cuda.is_available() and _random_name("cuda", rank) in states:
        torch.cuda.set_rng_state(states[_random_name("cuda", rank)])


def _random_name(kind: str, rank: int) -> str:
    return f"random.{kind}.{rank}" if kind == "cuda" or rank else f"random.{kind}"
