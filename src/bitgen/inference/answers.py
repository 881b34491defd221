"""What a model answers: the types that both backends and the command line share. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from bitgen.errors import ImageError

Picture: TypeAlias = str | Path | Image.Image
"""A picture: the path of a file, or an open PIL image."""


@dataclass(frozen=True)
class Speculation:
    """What speculative decoding saved one row."""

    model_calls: int
    """Calls of the model until the row ended, the prompt's included; without drafts there would be
    one a token, the end of text included."""
    drafted: int
    """Tokens that the future token heads drafted."""
    accepted: int
    """Those among them that the model itself would have chosen, up to the row's end."""


@dataclass(frozen=True)
class Generation:
    """What one row generated."""

    tokens: list[int]
    """Token ids, without prompt and without end-of-text token."""
    log_probability: float
    """Sum of the natural log-probabilities that the model gives to the tokens and the end of text,
    over its whole vocabulary and at temperature 1, whatever was used to choose them."""
    finished: bool
    """Whether the end of text was generated; False where `max_tokens` cut the row off."""
    speculation: Speculation | None = None
    """None where every token took a call of the model."""


@dataclass(frozen=True)
class Caption:
    """What the model says about one picture."""

    text: str
    """The whole caption, the prompt's words included; white space is tidied."""
    tokens: list[str]
    """The text of each generated token (prompt and end of text are not among them)."""
    token_ids: list[int]
    """The ids of `tokens`."""
    log_probability: float
    """Natural logarithm of the probability of the tokens and of the text's end behind them."""
    speculation: Speculation | None = None
    """What speculative decoding saved; None where it was not used."""


@dataclass(frozen=True)
class Reason:
    """A part of what was asked, and what it did to one robot's score."""

    part: str
    """`task`, `robot` (the robot's own text) or `picture`."""
    weight: float
    """By how much the robot's log odds fall if this is left out; below 0 it speaks against it."""
    word: str | None = None
    """The word that is left out; None for a piece of the picture."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of a piece, 0 to 1 of the square that the model sees."""


@dataclass(frozen=True)
class RobotChoice:
    """How well one robot suits a task."""

    name: str
    probability: float
    chosen: bool = False
    """Whether it is sent: of at least the model's `robot_threshold`, or the likeliest where none
    is."""
    why: tuple[Reason, ...] | None = None
    """What weighed most, of each part first what weighs most; None where it was not asked for."""


@dataclass(frozen=True)
class Answer:
    """What the model says about one of many pictures, or why it cannot."""

    picture: Picture
    """As it was given."""
    caption: Caption | None = None
    """None where no caption was asked for, and of a picture that cannot be read."""
    robots: list[RobotChoice] | None = None
    """The likeliest first; None where no task was given, and of a picture that cannot be read."""
    error: ImageError | None = None
    """Why the picture cannot be read."""
    pixels_3SS: np.ndarray | None = field(default=None, repr=False, compare=False)
    """The square that the model saw: uint8 `[3, S, S]`."""
