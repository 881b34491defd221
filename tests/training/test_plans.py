"""Plans that are trained on: what carries loss, how often they come, and that they are learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.collate import IGNORED_LABEL
from bitgen.dataset.images import ImageCache
from bitgen.dataset.plans import Subtask, TaskPlan
from bitgen.dataset.robots import load_catalog
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ConfigError
from bitgen.inference.predictor import BitGen
from bitgen.model.bitgen import BitGenModel
from bitgen.training.setup import check_plans_fit
from bitgen.training.trainer import Trainer

CATALOG = load_catalog()
PLANS = [
    TaskPlan("look for the dog", (Subtask(1, "fly over the park", "Drone"),)),
    TaskPlan(
        "clean the pool",
        (
            Subtask(1, "empty the filter", "Humanoid"),
            Subtask(1, "scrub the floor", "Underwater Robot"),
            Subtask(2, "carry the dirt away", "Robot with Wheels"),
        ),
    ),
]
TOKENIZER = Tokenizer.train(
    [text for p in PLANS for text in (p.task, *(s.subtask for s in p.subtasks))] * 3
    + [robot.text() for robot in CATALOG],
    400,
)
CONFIG = BitGenConfig.preset(
    "nano", vocab_size=TOKENIZER.vocab_size, hidden_size=64, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=32, intermediate_size=128, image_size=32, encoder_hidden_size=32,
    encoder_layers=1, encoder_heads=2, encoder_intermediate_size=64,
)  # fmt: skip
TRAINING = TrainingConfig(
    batch_size=4, max_steps=120, num_epochs=200, warmup_steps=5, learning_rate=5e-3, device="cpu",
    precision="fp32", weights_every=0, eval_every=60, save_every=120, plan_repeats=3,
)  # fmt: skip


def dataset(tmp_path: Path, training_mode: bool = True, **changes: object) -> TrainingSet:
    return TrainingSet(
        images=[],
        tasks=[],
        cache=ImageCache(tmp_path / "cache", CONFIG.image_size, "crop"),
        tokenizer=TOKENIZER,
        config=replace(CONFIG, **changes),
        training=TRAINING,
        robot_names=[robot.name for robot in CATALOG],
        training_mode=training_mode,
        plans=PLANS,
    )


def test_a_plan_is_a_prompt_and_json_with_loss_where_there_is_a_choice(tmp_path: Path) -> None:
    samples = dataset(tmp_path)
    assert len(samples) == 2 * TRAINING.plan_repeats and samples.texts_have_loss
    assert len(dataset(tmp_path, training_mode=False)) == 2
    sample = samples[3]
    assert sample.input_ids == samples[1].input_ids and sample.is_plan
    assert samples.lengths(0).tolist() == [len(samples[i].input_ids) for i in range(len(samples))]
    prompt = sample.input_ids[: sample.num_prefix]
    assert prompt == TOKENIZER.encode_plan_task("clean the pool")
    assert TOKENIZER.decode(sample.input_ids[sample.num_prefix :]).startswith(
        '[[1," empty the filter"," Humanoid"],[1," scrub'
    )
    assert sample.labels is not None and sample.labels[: sample.num_prefix + 5] == (
        [IGNORED_LABEL] * (sample.num_prefix + 5)
    )
    learnt = [token for token in sample.labels if token != IGNORED_LABEL]
    assert TOKENIZER.decode(learnt) == (
        'empty the filter" Humanoid",1 scrub the floor" Underwater Robot",2 carry the dirt away"'
        ' Robot with Wheels"]'
    )
    batch = samples.collate([samples[0], samples[1]])
    assert batch.is_plan.all() and (batch.labels[0] != IGNORED_LABEL).any()


def test_models_that_cannot_hold_or_write_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bidirectional"):
        dataset(tmp_path, attention_mode="bidirectional")
    samples = dataset(tmp_path)
    check_plans_fit(BitGenModel(CONFIG), samples)
    short = replace(CONFIG, max_positions=samples.longest_plan)
    with pytest.raises(ConfigError, match="A plan takes") as caught:
        check_plans_fit(BitGenModel(short), samples)
    assert "--max_plan_tokens" in (caught.value.remedy or "")


def test_plans_are_learnt_by_heart(tmp_path: Path) -> None:
    trainer = Trainer(
        BitGenModel(CONFIG),
        dataset(tmp_path),
        dataset(tmp_path, training_mode=False),
        TOKENIZER,
        CATALOG,
        TRAINING,
        tmp_path / "run",
        {"train_plans": 2},
    )
    summary = trainer.train()
    assert summary.validation is not None and summary.validation.loss is None
    assert summary.validation.plan_loss is not None and summary.validation.plan_loss < 0.2
    assert summary.best_loss == pytest.approx(summary.validation.plan_loss, abs=0.05)
    for backend in ("auto", "torch"):
        bitgen = BitGen.load(tmp_path / "run", backend=backend, device="cpu")
        for plan in PLANS:
            assert tuple(bitgen.plan(plan.task)) == plan.subtasks
