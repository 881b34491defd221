"""What all commands share: options written once, switches after the command, errors as messages."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from bitgen.cli.failures import describe_failure
from bitgen.config import WORD_PRETRAINING_PERCENT, BitGenConfig, TrainingConfig
from bitgen.console import console

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results, warnings and errors only.")]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


_KINDS: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "int | None": int | None,
    "float | None": float | None,
}


def config_options(
    config: type[BitGenConfig] | type[TrainingConfig],
    names: Sequence[str],
    panel: str,
    by_size: Mapping[str, BitGenConfig | TrainingConfig],
) -> list[inspect.Parameter]:
    """One option for each field of a configuration, with the field's words, choices and default.

    `by_size` has the configuration of each model size: a field in which they differ has no default
    here, because the size decides, and says which it takes.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    parameters = []
    for name in names:
        field = fields[name]
        kind, default, help = _KINDS[str(field.type)], field.default, field.metadata["help"]
        value_of = {size: getattr(preset, name) for size, preset in by_size.items()}
        if len(set(value_of.values())) > 1:
            kind, default, help = kind | None, None, f"{help} Default: {_values_words(value_of)}."
        option = typer.Option(
            f"--{name}/--no_{name}" if default is True else f"--{name}",
            help=help,
            metavar="|".join(field.metadata["choices"]) if field.metadata["choices"] else None,
            rich_help_panel=panel,
        )
        parameters.append(
            inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])
        )
    return parameters


def _values_words(value_of: Mapping[str, Any]) -> str:
    """What each size takes, for a person: the commonest value last."""
    commonest, *others = (value for value, _ in Counter(value_of.values()).most_common())
    words = []
    for value in others:
        sizes = [size for size, of_size in value_of.items() if of_size == value]
        words.append(f"{_value_words(value)} for {' and '.join(sizes)}")
    return f"{', '.join(words)}, else {_value_words(commonest)}"


def _value_words(value: Any) -> str:
    return f"{WORD_PRETRAINING_PERCENT}% of the updates" if value is None else str(value)


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., None],
    options: Sequence[inspect.Parameter] = (),
) -> None:
    """Register `function` as the command `name`, with --debug and --quiet, and errors reported.

    `options` are those that the function takes as `**keywords` beside its own parameters.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    switches = [
        inspect.Parameter(switch, _KEYWORD, default=False, annotation=kind)
        for switch, kind in (("debug", Debug), ("quiet", Quiet))
    ]

    @functools.wraps(function)
    def run(*, debug: bool, quiet: bool, **arguments: Any) -> None:
        console.debug = console.debug or debug
        console.quiet = console.quiet or quiet
        try:
            function(**arguments)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BrokenPipeError:
            # The reader went away (`| head`): what is left must not complain at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "format_message"):
                raise  # a usage error, which `main` shows
            failure = describe_failure(error)
            console.error(failure.message, failure.remedy)
            raise typer.Exit(failure.exit_code) from error

    parameters = [p.replace(kind=_KEYWORD) for p in (*own, *options, *switches)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name)(run)
