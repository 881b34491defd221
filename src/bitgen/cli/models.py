"""Which model a command works with, and on what it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bitgen.config import DEVICES, BitGenConfig
from bitgen.console import console
from bitgen.inference.options import CaptionOptions
from bitgen.shipped import SHIPPED_MODEL, model_path, shipped_model

RUNS = Path("runs")

MODEL_DEFAULT = (
    f"`{SHIPPED_MODEL}`: the model that ships with BitGen. Default: the newest run in ./runs, else"
    " the one that ships."
)
ModelToAsk = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="RUN_OR_FILE", help=f"Run folder or exported file. {MODEL_DEFAULT}"
    ),
]

Device = Annotated[str, typer.Option("--device", metavar="|".join(DEVICES), help="Where to run.")]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="auto|native|torch",
        help="native: the CPU, without PyTorch; torch: PyTorch. auto: native where it can.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Processor threads. Default: one a core.")
]
DEFAULT_CONSENSUS = 64
"""Captions to find a consensus among where nothing else is asked for: docs/training.md says what it
brings, and docs/inference.md what it costs."""
DEFAULT_BEAMS = 5
"""Hypotheses of beam search where beams are asked for, and not how many."""
BeamSize = Annotated[
    int | None,
    typer.Option(
        "--beam_size",
        help="Beam search among so many captions, in place of a consensus; 1 is greedy, the"
        " soonest.",
    ),
]
Consensus = Annotated[
    int | None,
    typer.Option(
        "--consensus",
        metavar="N",
        help="Draw N captions and take the one most like all of them; fewer are sooner, and a"
        f" little worse. 0: {DEFAULT_BEAMS} beams. Default: {DEFAULT_CONSENSUS}; none"
        " where --beam_size, --length_penalty or --temperature is given, or a model drafts.",
    ),
]
LengthPenalty = Annotated[
    float,
    typer.Option("--length_penalty", help="Beams: above 1 favours longer captions, below less."),
]
Temperature = Annotated[
    float, typer.Option("--temperature", help="Draw words at random; 0 takes the likeliest.")
]
MaxTokens = Annotated[int, typer.Option("--max_tokens", help="Longest caption, in tokens.")]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Pictures at a time.")]


def model_or_newest_run(model: Path | None) -> Path:
    """The given model, or the newest run in ./runs, which is then told.

    Raises:
        ModelFileError: there is no run.
    """
    if model is not None:
        return model
    from bitgen.training.checkpoint import latest_run

    return _told(latest_run(RUNS))


def model_to_ask(model: Path | None) -> Path:
    """The model that answers: the given one, else the newest run in ./runs, else the one that
    ships; which of both is told.

    Raises:
        ModelFileError: there is neither a run nor a model that ships.
    """
    if model is not None:
        return model_path(model)
    shipped = shipped_model()
    if shipped is None:
        return model_or_newest_run(None)
    if RUNS.is_dir():  # runs are read by torch, which who has none need not wait for
        from bitgen.training.checkpoint import find_latest_run

        newest = find_latest_run(RUNS)
        if newest is not None:
            return _told(newest)
    console.note(f"Using the model that ships with BitGen, {shipped.stem}.")
    return shipped


def _told(run: Path) -> Path:
    console.note(f"Using the newest run, {run}.")
    return run


def with_decoding(
    options: CaptionOptions, beam_size: int | None, consensus: int | None, config: BitGenConfig
) -> CaptionOptions:
    """The options with the numbers of beams and of drawn captions that were given, or the defaults.

    By default that is a consensus. Options that have a meaning for beams alone ask for beams. Words
    that are drawn by `--temperature` stay as they are drawn, and so do those of a model with future
    token heads, which is there to draft, unless drafts are refused.
    """
    if beam_size is not None or consensus:
        return replace(options, beam_size=beam_size or 1, consensus=consensus or 0)
    drafts = options.speculative or (options.speculative is None and config.predict_tokens > 1)
    if options.temperature > 0 or drafts:
        return replace(options, beam_size=1, consensus=0)
    if consensus == 0 or options.length_penalty != 1:
        return replace(options, beam_size=DEFAULT_BEAMS, consensus=0)
    return replace(options, beam_size=1, consensus=DEFAULT_CONSENSUS)
