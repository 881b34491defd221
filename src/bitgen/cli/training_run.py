"""A training on the console: progress while it runs, a table at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from bitgen.console import ProgressBar, console, duration
from bitgen.training.checkpoint import METRICS_FILE
from bitgen.training.events import (
    StepReport,
    TrainerCallback,
    TrainingStart,
    TrainingSummary,
    ValidationReport,
)
from bitgen.training.figures import RunFigures, read_figures
from bitgen.training.setup import SetupObserver
from bitgen.training.trainer import Trainer


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
        if start.first_step < start.word_pretraining_steps:
            console.note(
                f"The first {start.word_pretraining_steps:,} steps train the image encoder alone,"
                " on the words of the captions."
            )
        if start.first_step:
            console.note(f"Going on after step {start.first_step:,}.")
        for difference in start.differences:
            console.warning(f"Not as recorded: {difference}.")

    def on_step(self, report: StepReport) -> None:
        parts = [] if report.loss is None else [f"loss {report.loss:.3f}"]
        if report.reward is not None:
            parts.append(f"reward {report.reward:.3f}")
        if report.robot_loss is not None:
            parts.append(f"robots {report.robot_loss:.3f}")
        if report.image_word_loss is not None:
            parts.append(f"image words {report.image_word_loss:.3f}")
        if report.tokens:
            parts.append(f"{report.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{report.images_per_second:,.0f} images/s")
        self._bar.update(
            report.step, report.total_steps, "  ".join(parts), report.seconds_remaining
        )
        if report.skipped:
            console.warning(f"Step {report.step}: {report.skipped}, update skipped.")

    def on_validation(self, report: ValidationReport) -> None:
        console.note(f"Step {report.step:,}: validation {_validation_words(report)}")

    def on_warning(self, message: str) -> None:
        console.warning(message)


def train_on_console(
    prepare: Callable[[SetupObserver, TrainerCallback], Trainer],
    resume: bool = False,
    log_dir: Path | None = None,
) -> TrainingSummary:
    """Prepare and train with progress bars; returns and raises what the trainer does.

    With `log_dir`, a log for TensorBoard is written there.
    """
    bar = ProgressBar("Training", "steps", enabled=not console.quiet)
    with closing(ConsoleObserver()) as observer:
        trainer = prepare(observer, ConsoleCallback(bar))
    with closing(bar), ExitStack() as logs:
        if log_dir is not None:
            from bitgen.cli.tensorboard import TensorBoardCallback

            log = TensorBoardCallback(trainer, log_dir)
            trainer.add_callback(logs.enter_context(closing(log)))
        return trainer.train(resume=resume)


def show_summary(summary: TrainingSummary, json: bool) -> None:
    """The end-of-run table, or the same as one JSON object."""
    validation, start = summary.validation, summary.start
    figures = read_figures(summary.run_dir / METRICS_FILE)
    if json:
        console.json(
            {
                "parameters": start.num_parameters,
                "device": start.device,
                "processes": start.num_processes,
                "precision": start.precision,
                "run": str(summary.run_dir),
                "checkpoint": str(summary.checkpoint_dir),
                "steps": summary.steps,
                "epochs": summary.epochs,
                "first_loss": summary.first_loss,
                "loss": summary.loss,
                "validation_loss": validation.loss if validation else None,
                "plan_loss": validation.plan_loss if validation else None,
                "robot_loss": validation.robot_loss if validation else None,
                "robot_exact_match": validation.robot_exact_match if validation else None,
                "cider": validation.cider if validation else None,
                "robot_threshold": validation.robot_threshold if validation else None,
                "robot_temperature": validation.robot_temperature if validation else None,
                "robot_word_weight": validation.robot_word_weight if validation else None,
                "best_step": summary.best_step,
                "best_loss": summary.best_loss,
                "best_cider": summary.best_cider,
                "seconds": summary.seconds,
                "wall_seconds": summary.wall_seconds,
                "tokens_per_second": summary.tokens_per_second,
                "images_per_second": summary.images_per_second,
                "curves": str(summary.curves) if summary.curves else None,
                **dataclasses.asdict(figures),
                "skipped_steps": summary.skipped_steps,
            }
        )
        return
    processes = f", {start.num_processes} processes" if start.num_processes > 1 else ""
    rows: list[tuple[str, str]] = [
        ("trained", f"{start.num_parameters:,} parameters"),
        ("on", f"{start.device}{processes}, {start.precision}"),
        ("steps", f"{summary.steps:,} ({summary.epochs:.1f} epochs)"),
        ("time", f"{duration(summary.wall_seconds)}, with validation and saving"),
        ("time in updates", duration(summary.seconds)),
        (
            "speed",
            f"{summary.tokens_per_second:,.0f} tokens/s, {summary.images_per_second:,.0f} images/s",
        ),
    ]
    if summary.loss is not None and summary.first_loss is not None:
        rows.append(("training loss", f"{summary.first_loss:.3f} -> {summary.loss:.3f}"))
    if validation is not None:
        rows.append(("validation", f"step {validation.step:,}: {_validation_words(validation)}"))
    rows += figure_rows(figures)
    rows.append(("run", str(summary.run_dir)))
    if summary.curves is not None:
        rows.append(("curves", str(summary.curves)))
    console.table(("", ""), rows)
    if summary.loss is not None or summary.best_cider is not None:
        console.result(f"Caption pictures with: bitgen infer IMAGE --model {summary.run_dir}")
    else:
        console.result(f"Rank robots with: bitgen infer --task JOB --model {summary.run_dir}")


def figure_rows(figures: RunFigures) -> list[tuple[str, str]]:
    """Names and words of the figures that a run holds, for a table."""
    rows: list[tuple[str, str]] = []
    if figures.best_validation is not None:
        best = dict(figures.best_validation)
        best.pop("robot_temperature")
        best.pop("robot_word_weight")
        rows.append(("best validation", f"step {best.pop('step'):,}: {_judged_words(**best)}"))
    if figures.padding_share is not None:
        rows.append(("padding", f"{figures.padding_share:.1%} of text positions"))
    if figures.skipped_steps:
        words = f"{figures.skipped_steps:,}, the last one step {figures.last_skipped_step:,}"
        why = f": {figures.last_skipped}" if figures.last_skipped else ""
        rows.append(("skipped updates", words + why))
    if figures.ternary_shares is not None:
        minus, zero, plus = figures.ternary_shares
        rows.append(("ternary weights", f"-1 {minus:.1%}, 0 {zero:.1%}, +1 {plus:.1%}"))
    if figures.flips is not None and figures.flip_share is not None:
        flips = f"{figures.flips:,} of them ({100 * figures.flip_share:.2g}%)"
        rows.append(("flips an update", f"{flips} in step {figures.ternary_step:,}"))
    return rows


def _validation_words(report: ValidationReport) -> str:
    return _judged_words(
        report.loss,
        report.plan_loss,
        report.robot_loss,
        report.robot_exact_match,
        report.robot_threshold,
        report.cider,
    )


def _judged_words(
    loss: float | None,
    plan_loss: float | None,
    robot_loss: float | None,
    robot_exact_match: float | None,
    robot_threshold: float | None,
    cider: float | None = None,
) -> str:
    parts = []
    if cider is not None:
        parts.append(f"CIDEr {cider:.3f}")
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if plan_loss is not None:
        parts.append(f"plan loss {plan_loss:.3f}")
    if robot_loss is not None:
        parts.append(f"robot loss {robot_loss:.3f}")
    if robot_exact_match is not None:
        at = "" if robot_threshold is None else f" at {robot_threshold:.2f}"
        parts.append(f"robots right {robot_exact_match:.1%}{at}")
    return ", ".join(parts) or "without captions, robot tasks or plans that have a loss"
