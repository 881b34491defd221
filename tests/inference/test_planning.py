"""Plans that models write: whole whatever the logits, on both backends, and who chooses robots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.dataset.plan_grammar import PlanFormat, PlanGrammar, PlanLimits
from bitgen.dataset.plans import Subtask
from bitgen.dataset.robots import Robot, load_catalog
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError
from bitgen.inference.planning import PlanOptions, choose, name_log_probabilities, write_plan
from bitgen.inference.predictor import BitGen
from bitgen.kernels import library

TOKENIZER = Tokenizer.train(["Look around", "Carry the saw", "Robot with legs"] * 3, 400)
FORMAT = PlanFormat(TOKENIZER)
TRAINED = {"data": {"train_plans": 9}}


class RandomReader:
    """Logits that depend on what was read alone; some are no numbers."""

    def __init__(self, seed: int, scale: float) -> None:
        self.seed, self.scale, self.ids = seed, scale, [1]
        self.longest = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        assert ids
        self.ids += ids
        self.longest = max(self.longest, len(self.ids) - 1)
        random = np.random.default_rng([self.seed, *self.ids])
        logits = random.normal(size=TOKENIZER.vocab_size) * self.scale
        logits[random.random(len(logits)) < 0.2] = random.choice([np.nan, np.inf, -np.inf])
        return logits.astype(np.float32)

    def rewind(self, length: int) -> None:
        del self.ids[length:]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1.0, 1e30]),
    robots=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10).filter(
            str.strip
        ),
        min_size=1,
        max_size=4,
        unique_by=str.casefold,
    ),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 1e6]),
)
def test_random_models_write_whole_plans(
    seed: int, scale: float, robots: list[str], temperature: float
) -> None:
    grammar = PlanGrammar(FORMAT, robots, PlanLimits(max_subtasks=4, max_tokens=150))
    reader = RandomReader(seed, scale)
    options = PlanOptions(temperature=temperature, seed=seed)
    cursor = write_plan(reader, grammar, options)
    rows = json.loads(TOKENIZER.decode(cursor.tokens))
    assert [row[0] for row in rows] == [subtask.order for subtask in cursor.subtasks]
    assert 1 <= len(rows) <= 4 and {s.robot for s in cursor.subtasks} <= set(robots)
    assert reader.ids[1:] == cursor.tokens[: reader.length - 1] and reader.longest <= 150
    again = write_plan(RandomReader(seed, scale), grammar, options)
    assert again.tokens == cursor.tokens


def test_names_are_as_likely_as_their_tokens_one_after_the_other() -> None:
    names = [FORMAT.robot_name(name) for name in ("Robot", "Robot with legs", "Saw", "Robot")]
    reader = RandomReader(3, 1.0)
    reader.read = lambda ids: np.log(np.arange(1, 1 + TOKENIZER.vocab_size, dtype=np.float32))  # type: ignore[method-assign]
    found = name_log_probabilities(reader, [1], names)
    first, saw = names[0][0], names[2][0]
    quote, longer = names[0][-1], names[1][len(names[0]) - 1]
    robot = (first + 1) / (first + saw + 2)
    assert len(names[0]) > 1 and first != saw
    np.testing.assert_allclose(
        np.exp(found),
        [
            robot * (quote + 1) / (quote + longer + 2),
            robot * (longer + 1) / (quote + longer + 2),
            1 - robot,
            0,
        ],
        rtol=1e-5,
    )


def test_drawn_choices_follow_the_softmax() -> None:
    random = np.random.default_rng(0)
    scores = np.log(np.array([0.1, 0.6, 0.3]))
    drawn = np.bincount([choose(scores, 1.0, random) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, [0.1, 0.6, 0.3], atol=0.03)
    assert {choose(scores, 1e-6, random) for _ in range(50)} == {1}


@pytest.fixture
def load(make_run: Callable[..., Path]) -> Callable[..., BitGen]:
    """Loads one random model, which says that it was trained on plans."""
    run = make_run(robot_names=tuple(robot.name for robot in load_catalog()))

    def loaded(backend: str, **data: Any) -> BitGen:
        bitgen = BitGen.load(run, backend=backend)
        bitgen.info = {"data": {"train_plans": 9, **data}}
        return bitgen

    return loaded


@pytest.mark.skipif(not library.is_usable(), reason="needs the native kernels")
@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("robots_by", ["decoder", "selector"])
def test_the_native_engine_writes_what_pytorch_writes(
    load: Callable[..., BitGen], robots_by: str, with_image: bool
) -> None:
    from PIL import Image

    picture = Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    image = picture if with_image else None
    options = PlanOptions(max_subtasks=3, robots_by=robots_by)
    native, torch = (
        load(backend, train_plans_with_image=int(with_image)).plan(
            "bring the red ball", image, options=options
        )
        for backend in ("native", "torch")
    )
    assert native == torch
    assert {subtask.robot for subtask in native} <= {robot.name for robot in load_catalog()}


def test_the_cached_text_is_the_whole_text(load: Callable[..., BitGen]) -> None:
    import torch

    bitgen = load("torch")
    prompt = bitgen.tokenizer.encode_plan_task("bring the red ball")
    reader = bitgen._torch_backend("").read_text(prompt, None, 20)
    reader.read([70, 71, 72])
    reader.rewind(len(prompt) + 1)
    found = reader.read([80, 81])
    mask = bitgen.model.build_attention_mask(
        torch.ones(1, len(prompt) + 3, dtype=torch.bool),
        torch.tensor([len(prompt)]),
        has_images=False,
    )
    with torch.inference_mode():
        whole = bitgen.model(torch.tensor([[*prompt, 70, 80, 81]]), attention_mask=mask)
    np.testing.assert_allclose(found, whole.logits[0, -1].numpy(), atol=1e-4)


def test_pictures_reach_the_decoder_only_where_plans_had_some(load: Callable[..., BitGen]) -> None:
    from PIL import Image

    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    blind = load("torch")
    assert (
        blind.plan("fetch", pictures[0]) == blind.plan("fetch", pictures[1]) == blind.plan("fetch")
    )
    seeing = load("torch", train_plans_with_image=3)
    assert seeing.plan("fetch", pictures[0]) != seeing.plan("fetch")


def test_robots_that_are_new_are_chosen_by_the_selector(load: Callable[..., BitGen]) -> None:
    bitgen = load("torch")
    crane = Robot("Crane", ("lifts",), ("stands still",), ("building sites",))
    catalog = [*load_catalog(), crane]
    by_selector = PlanOptions(robots_by="selector")
    assert bitgen.plan("lift it", catalog=catalog) == bitgen.plan(
        "lift it", catalog=catalog, options=by_selector
    )
    assert bitgen.plan("lift it") == bitgen.plan(
        "lift it", options=PlanOptions(robots_by="decoder")
    )
    for subtask in bitgen.plan("lift it", catalog=catalog):
        best = bitgen.select_robots(subtask.subtask, catalog=catalog)[0]
        assert subtask.robot == best.name
    assert {s.robot for s in bitgen.plan("lift it", catalog=[crane])} == {"Crane"}


def test_limits_hold(load: Callable[..., BitGen]) -> None:
    bitgen = load("torch")
    assert len(bitgen.plan("fetch", options=PlanOptions(max_subtasks=1))) == 1
    for subtask in bitgen.plan("fetch", options=PlanOptions(max_subtask_tokens=2)):
        assert len(bitgen.tokenizer.encode(subtask.subtask)) <= 4
    drawn = PlanOptions(temperature=1.0, seed=7)
    assert bitgen.plan("fetch", options=drawn) == bitgen.plan("fetch", options=drawn)
    with pytest.raises(InputError, match="the shortest plan takes"):
        bitgen.plan("fetch " * 62)


def test_what_cannot_be_planned(make_run: Callable[..., Path], load: Callable[..., BitGen]) -> None:
    bitgen = load("torch")
    with pytest.raises(InputError, match="task is empty"):
        bitgen.plan("  ")
    bitgen.info = {}
    with pytest.raises(InputError, match="not trained on plans") as caught:
        bitgen.plan("fetch")
    assert "--plan_data" in (caught.value.remedy or "")
    blind = BitGen.load(make_run("blind", robot_names=()), backend="torch")
    blind.info = TRAINED
    assert blind.plan("fetch", catalog=[replace(load_catalog()[0], name="Crane")])[0] == Subtask(
        1,
        blind.plan("fetch", catalog=[replace(load_catalog()[0], name="Crane")])[0].subtask,
        "Crane",
    )
    with pytest.raises(InputError, match="selector was not trained"):
        blind.plan("fetch", options=PlanOptions(robots_by="selector"))
    both = BitGen.load(make_run("both", attention_mode="bidirectional"), backend="torch")
    both.info = TRAINED
    with pytest.raises(InputError, match="bidirectional"):
        both.plan("fetch")
    for wrong in ({"max_subtasks": 0}, {"temperature": -1.0}, {"robots_by": "chance"}):
        with pytest.raises(InputError):
            PlanOptions(**wrong)  # type: ignore[arg-type]
