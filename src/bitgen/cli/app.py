"""The command `bitgen`: its commands, the switches before them, and usage errors.

Nothing here imports torch: `bitgen --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from bitgen import __version__
from bitgen.cli.chat import chat
from bitgen.cli.command import Debug, Quiet, add_command
from bitgen.cli.data import check, download, scenes
from bitgen.cli.demo import demo
from bitgen.cli.evaluate import evaluate
from bitgen.cli.export import export
from bitgen.cli.failures import EXIT_BAD_INPUT
from bitgen.cli.group import QuickHelpGroup
from bitgen.cli.infer import infer
from bitgen.cli.info import info
from bitgen.cli.train import TRAIN_OPTIONS, train
from bitgen.console import console


def _print_version(wanted: bool) -> None:
    if wanted:
        console.result(f"bitgen {__version__}")
        raise typer.Exit()


def _start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Train, run and export ternary vision-language models.

    A model captions pictures and says which robots suit a job. Options are written with
    underscores or dashes: --coco_data and --coco-data are the same.
    """
    console.debug, console.quiet = debug, quiet
    _show_help_without_command(context)


def _start_data(context: typer.Context) -> None:
    """Draw, check and download data sets."""
    _show_help_without_command(context)


def _show_help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        context.get_help()  # which prints it
        raise typer.Exit()


def _make_app(callback: Any) -> typer.Typer:
    app = typer.Typer(
        cls=QuickHelpGroup,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={
            # Applied to names of options only: a file name keeps its dashes and underscores.
            "token_normalize_func": lambda name: name.replace("-", "_"),
            "help_option_names": ["--help", "-h"],
        },
    )
    app.callback(invoke_without_command=True)(callback)
    return app


app = _make_app(_start)
_data = _make_app(_start_data)
add_command(app, "train", train, TRAIN_OPTIONS)
add_command(app, "infer", infer)
add_command(app, "evaluate", evaluate)
add_command(app, "chat", chat)
add_command(app, "export", export)
add_command(app, "info", info)
add_command(app, "demo", demo)
add_command(_data, "scenes", scenes)
add_command(_data, "check", check)
add_command(_data, "download", download)
app.add_typer(_data, name="data")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command line (that of the process by default) and exit with its code."""
    console.debug = console.quiet = False
    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="bitgen",
            standalone_mode=False,
        )
    except Exception as error:
        # Typer's usage errors: known by their form, since typer brings its own click or not.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "bitgen"
        console.error(error.format_message(), f"See `{path} --help`.")
        code = EXIT_BAD_INPUT
    sys.exit(code if isinstance(code, int) else 0)
