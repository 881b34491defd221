"""What a training tells of itself: reports, and the callbacks that hear them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingStart:
    """What is about to be trained."""

    run_dir: Path
    first_step: int  # updates already made, by the run that is resumed
    total_steps: int
    word_pretraining_steps: int  # of them, the first, which train the image encoder alone
    num_epochs: int
    device: str
    num_processes: int
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
    loss: float | None  # caption loss per valid token of the whole update
    robot_loss: float | None  # per robot label
    image_word_loss: float | None  # per picture
    reward: float | None  # mean CIDEr-D of the captions that self_critical drew, 0 to 10
    other_losses: Mapping[str, float]  # by name, where the model or the training has more
    expert_load: list[list[float]] | None  # of each layer, the experts' shares of the choices
    grad_norm: float  # before clipping
    learning_rate: float
    weight_decay: float
    tokens: int  # with a caption loss
    images: int
    padding_share: float  # of all text positions, 0 to 1
    tokens_per_second: float  # over the last updates, validation and saving not counted
    images_per_second: float
    seconds_remaining: float
    skipped: str | None  # why the weights stayed as they were: loss or gradients not to be trusted

    @property
    def true_loss(self) -> float | None:
        """`loss` by its earlier name: the same number however the update is accumulated."""
        return self.loss


@dataclass(frozen=True)
class WeightReport:
    """The ternary weights after an update."""

    step: int
    flips: int  # weights that this update brought from one of -1, 0, +1 to another
    flip_share: float  # of all ternary weights, 0 to 1
    shares: Mapping[str, tuple[float, float, float]]  # of -1, 0 and +1 in each layer, by its name
    total_shares: tuple[float, float, float]  # of -1, 0 and +1 in all layers together


@dataclass(frozen=True)
class ValidationReport:
    """One pass over the validation set."""

    step: int
    epoch: int
    loss: float | None  # caption loss per valid token, without label smoothing
    plan_loss: float | None  # the same of plans, over the tokens that the grammar leaves open
    robot_loss: float | None
    robot_exact_match: float | None  # share of tasks with every robot judged right, 0 to 1
    robot_threshold: float | None  # at this probability, the best for these tasks
    robot_temperature: float | None  # with logits divided by it, which gives the best probabilities
    robot_word_weight: float | None  # share of the task's words in robots' log odds, 0 to 1
    cider: float | None  # CIDEr-D of greedy captions, where the best is chosen by it
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class TrainingSummary:
    """What a training did."""

    start: TrainingStart
    run_dir: Path
    checkpoint_dir: Path
    steps: int
    epochs: float
    first_loss: float | None  # of the first update that had captions
    loss: float | None  # of the last update that had captions
    validation: ValidationReport | None  # the last one of this process
    best_step: int | None
    best_loss: float | None
    """At `best_step`: loss + robot_loss_weight x robot loss; without captions, plan_loss for loss.
    """
    best_cider: float | None  # at `best_step`, where it was chosen by it
    skipped_steps: int
    seconds: float  # spent in updates, also before a resume
    wall_seconds: float  # since this process began to train, validation and saving counted
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

    def on_weights(self, report: WeightReport) -> None:
        """The ternary weights were counted."""

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
