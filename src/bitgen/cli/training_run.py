"""A training on the console: progress while it runs, a table at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

from bitgen.console import ProgressBar, console, duration
from bitgen.training.setup import SetupObserver
from bitgen.training.trainer import (
    StepReport,
    Trainer,
    TrainerCallback,
    TrainingStart,
    TrainingSummary,
    ValidationReport,
)


class ConsoleObserver(SetupObserver):
    """Shows the preparation: one bar for each activity."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._activity = ""
        self._bar: ProgressBar | None = None

    def on_progress(self, activity: str, done: int, total: int) -> None:
        if activity != self._activity:
            self.close()
            self._activity = activity
            self._bar = self._stack.enter_context(console.progress(activity))
        if self._bar is not None:
            self._bar.update(done, total)
        if done >= total:
            self.close()

    def on_note(self, message: str) -> None:
        console.note(message)

    def on_warning(self, message: str) -> None:
        console.warning(message)

    def close(self) -> None:
        """End the bar that is drawn."""
        self._stack.close()
        self._bar, self._activity = None, ""


class ConsoleCallback(TrainerCallback):
    """Shows the training: loss, valid tokens/s, images/s, remaining time, validations."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar

    def on_start(self, start: TrainingStart) -> None:
        console.note(
            f"Training {start.num_parameters:,} parameters on {start.train_samples:,} samples"
            f" ({start.device}, {start.precision}): {start.total_steps:,} steps to {start.run_dir}"
        )
        if start.first_step:
            console.note(f"Going on after step {start.first_step:,}.")
        for difference in start.differences:
            console.warning(f"Not as recorded: {difference}.")

    def on_step(self, report: StepReport) -> None:
        parts = [] if report.loss is None else [f"loss {report.loss:.3f}"]
        if report.robot_loss is not None:
            parts.append(f"robots {report.robot_loss:.3f}")
        if report.image_word_loss is not None:
            parts.append(f"image words {report.image_word_loss:.3f}")
        if report.loss is not None:
            parts.append(f"{report.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{report.images_per_second:,.0f} images/s")
        self._bar.update(
            report.step, report.total_steps, "  ".join(parts), report.seconds_remaining
        )
        if report.skipped:
            console.warning(f"Step {report.step}: loss or gradients not finite, update skipped.")

    def on_validation(self, report: ValidationReport) -> None:
        console.note(f"Step {report.step:,}: validation {_validation_words(report)}")

    def on_warning(self, message: str) -> None:
        console.warning(message)


def train_on_console(
    prepare: Callable[[SetupObserver, TrainerCallback], Trainer], resume: bool = False
) -> TrainingSummary:
    """Prepare and train with progress bars; returns and raises what the trainer does."""
    bar = ProgressBar("Training", "steps", enabled=not console.quiet)
    with closing(ConsoleObserver()) as observer:
        trainer = prepare(observer, ConsoleCallback(bar))
    with closing(bar):
        return trainer.train(resume=resume)


def show_summary(summary: TrainingSummary, json: bool) -> None:
    """The end-of-run table, or the same as one JSON object."""
    validation = summary.validation
    if json:
        console.json(
            {
                "run": str(summary.run_dir),
                "checkpoint": str(summary.checkpoint_dir),
                "steps": summary.steps,
                "epochs": summary.epochs,
                "first_loss": summary.first_loss,
                "loss": summary.loss,
                "validation_loss": validation.loss if validation else None,
                "robot_loss": validation.robot_loss if validation else None,
                "robot_exact_match": validation.robot_exact_match if validation else None,
                "best_step": summary.best_step,
                "skipped_steps": summary.skipped_steps,
                "seconds": summary.seconds,
                "tokens_per_second": summary.tokens_per_second,
                "images_per_second": summary.images_per_second,
                "curves": str(summary.curves) if summary.curves else None,
            }
        )
        return
    rows: list[tuple[str, str]] = [
        ("steps", f"{summary.steps:,} ({summary.epochs:.1f} epochs)"),
        ("time in updates", duration(summary.seconds)),
        (
            "speed",
            f"{summary.tokens_per_second:,.0f} tokens/s, {summary.images_per_second:,.0f} images/s",
        ),
    ]
    if summary.loss is not None and summary.first_loss is not None:
        rows.append(("training loss", f"{summary.first_loss:.3f} -> {summary.loss:.3f}"))
    if validation is not None:
        rows.append(("validation", _validation_words(validation)))
    if summary.best_step is not None:
        rows.append(("best step", f"{summary.best_step:,}"))
    if summary.skipped_steps:
        rows.append(("skipped steps", f"{summary.skipped_steps:,}"))
    rows.append(("run", str(summary.run_dir)))
    if summary.curves is not None:
        rows.append(("curves", str(summary.curves)))
    console.table(("", ""), rows)
    if summary.loss is not None:
        console.result(f"Caption pictures with: bitgen infer IMAGE --model {summary.run_dir}")
    else:
        console.result(f"Rank robots with: bitgen infer --task JOB --model {summary.run_dir}")


def _validation_words(report: ValidationReport) -> str:
    parts = []
    if report.loss is not None:
        parts.append(f"loss {report.loss:.3f}")
    if report.robot_loss is not None:
        parts.append(f"robot loss {report.robot_loss:.3f}")
    if report.robot_exact_match is not None:
        parts.append(f"robots right {report.robot_exact_match:.1%}")
    return ", ".join(parts) or "without captions or robot tasks that have a loss"
