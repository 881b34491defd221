"""Which model a command works with."""

from __future__ import annotations

from pathlib import Path

from bitgen.console import console

RUNS = Path("runs")


def model_or_newest_run(model: Path | None) -> Path:
    """The given model, or the newest run in ./runs, which is then told."""
    if model is not None:
        return model
    from bitgen.training.checkpoint import latest_run

    newest = latest_run(RUNS)
    console.note(f"Using the newest run, {newest}.")
    return newest
