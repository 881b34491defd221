"""The text of plans, token by token: how it is written down, and what may come next in it.

    [[1," Look for a way around"," Drone"],[1," Carry the saw there"," Robot with Legs"],[2,...]]

A plan is a JSON list of [order, subtask, robot]. Each character of the frame (brackets, commas,
quotes, digits) is a token of its own; the words between are encoded as words are anywhere, so that
they are the tokens that captions and tasks have taught. Their first token begins with a space,
which is no part of them.

`PlanCursor` walks through such a text and tells at each token which ones may follow, so that
whatever chooses among them writes a whole plan:

    frame --> words of the subtask --> robot of the catalog --> end
                      ^------- comma, same or next order <------'

Only where there is a choice does a model have anything to say, or to learn. No torch here.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bitgen.dataset.plans import Subtask
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError

_Ids: TypeAlias = tuple[int, ...]

# The characters that a JSON text holds without an escape, in UTF-8 (RFC 3629): by state, ranges of
# the next byte with the state behind it. State 0 is between characters.
_UTF8: tuple[tuple[tuple[int, int, int], ...], ...] = (
    (
        (0x20, 0x21, 0), (0x23, 0x5B, 0), (0x5D, 0x7E, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4),
        (0xE1, 0xEC, 2), (0xED, 0xED, 5), (0xEE, 0xEF, 2), (0xF0, 0xF0, 6), (0xF1, 0xF3, 3),
        (0xF4, 0xF4, 7),
    ),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0x80, 0xBF, 2),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
    ((0x90, 0xBF, 2),),
    ((0x80, 0x8F, 2),),
)  # fmt: skip
_NO_STATE = -1
_MISSING_BYTES = np.array([0, 1, 2, 3, 2, 2, 3, 3])
"""By state, the bytes (each a token, if need be) that are missing to the end of the character."""
_MOST_TOKENS_TO_END = 4
"""Of words: three bytes of a character, and one token that is more than space."""


@dataclass(frozen=True)
class PlanLimits:
    """How long a plan may become.

    Raises:
        InputError: a limit below 1.
    """

    max_subtasks: int = 8
    max_subtask_tokens: int = 32
    max_tokens: int = 256
    """Of the whole text."""

    def __post_init__(self) -> None:
        for name in ("max_subtasks", "max_subtask_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")


class PlanFormat:
    """How plans are written down in the tokens of one tokenizer.

    Attributes:
        tokenizer: the tokenizer.
        token_bytes: what each token spells; None for special ones.
        quote_id: the token that ends words and names.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises InputError for a tokenizer that is not byte-level, or lacks single bytes."""
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes()
        self._byte_ids = {
            text[0]: i for i, text in enumerate(self.token_bytes) if text and len(text) == 1
        }
        if len(self._byte_ids) < 256:
            raise InputError(
                "The tokenizer has no token for some bytes: plans cannot be framed by it.",
                remedy="Take a byte-level one, such as `bitgen train` makes.",
            )
        self.quote_id = self._byte_ids[ord('"')]

    def frame(self, text: str) -> _Ids:
        """A piece of the frame: one token a character."""
        return tuple(self._byte_ids[byte] for byte in text.encode())

    def opening(self, order: int, is_first: bool) -> _Ids:
        """What stands before the words of a subtask, from the bracket or comma before it on."""
        return self.frame(f'{"[" if is_first else ","}[{order},"')

    def robot_name(self, name: str) -> _Ids:
        """A robot's name with its closing quote."""
        spelled = json.dumps(name, ensure_ascii=False)[1:-1]
        return (*self.tokenizer.encode(spelled), self.quote_id)

    def encode(self, subtasks: Sequence[Subtask], max_tokens: int) -> tuple[list[int], list[bool]]:
        """The tokens of a plan, and at which of them there was a choice.

        Subtasks that do not fit are left out from the end; of the first one, words.

        Args:
            subtasks: in their order, with words as `bitgen.dataset.plans.clean_subtask` makes them.
            max_tokens: of the whole text.
        """
        ids: list[int] = []
        has_choice: list[bool] = []
        for number, subtask in enumerate(subtasks):
            is_first = number == 0
            comma, bracket, *order, _, _ = self.opening(subtask.order, is_first)
            words = self.tokenizer.encode(subtask.subtask)
            name = self.robot_name(subtask.robot)
            framed = len(order) + len(name) + len(',[,"",""]]') - 1
            room = max_tokens - len(ids) - framed
            if len(words) > room:
                if not is_first:
                    break
                words = words[: max(1, room)]
            for piece, chosen in (
                ([comma], not is_first),  # or the end
                ([bracket], False),
                (order, not is_first),  # the same, or the next
                (self.frame(',"'), False),
                ([*words, self.quote_id], True),
                (self.frame(',"'), False),
                (name, True),
                (self.frame("]"), False),
            ):
                ids += piece
                has_choice += [chosen] * len(piece)
        return [*ids, *self.frame("]")], [*has_choice, True]


class PlanGrammar:
    """Every plan that a model may write for one catalog, within the limits.

    Attributes:
        format: how they are written down.
        robots: names of the catalog.
        limits: how long they may become.
        names: each robot's name in tokens, with its closing quote.
        words: which tokens may stand among a subtask's words.
        tokens_behind_words: what has to follow them at most, up to the end of the plan.
    """

    def __init__(
        self, plan_format: PlanFormat, robots: Sequence[str], limits: PlanLimits | None = None
    ) -> None:
        """Raises InputError where there is no robot, or no room for the shortest plan."""
        if not robots:
            raise InputError("A plan needs robots, and the catalog has none.")
        self.format = plan_format
        self.robots = tuple(robots)
        self.limits = limits or PlanLimits()
        self.names = [plan_format.robot_name(name) for name in robots]
        self.words = _Words(plan_format.token_bytes)
        self.tokens_behind_words = len('","]]') + max(map(len, self.names))
        shortest = len(plan_format.opening(1, True)) + 1 + self.tokens_behind_words
        if self.limits.max_tokens < shortest:
            raise InputError(
                f"There is room for {self.limits.max_tokens} tokens, and the shortest plan takes"
                f" {shortest}.",
                remedy="Allow more tokens, or shorten the task.",
            )

    def cursor(self) -> PlanCursor:
        """At the beginning of a plan."""
        return PlanCursor(self)


class PlanCursor:
    """A plan that is being written: what may come next, and what has come.

    Attributes:
        tokens: ids so far.
        subtasks: those that have their robot.
        words: of the subtask that is being written, or was written last.
        chooses_robot: whether a robot's name comes next.
        is_done: whether the plan is whole.
    """

    def __init__(self, grammar: PlanGrammar) -> None:
        self._grammar, self._format = grammar, grammar.format
        self.tokens: list[int] = []
        self.subtasks: list[Subtask] = []
        self.words = ""
        self.chooses_robot = self.is_done = False
        # Of the words, while they are written: when they are done, bytes, state of UTF-8, tokens.
        self._order, self._text, self._state, self._num_word_tokens = 1, b"", 0, 0
        self._expect({self._format.opening(1, True): partial(self._begin_words, 1)})

    def allowed(self) -> npt.NDArray[np.int64]:
        """The ids that may come next, each once; none behind a whole plan."""
        if self._options is not None:
            return np.array(sorted({option[self._position] for option in self._options}))
        ids = self._grammar.words.allowed(self._state, bool(self.words), self._word_tokens_left())
        may_end = bool(self.words) and self._state == 0
        return np.append(ids, self._format.quote_id) if may_end else ids

    def advance(self, token: int) -> None:
        """Go on behind a token that is allowed. Raises ValueError for another one."""
        if token not in self.allowed():
            raise ValueError(f"Token {token} may not follow here.")
        self.tokens.append(token)
        if self._options is not None:
            self._advance_option(token, self._options)
        elif token == self._format.quote_id:
            self._expect({self._format.frame(',"'): self._begin_robot})
        else:
            self._num_word_tokens += 1
            self._state = self._grammar.words.next_state(self._state, token)
            self._text += self._format.token_bytes[token] or b""
            self.words = " ".join(self._text.decode(errors="ignore").split())

    # In the frame, one of several sequences comes next; each leads on to something. ---------------

    def _expect(self, options: dict[_Ids, Callable[[], None]]) -> None:
        self._options: dict[_Ids, Callable[[], None]] | None = options
        self._position = 0

    def _advance_option(self, token: int, options: dict[_Ids, Callable[[], None]]) -> None:
        position = self._position
        self.chooses_robot = False
        self._options = {o: lead for o, lead in options.items() if o[position] == token}
        self._position += 1
        for option, lead in self._options.items():
            if len(option) == self._position:  # no option begins with another one
                lead()
                return

    def _begin_words(self, order: int) -> None:
        self._order = order
        self._options = None
        self.words, self._text, self._state, self._num_word_tokens = "", b"", 0, 0

    def _begin_robot(self) -> None:
        options: dict[_Ids, Callable[[], None]] = {}
        for name, ids in zip(self._grammar.robots, self._grammar.names, strict=True):
            # Of robots that are spelled alike the first one is meant.
            options.setdefault(ids, partial(self._end_robot, name))
        self._expect(options)
        self.chooses_robot = True

    def _end_robot(self, name: str) -> None:
        self.subtasks.append(Subtask(self._order, self.words, name))
        options: dict[_Ids, Callable[[], None]] = {self._format.frame("]]"): self._finish}
        limits = self._grammar.limits
        for order in (self._order, self._order + 1):
            again = (*self._format.frame("]"), *self._format.opening(order, False))
            needed = len(again) + 1 + self._grammar.tokens_behind_words
            fits = len(self.tokens) + needed <= limits.max_tokens
            if fits and len(self.subtasks) < limits.max_subtasks:
                options[again] = partial(self._begin_words, order)
        self._expect(options)

    def _finish(self) -> None:
        self._expect({})
        self.is_done = True

    # Among words, any token may come that leaves room for the end. --------------------------------

    def _word_tokens_left(self) -> int:
        limits = self._grammar.limits
        in_plan = limits.max_tokens - len(self.tokens) - self._grammar.tokens_behind_words
        return min(in_plan, limits.max_subtask_tokens - self._num_word_tokens)


class _Words:
    """Which tokens may stand in a JSON text, and still be ended as whole characters of UTF-8."""

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        steps = [[_NO_STATE] * 256 for _ in _UTF8]
        for state, ranges in enumerate(_UTF8):
            for first, last, behind in ranges:
                steps[state][first : last + 1] = [behind] * (last + 1 - first)
        self._states_SV = np.full((len(_UTF8), len(token_bytes)), _NO_STATE, dtype=np.int64)
        # A letter at least, whatever stands before it.
        self._has_content_V = np.zeros(len(token_bytes), dtype=bool)
        for token, text in enumerate(token_bytes):
            if not text:
                continue
            self._has_content_V[token] = any(0x20 < byte < 0x7F for byte in text)
            for state in range(len(_UTF8)):
                behind = state
                for byte in text:
                    behind = steps[behind][byte]
                    if behind == _NO_STATE:
                        break
                self._states_SV[state, token] = behind
        self._allowed: dict[tuple[int, bool, int], npt.NDArray[np.int64]] = {}

    def next_state(self, state: int, token: int) -> int:
        """The state behind a token that is allowed."""
        return int(self._states_SV[state, token])

    def allowed(self, state: int, has_content: bool, left: int) -> npt.NDArray[np.int64]:
        """The ids that may follow where so many tokens are left.

        Args:
            state: of `_UTF8`.
            has_content: whether there is more than space so far; there has to be in the end.
            left: tokens up to the end of the words.
        """
        left = min(left, _MOST_TOKENS_TO_END + 1)
        key = (state, has_content, left)
        if key not in self._allowed:
            states_V = self._states_SV[state]
            to_end_V = _MISSING_BYTES[states_V] + ~(self._has_content_V | has_content)
            self._allowed[key] = np.flatnonzero((states_V != _NO_STATE) & (to_end_V < left))
        return self._allowed[key]
