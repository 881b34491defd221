"""`bitgen chat`: questions about pictures, one after the other, with the model loaded once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bitgen.cli.answers import answer_record, show_answer
from bitgen.cli.failures import EXIT_BAD_INPUT
from bitgen.cli.models import (
    Backend,
    BeamSize,
    Consensus,
    Device,
    LengthPenalty,
    MaxTokens,
    ModelToAsk,
    Temperature,
    Threads,
    model_to_ask,
    with_decoding,
)
from bitgen.cli.prompt import LineReader
from bitgen.console import console
from bitgen.errors import BitGenError, InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from bitgen.dataset.plans import Subtask
    from bitgen.inference.answers import Answer
    from bitgen.inference.predictor import BitGen, CaptionOptions

HISTORY_FILE = "chat_history"
"""In the folder of the cache."""
_LONGEST_NAME = 30


def chat(
    image: Annotated[
        Path | None, typer.Argument(metavar="[IMAGE]", help="The picture to begin with.")
    ] = None,
    model: ModelToAsk = None,
    robots: Annotated[
        Path | None,
        typer.Option(
            "--robots", metavar="FILE", help="Robot catalog (JSON). Default: the model's own."
        ),
    ] = None,
    beam_size: BeamSize = None,
    length_penalty: LengthPenalty = 1.0,
    consensus: Consensus = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 40,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each line that is asked.")
    ] = False,
) -> None:
    """Ask about pictures, line by line.

    A line is a task, for which the robots are ranked (by the open picture, if there is one), or the
    beginning of a caption if it ends in "..."; /help lists the commands. Each line is answered by
    itself: the model does not remember earlier ones. Lines may also come from a pipe; the exit code
    is then 2 if one of them could not be answered.
    """
    source = model_to_ask(model)

    from bitgen.dataset.images import default_cache_dir
    from bitgen.inference.predictor import BitGen, CaptionOptions

    options = CaptionOptions(
        beam_size=1 if beam_size is None else beam_size,
        length_penalty=length_penalty,
        consensus=consensus or 0,
        temperature=temperature,
        max_tokens=max_tokens,
    )
    reader = LineReader(default_cache_dir() / HISTORY_FILE, [command.name for command in COMMANDS])
    bitgen = BitGen.load(source, device=device, backend=backend, threads=threads)
    options = with_decoding(options, beam_size, consensus, bitgen.config)
    if robots is not None:
        bitgen.set_catalog(robots)
    conversation = Conversation(bitgen, options, json)
    if image is not None:
        conversation.answer(f"/image {image}")
    if reader.is_terminal:
        console.note('A task, the beginning of a caption that ends in "...", or /help.')
    num_bad = _converse(conversation, reader)
    if num_bad and not reader.is_terminal:
        raise typer.Exit(EXIT_BAD_INPUT)


def _converse(conversation: Conversation, reader: LineReader) -> int:
    """Answer line after line until the input or the user ends; returns how many failed."""
    num_bad = 0
    while not conversation.is_over:
        line: str | None = None
        try:
            line = reader.read(conversation.prompt)
            if line is None:
                if reader.is_terminal:
                    console.note("")  # the shell's prompt begins a line of its own
                break
            if line.strip():
                conversation.answer(line.strip())
        except KeyboardInterrupt:
            if not reader.is_terminal:
                raise
            console.note("\nCtrl-D or /quit ends." if line is None else "\nInterrupted.")
        except BitGenError as error:
            conversation.tell(str(line).strip(), error)
            num_bad += 1
    return num_bad


class Conversation:
    """What is open and what was asked; answers one line at a time.

    Attributes:
        is_over: whether /quit was asked.
    """

    def __init__(self, bitgen: BitGen, options: CaptionOptions, json: bool) -> None:
        self.is_over = False
        self._bitgen = bitgen
        self._options = options
        self._json = json
        self._catalog = bitgen.catalog
        self._path: Path | None = None
        self._picture: Image.Image | None = None
        self._pixels_3SS: np.ndarray | None = None
        self._task = ""
        self._asked: list[str] = []
        self._line = ""
        self._is_warned = False

    @property
    def prompt(self) -> str:
        """What stands before the next line: the open picture's name."""
        if self._path is None:
            return "> "
        name = "".join(sign if sign.isprintable() else "?" for sign in self._path.name)
        return f"{name[-_LONGEST_NAME:]}> "

    def answer(self, line: str) -> None:
        """Answer a line that is not blank. Raises BitGenError; the conversation may go on."""
        self._line = line
        self._asked.append(line)
        name, *arguments = line.split(maxsplit=1)
        wanted = _ALIASES.get(line, name)
        command = next((command for command in COMMANDS if command.name == wanted), None)
        if command is not None:
            command.run(self, arguments[0] if arguments else "")
        elif (path := _dropped_picture(line)) is not None:
            self.open_picture(str(path))
        elif line.startswith("/"):
            raise InputError(f"There is no command {name}.", remedy="/help lists those there are.")
        elif line.endswith(("...", "\N{HORIZONTAL ELLIPSIS}")):
            self.caption(line.rstrip(".\N{HORIZONTAL ELLIPSIS}").rstrip())
        else:
            self.rank_robots(line)

    def tell(self, line: str, error: BitGenError) -> None:
        """Say why a line was not answered."""
        if self._json:
            console.json({"input": line, "error": error.message, "remedy": error.remedy})
        else:
            console.error(error.message, error.remedy)

    def open_picture(self, argument: str) -> None:
        """/image: open a picture and say what it shows; without a path, say which is open."""
        if not argument:
            self._reply(
                {"image": None if self._path is None else str(self._path)},
                str(self._path or "No picture is open."),
            )
            return
        path = _named_file(argument) or Path(argument)
        answer = self._ask(path, captions=self._writes)

        from PIL import Image

        assert answer.pixels_3SS is not None
        # What the model saw of the file; a backend that sees the same again does not encode it.
        self._pixels_3SS = answer.pixels_3SS
        self._picture = Image.fromarray(answer.pixels_3SS.transpose(1, 2, 0))
        self._path = path
        self._show(answer, image=path)

    def caption(self, beginning: str) -> None:
        """/caption: what the open picture shows, in words that begin so."""
        if self._picture is None:
            raise InputError("No picture is open to caption.", remedy="Open one: /image PATH")
        self._show(self._ask(self._picture, prompt=beginning))

    def rank_robots(self, task: str) -> None:
        """/task: the robots for a job, by the open picture if there is one."""
        if not task:
            raise InputError("The task is empty.", remedy="Say the job: /task Inspect the roof.")
        self._show(self._ranked(task))
        self._task = task

    def explain(self, task: str) -> None:
        """/explain: the robots for a job, and why; without words, for the last one."""
        task = task or self._task
        if not task:
            raise InputError(
                "There is no job to explain.", remedy="Say one: /explain Inspect the roof."
            )
        answer = self._ranked(task)
        assert answer.robots is not None
        why = self._bitgen.explain_robots(answer.robots, task, self._pixels_3SS)
        self._show(dataclasses.replace(answer, robots=why))
        self._task = task

    def plan(self, task: str) -> None:
        """/plan: a job in ordered subtasks with a robot each; without words, the last one."""
        task = task or self._task
        if not task:
            raise InputError("There is no job to plan.", remedy="Say one: /plan Search the yard.")
        from bitgen.inference.answers import Answer

        self._show(Answer(""), plan=self._bitgen.plan(task, self._picture))
        self._task = task

    def _ranked(self, task: str) -> Answer:
        if not self._bitgen.config.robot_names and not self._is_warned:
            console.warning(
                "This model was trained without robot tasks: its ranking means nothing."
            )
            self._is_warned = True
        if self._picture is None:
            from bitgen.inference.answers import Answer

            return Answer("", robots=self._bitgen.select_robots(task))
        return self._ask(self._picture, task=task, captions=False)

    def show_robots(self, argument: str) -> None:
        """/robots: choose from another catalog, or list the one there is."""
        if argument:
            self._bitgen.set_catalog(_named_file(argument) or Path(argument))
        catalog = self._bitgen.catalog
        lines = []
        for robot in catalog:
            lines.append(robot.name)
            for label, phrases in (
                ("can", robot.capabilities),
                ("limits", robot.limitations),
                ("where", robot.environments),
            ):
                if phrases and not argument:
                    lines.append(f"  {label}: {', '.join(phrases)}")
        self._reply(
            {"catalog": [dataclasses.asdict(robot) for robot in catalog]},
            "\n".join(lines) or "There are no robots; /robots FILE takes a catalog.",
        )

    def show_history(self, argument: str) -> None:
        """/history: what was asked since the start or the last /reset."""
        self._reply(
            {"history": self._asked},
            "\n".join(f"{number:3}  {line}" for number, line in enumerate(self._asked, start=1))
            or "Nothing was asked yet.",
        )

    def reset(self, argument: str) -> None:
        """/reset: as at the start: no picture, the robots of the start, no history."""
        self._path = self._picture = self._pixels_3SS = None
        self._task = ""
        if self._catalog:
            self._bitgen.set_catalog(self._catalog)
        self._asked.clear()
        self._reply({}, "No picture is open, and the robots are those of the start.")

    def show_help(self, argument: str) -> None:
        """/help: what can be asked."""
        rows = [(command.usage, command.help) for command in COMMANDS]
        width = max(len(usage) for usage, _ in rows)
        self._reply(
            {"commands": dict(rows)},
            "\n".join(f"  {usage:{width}}  {words}" for usage, words in (*_LINES_HELP, *rows)),
        )

    def quit(self, argument: str) -> None:
        """/quit: end."""
        self.is_over = True

    @property
    def _writes(self) -> bool:
        return self._bitgen.config.attention_mode != "bidirectional"

    def _ask(
        self,
        picture: Path | Image.Image,
        prompt: str = "",
        task: str | None = None,
        captions: bool = True,
    ) -> Answer:
        answers = self._bitgen.answers(
            [picture], self._options, prompt=prompt, task=task, captions=captions
        )
        with contextlib.closing(answers):
            answer = next(answers)
        if answer.error is not None:
            raise answer.error
        return answer

    def _show(
        self,
        answer: Answer,
        image: Path | None = None,
        plan: Sequence[Subtask] | None = None,
    ) -> None:
        """Print an answer; a person is not told again which picture is open."""
        if self._json:
            record = answer_record(self._path, answer.caption, answer.robots, plan)
            console.json({"input": self._line, **record})
        else:
            show_answer(image, answer.caption, answer.robots, json=False, plan=plan)

    def _reply(self, record: dict[str, Any], text: str) -> None:
        if self._json:
            console.json({"input": self._line, **record})
        else:
            console.result(text)


class Command(NamedTuple):
    """What a line beginning with a slash does."""

    name: str
    arguments: str
    help: str
    run: Callable[[Conversation, str], None]

    @property
    def usage(self) -> str:
        """Name and arguments."""
        return f"{self.name} {self.arguments}".rstrip()


COMMANDS = (
    Command(
        "/image",
        "[PATH]",
        "open a picture and say what it shows; without PATH: which is open",
        Conversation.open_picture,
    ),
    Command(
        "/caption",
        "[BEGINNING]",
        "caption the open picture, in words that begin so",
        Conversation.caption,
    ),
    Command(
        "/task",
        "WORDS",
        "rank the robots for a job, by the open picture if there is one",
        Conversation.rank_robots,
    ),
    Command(
        "/explain",
        "[WORDS]",
        "the same, and which words and pieces of the picture weighed most; alone: the last job",
        Conversation.explain,
    ),
    Command(
        "/plan",
        "[WORDS]",
        "split a job into ordered subtasks with a robot each; without words: the last job",
        Conversation.plan,
    ),
    Command(
        "/robots",
        "[CATALOG.json]",
        "choose from other robots; without a file: list them",
        Conversation.show_robots,
    ),
    Command("/history", "", "list what was asked", Conversation.show_history),
    Command("/reset", "", "close the picture, forget history and other robots", Conversation.reset),
    Command("/help", "", "show this list", Conversation.show_help),
    Command("/quit", "", "end, as does Ctrl-D", Conversation.quit),
)
_ALIASES = {"/exit": "/quit", "exit": "/quit", "quit": "/quit", "help": "/help", "?": "/help"}
_LINES_HELP = (
    ("words", "the same as /task WORDS"),
    ("words...", "the same as /caption WORDS"),
    ("photo.jpg", "the same as /image photo.jpg; most terminals write it when a file is dropped"),
)


def _named_file(text: str) -> Path | None:
    """The file that a path names, also as a shell or a terminal quotes it, if there is one."""
    names = [text, os.path.expanduser(text)]
    with contextlib.suppress(ValueError):
        words = shlex.split(text)
        names += map(os.path.expanduser, words if len(words) == 1 else [])
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            if Path(name).is_file():
                return Path(name)
    return None


def _dropped_picture(line: str) -> Path | None:
    """The picture that a line consists of; None where it is words."""
    from bitgen.dataset.images import IMAGE_SUFFIXES

    path = _named_file(line)
    return path if path is not None and path.suffix.lower() in IMAGE_SUFFIXES else None
