"""What the grammar lets be written is JSON, fits the limits, and names robots of the catalog."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.dataset.plan_grammar import PlanFormat, PlanGrammar, PlanLimits
from bitgen.dataset.plans import Subtask, clean_subtask
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError

TEXTS = [
    "Look for a way around the fallen tree", "Carry the saw to the tree", "Робот ищет дорогу",
    "机器人 寻找 道路", '"quoted", "names"],[', "[[1,2],[3,4]]", 'tab\t back\\slash "',
]  # fmt: skip
TOKENIZER = Tokenizer.train(TEXTS * 3, 420)
FORMAT = PlanFormat(TOKENIZER)
NAMES = ("Drone", "Robot", "Robot with Legs")

# Any text but lone surrogates, which no file in UTF-8 holds.
names_of_robots = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: bool(name.strip())
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda name: name.casefold(),
)


def written(
    grammar: PlanGrammar, choose: Callable[[npt.NDArray[np.int64]], int]
) -> tuple[list[int], list[Subtask]]:
    cursor = grammar.cursor()
    while not cursor.is_done:
        allowed = cursor.allowed()
        assert len(allowed) and len(set(allowed.tolist())) == len(allowed)
        cursor.advance(choose(allowed))
    assert len(cursor.allowed()) == 0
    return cursor.tokens, cursor.subtasks


@settings(deadline=None, max_examples=60)
@given(
    robots=names_of_robots,
    max_subtasks=st.integers(1, 12),
    max_subtask_tokens=st.integers(1, 20),
    spare_tokens=st.integers(0, 120),
    taste=st.integers(-8, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_chosen_parses_and_keeps_the_limits(
    robots: list[str], max_subtasks: int, max_subtask_tokens: int, spare_tokens: int, taste: int,
    seed: int,
) -> None:  # fmt: skip
    longest = max(len(FORMAT.robot_name(name)) for name in robots)
    limits = PlanLimits(max_subtasks, max_subtask_tokens, longest + 12 + spare_tokens)
    grammar = PlanGrammar(FORMAT, robots, limits)
    random = np.random.default_rng(seed)
    # Random logits; the quote and the comma are liked or disliked, for short and for long plans.
    bias = np.zeros(TOKENIZER.vocab_size)
    bias[[FORMAT.quote_id, *FORMAT.frame(",")]] = taste

    def choose(allowed: npt.NDArray[np.int64]) -> int:
        scores = random.normal(size=len(bias)) * 2 + bias
        return int(allowed[np.argmax(scores[allowed])])

    tokens, subtasks = written(grammar, choose)
    assert len(tokens) <= limits.max_tokens
    rows = json.loads(TOKENIZER.decode(tokens))
    assert 1 <= len(rows) <= max_subtasks
    orders = [order for order, _, _ in rows]
    assert orders[0] == 1
    assert all(after - before in (0, 1) for before, after in zip(orders, orders[1:], strict=False))
    for (order, words, name), subtask in zip(rows, subtasks, strict=True):
        assert (order, " ".join(words.split())) == (subtask.order, subtask.subtask)
        assert subtask.subtask and len(TOKENIZER.encode(words)) <= 4 * max_subtask_tokens
        assert subtask.robot in robots
        # A name is spelled as it is: but for white space, and where it spells a special token.
        if "<|" not in subtask.robot:
            assert " ".join(name.split()) == " ".join(subtask.robot.split())


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(
            st.booleans(),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
                lambda text: bool(clean_subtask(text)) and "<|" not in text
            ),
            st.sampled_from(NAMES),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_trained_on_is_what_may_be_written(steps: list[tuple[bool, str, str]]) -> None:
    order, subtasks = 1, []
    for number, (is_later, words, robot) in enumerate(steps):
        order += is_later and number > 0
        subtasks.append(Subtask(order, clean_subtask(words), robot))
    ids, has_choice = FORMAT.encode(subtasks, max_tokens=10_000)
    cursor = PlanGrammar(FORMAT, NAMES, PlanLimits(12, 1000, 10_000)).cursor()
    for token, chosen in zip(ids, has_choice, strict=True):
        assert chosen or cursor.allowed().tolist() == [token]
        cursor.advance(token)
    assert cursor.is_done and cursor.subtasks == subtasks


def test_plans_read_so() -> None:
    subtasks = [
        Subtask(1, "Look", "Drone"),
        Subtask(1, "Carry", "Robot"),
        Subtask(2, "Go", "Drone"),
    ]
    ids, _ = FORMAT.encode(subtasks, 100)
    assert (
        TOKENIZER.decode(ids) == '[[1," Look"," Drone"],[1," Carry"," Robot"],[2," Go"," Drone"]]'
    )
    assert ids[5 : 5 + len(TOKENIZER.encode("Look"))] == TOKENIZER.encode("Look")


def test_long_plans_lose_subtasks_and_then_words() -> None:
    subtasks = [Subtask(number, "Look for a way", "Drone") for number in range(1, 12)]
    whole, _ = FORMAT.encode(subtasks, 10_000)
    for limit in range(12, len(whole) + 1, 7):
        ids, has_choice = FORMAT.encode(subtasks, limit)
        rows = json.loads(TOKENIZER.decode(ids))
        assert len(ids) == len(has_choice) <= max(limit, 12 + len(FORMAT.robot_name("Drone")))
        assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
        assert all(row[1] == " Look for a way" for row in rows[1:])
    assert FORMAT.encode(subtasks, len(whole))[0] == whole
    assert len(json.loads(TOKENIZER.decode(FORMAT.encode(subtasks, len(whole) - 1)[0]))) == 10


def test_a_name_that_begins_another_one_may_end_or_go_on() -> None:
    for name in NAMES:
        cursor = PlanGrammar(FORMAT, NAMES).cursor()
        for token in FORMAT.encode([Subtask(1, "Go", name)], 100)[0]:
            cursor.advance(token)
        assert cursor.subtasks == [Subtask(1, "Go", name)]


def test_a_token_that_may_not_follow_is_refused() -> None:
    cursor = PlanGrammar(FORMAT, NAMES).cursor()
    with pytest.raises(ValueError, match="may not follow"):
        cursor.advance(FORMAT.quote_id)


def test_limits_and_tokenizers_that_cannot_be() -> None:
    with pytest.raises(InputError, match="catalog has none"):
        PlanGrammar(FORMAT, [])
    with pytest.raises(InputError, match="room for 9 tokens, and the shortest plan takes"):
        PlanGrammar(FORMAT, NAMES, PlanLimits(max_tokens=9))
    with pytest.raises(InputError, match="max_subtasks must be at least 1"):
        PlanLimits(max_subtasks=0)
    content = json.loads(TOKENIZER.to_json())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(InputError, match="not byte-level"):
        PlanFormat(Tokenizer.from_json(json.dumps(content)))
    content = json.loads(TOKENIZER.to_json())
    del content["model"]["vocab"]["]"]
    content["model"]["merges"] = []
    with pytest.raises(InputError, match="no token for some bytes"):
        PlanFormat(Tokenizer.from_json(json.dumps(content)))
