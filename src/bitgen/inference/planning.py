"""Plans written by a model under their grammar. No torch.

    <|plan|> task -> reader -> logits --among what the grammar allows--> token --.
                        ^---------------------------------------------------------'

Where the grammar leaves one token alone the model is not asked: such tokens are read together with
the next one that it chooses. Whatever the logits are, what comes out is a whole plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitgen.dataset.plan_grammar import PlanCursor, PlanGrammar
from bitgen.errors import InputError
from bitgen.inference.options import check_options, check_seed

ROBOT_CHOOSERS = ("auto", "decoder", "selector")


@dataclass(frozen=True)
class PlanOptions:
    """How plans are written.

    Attributes:
        max_subtasks: most subtasks of a plan.
        max_subtask_tokens: most tokens of a subtask's words.
        max_tokens: most tokens of the whole plan; fewer where the model has no room for them.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: of the draws; None draws differently each time.
        robots_by: who gives each subtask its robot. decoder: the model, as it writes; selector:
            the robot selector, asked with the subtask's words, which also judges robots that the
            model was not trained with; auto: the selector where the catalog has such robots and the
            model a trained selector, else the decoder.

    Raises:
        InputError: a value out of range.
    """

    max_subtasks: int = 8
    max_subtask_tokens: int = 32
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    robots_by: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_subtasks", "max_subtask_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_options(
            max_tokens=self.max_tokens, beam_size=1, length_penalty=1.0,
            temperature=self.temperature, top_k=0, top_p=1.0,
        )  # fmt: skip
        if self.seed is not None:
            check_seed(self.seed)
        if self.robots_by not in ROBOT_CHOOSERS:
            raise InputError(
                f"robots_by (--plan_robots) must be one of {', '.join(ROBOT_CHOOSERS)}; got"
                f" {self.robots_by!r}."
            )


class TextReader(Protocol):
    """A text that a model reads, piece by piece."""

    @property
    def length(self) -> int:
        """Tokens read so far, prompt and picture among them."""
        ...

    def read(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read on, at least one token: logits `[V]` of the one behind."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; the prompt stays."""
        ...


def write_plan(
    reader: TextReader,
    grammar: PlanGrammar,
    options: PlanOptions,
    robot_scores: Callable[[str], npt.NDArray[np.floating]] | None = None,
) -> PlanCursor:
    """Write a plan behind what the reader has read; the cursor behind its end.

    Args:
        reader: has read the task.
        grammar: what may be written.
        options: temperature and seed; the rest is the grammar's.
        robot_scores: natural logarithms of how well each robot of the catalog suits a subtask's
            words, `[R]`; None has the decoder choose.
    """
    cursor = grammar.cursor()
    seed = None if options.seed is None else options.seed % 2**64
    random = np.random.default_rng(seed)
    unread: list[int] = []
    scores_R: npt.NDArray[np.floating]

    def write(tokens: Sequence[int]) -> None:
        for token in tokens:
            cursor.advance(token)
        unread.extend(tokens)

    while not cursor.is_done:
        if cursor.chooses_robot:
            if robot_scores is None:
                scores_R = name_log_probabilities(reader, unread, grammar.names)
                unread.clear()
            else:
                scores_R = robot_scores(cursor.words)
            write(grammar.names[choose(scores_R, options.temperature, random)])
            continue
        allowed = cursor.allowed()
        if len(allowed) > 1:
            logits = reader.read(unread)[allowed]
            unread.clear()
            write([int(allowed[choose(logits, options.temperature, random)])])
        else:
            write(allowed.tolist())
    return cursor


def choose(
    scores: npt.NDArray[np.floating], temperature: float, random: np.random.Generator
) -> int:
    """The index of the highest score, or one drawn with the softmax of scores over temperature.

    Scores that are no numbers count as the lowest: there is always a choice.
    """
    scores = _finite(scores)
    if temperature == 0:
        return int(scores.argmax())
    weights = np.exp(np.clip((scores - scores.max()) / temperature, -700, 0))
    return int(random.choice(len(scores), p=weights / weights.sum()))


def name_log_probabilities(
    reader: TextReader, ids: Sequence[int], names: Sequence[tuple[int, ...]]
) -> npt.NDArray[np.float64]:
    """How likely each name comes next behind `ids`, among these names: log-probabilities `[R]`.

    The reader has read `ids` afterwards, and nothing behind. Of equal names all but the first are
    impossible.
    """
    log_probability_R = np.full(len(names), -np.inf)

    def visit(logits: npt.NDArray[np.float32], members: list[int], depth: int, sum_: float) -> None:
        branches: dict[int, list[int]] = {}
        for member in members:
            branches.setdefault(names[member][depth], []).append(member)
        scores = _finite(logits[list(branches)])
        scores = scores - np.logaddexp.reduce(scores)
        for (token, found), score in zip(branches.items(), scores, strict=True):
            if len({names[member] for member in found}) == 1:
                log_probability_R[found[0]] = sum_ + score
                continue
            length = reader.length
            visit(reader.read([token]), found, depth + 1, sum_ + score)
            reader.rewind(length)

    visit(reader.read(ids), list(range(len(names))), 0, 0.0)
    return log_probability_R


def _finite(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(scores.astype(np.float64), nan=-1e30, posinf=1e30, neginf=-1e30)
