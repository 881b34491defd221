"""Help of `bitgen` and `bitgen data` themselves, drawn with few imports so that it comes at once.

Typer's own help, which the commands use, imports a Markdown parser and a syntax highlighter first.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from bitgen.console import console


class QuickHelpGroup(TyperGroup):
    """A group of commands whose help names its commands and options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; Typer calls this for --help."""
        console.result(f"{ctx.get_usage()}\n\n{self.help}\n")
        console.panel(
            "Commands",
            [
                (name, self.commands[name].get_short_help_str(limit=100))
                for name in self.list_commands(ctx)
            ],
        )
        console.panel(
            "Options",
            [
                (", ".join(parameter.opts), getattr(parameter, "help", None) or "")
                for parameter in self.get_params(ctx)
            ],
        )
