"""What `BitGen` asks of whatever runs the model: PyTorch, or the native engine. No torch here.

A backend sees pixels and token ids; files, words and robots' names stay with `BitGen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bitgen.dataset.task_words import TaskWords
from bitgen.errors import InputError
from bitgen.inference.answers import Generation
from bitgen.inference.options import CaptionOptions, Vocabulary
from bitgen.inference.planning import TextReader

BACKENDS = ("auto", "native", "torch")


class NativeUnavailable(InputError):
    """The native engine cannot run this model here; the message says why."""


class Request(NamedTuple):
    """One picture to answer."""

    pixels_3SS: np.ndarray
    """uint8 `[3, S, S]`."""
    prompt_ids: list[int]
    """`<bos>` and the words that the caption begins with."""


@dataclass(frozen=True)
class RobotTexts:
    """The catalog as the model reads it."""

    names: tuple[str, ...]
    """A robot that was seen in training has a bias of its own, which is known by the name."""
    ids: tuple[tuple[int, ...], ...]
    """`<robot>` and the words of each robot's text."""


class TaskRequest(NamedTuple):
    """A task to rank robots for, with each picture."""

    ids: list[int]
    """`<task>` and its words."""
    robots: RobotTexts


class Reply(NamedTuple):
    """What a backend says about one picture; what was not asked for is None."""

    generation: Generation | None
    robot_logits_R: np.ndarray | None
    """float32 `[R]`, in the order of the catalog."""


class Backend(Protocol):
    """Runs one model, in evaluation mode."""

    name: str
    """`native` or `torch`."""
    num_image_tokens: int
    """P, tokens that a picture takes before the text."""
    task_words: TaskWords | None
    """What tasks' words say of the robots; None in a model that was not trained on tasks."""

    def replies(
        self,
        requests: Iterable[Request],
        vocabulary: Vocabulary,
        options: CaptionOptions,
        writes: bool,
        task: TaskRequest | None,
    ) -> Iterator[Reply]:
        """Answer one picture after the other, in order, taking requests as they are needed.

        Args:
            requests: read lazily, not many more than `options.batch_size` ahead of the replies.
            vocabulary: what the tokenizer says about ends and special tokens.
            options: how captions are written, and how many pictures are worked on at a time.
            writes: whether captions are asked for.
            task: the task to rank robots for, or None.
        """
        ...

    def robot_logits(
        self,
        task_ids: Sequence[list[int]],
        pixels: Sequence[np.ndarray | None],
        robots: RobotTexts,
    ) -> np.ndarray:
        """float32 `[B, R]`: log odds that each robot, judged by itself, suits each task.

        Args:
            task_ids: `<task>` and the words of each task.
            pixels: uint8 `[3, S, S]` of each task's picture, or None.
            robots: the catalog.
        """
        ...

    def read_text(
        self, prompt_ids: Sequence[int], pixels: np.ndarray | None, room: int
    ) -> TextReader:
        """A reader behind a prompt, for texts whose tokens are chosen elsewhere.

        Args:
            prompt_ids: at least one token; they and the picture see each other, unless the model is
                causal.
            pixels: uint8 `[3, S, S]` of the picture before them, or None.
            room: most tokens that are read behind the prompt.
        """
        ...
