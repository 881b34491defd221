"""Self-critical training: its gradient, what it learns, and that it resumes bitwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitgen.config import TrainingConfig
from bitgen.dataset.collate import Batch
from bitgen.errors import ConfigError
from bitgen.training.checkpoint import open_run
from bitgen.training.distributed import World
from bitgen.training.losses import self_critical_loss
from bitgen.training.self_critical import SelfCritic, leave_one_out_advantages
from tests.training.test_trainer import assert_same_weights, metrics, stop_at

MakeTraining = Callable[..., TrainingConfig]


def test_each_caption_is_judged_by_the_others() -> None:
    advantages = leave_one_out_advantages(np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    np.testing.assert_allclose(advantages, [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]])


def test_the_loss_has_the_gradient_of_minus_the_expected_reward() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    expected_reward = (logits.softmax(dim=0) * rewards).sum()
    (gradient,) = torch.autograd.grad(expected_reward, logits)
    # The mean over all pairs of captions of one token each, by their probability.
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        advantages = leave_one_out_advantages(rewards[list(pair)].numpy()[None])[0]
        loss, caption = self_critical_loss(
            logits[None, None],
            sources_M=torch.zeros(2, dtype=torch.long),
            targets_M=torch.tensor(pair),
            advantages_M=torch.tensor(advantages),
            is_reference_M=torch.zeros(2, dtype=torch.bool),
        )
        (of_pair,) = torch.autograd.grad(loss / 2, logits)
        total += of_pair * logits.detach().softmax(dim=0)[list(pair)].prod()
        assert float(caption.detach()) == 0
    torch.testing.assert_close(total, -gradient, atol=1e-6, rtol=1e-6)


def test_a_caption_that_does_not_end_is_worth_less(
    workshop: Any, make_training: MakeTraining
) -> None:
    critic = SelfCritic(
        workshop.tokenizer, [image.captions for image in workshop.images], make_training()
    )
    words = workshop.tokenizer.encode("a red square")
    whole, cut, longer = (
        critic.rewards([[ids]], [0])[0, 0]
        for ids in (
            [*words, workshop.tokenizer.eos_id],
            words,
            [*words, *workshop.tokenizer.encode("on a"), workshop.tokenizer.eos_id],
        )
    )
    assert whole > cut > 0
    assert whole > longer


def self_critical(make_training: MakeTraining, **changes: Any) -> TrainingConfig:
    values = {
        "objective": "self_critical", "num_sampled_captions": 4, "image_word_weight": 0.0,
        "learning_rate": 1e-3, "max_caption_tokens": 16,
    }  # fmt: skip
    return make_training(**{**values, **changes})


@pytest.fixture(scope="module")
def first_stage(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt something of captions."""
    from tests.training.conftest import tiny_training

    run_dir = tmp_path_factory.mktemp("first") / "run"
    training = tiny_training(num_epochs=20, batch_size=8, prompt_probability=0.0, augment=False)
    workshop.trainer(run_dir, training, val_set=None).train()
    return run_dir


def start_from(trainer: Any, run_dir: Path) -> Any:
    from bitgen.training.checkpoint import load_model_tensors, read_tensors

    path = open_run(run_dir).model_path
    load_model_tensors(trainer.model, read_tensors(path), path)
    return trainer


@pytest.mark.slow
def test_it_raises_the_reward_and_the_best_is_chosen_by_cider(
    workshop: Any,
    make_training: MakeTraining,
    make_events: Callable[..., Any],
    first_stage: Path,
    tmp_path: Path,
) -> None:
    events = make_events()
    training = self_critical(
        make_training,
        learning_rate=8e-3,
        num_epochs=15,
        batch_size=8,
        augment=False,
        eval_every=15,
        keep_checkpoints=9,
    )
    made = workshop.trainer(tmp_path / "run", training, callback=events, validate_first=True)
    summary = start_from(made, first_stage).train()
    steps = events.of("step")
    rewards = [step.reward for step in steps if step.reward is not None]
    assert np.mean(rewards[-10:]) > 1.5 * np.mean(rewards[:10])
    # Robots are trained beside it; the captions of the data are not.
    assert any(step.robot_loss is not None for step in steps)
    assert all(step.loss is None for step in steps)
    assert all(step.tokens > 0 for step in steps if step.reward is not None)
    validations = events.of("validation")
    assert validations[0].step == 0
    assert validations[-1].cider > validations[0].cider
    best = max(validations, key=lambda report: report.cider)
    assert (summary.best_step, summary.best_cider) == (best.step, best.cider)
    assert open_run(tmp_path / "run").step == best.step
    assert (tmp_path / "run" / "checkpoints" / "step_000000").is_dir()
    assert [line["cider"] for line in metrics(tmp_path / "run", "validation")] == [
        report.cider for report in validations
    ]


@pytest.mark.parametrize("changes", [{}, {"num_experts": 2}], ids=["dense", "experts"])
def test_captions_of_the_data_may_be_trained_beside_it(
    workshop: Any,
    make_training: MakeTraining,
    make_config: Any,
    make_events: Callable[..., Any],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    training = self_critical(
        make_training, cross_entropy_weight=0.5, image_word_weight=1.0, max_steps=3
    )
    events = make_events()
    workshop.trainer(tmp_path / "run", training, make_config(**changes), events).train()
    for step in events.of("step"):
        assert step.loss is not None and step.loss > 0
        assert step.image_word_loss is not None
        assert "self_critical" in step.other_losses
        assert ("router_z" in step.other_losses) == bool(changes)


def test_it_resumes_bitwise(
    workshop: Any,
    make_training: MakeTraining,
    make_config: Any,
    make_events: Callable[..., Any],
    tmp_path: Path,
) -> None:
    training = self_critical(make_training, num_epochs=2, save_every=3, eval_every=4)
    config = make_config(dropout=0.1)
    options = {"validate_first": True}
    workshop.trainer(tmp_path / "whole", training, config, **options).train()
    callback = make_events(on_step_do=stop_at(5))
    with pytest.raises(Exception, match="^$"):
        workshop.trainer(tmp_path / "parts", training, config, callback, **options).train()
    torch.manual_seed(999)
    resumed = make_events()
    made = workshop.trainer(tmp_path / "parts", training, config, resumed, **options)
    made.train(resume=True)
    assert resumed.of("start")[0].first_step == 3
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    for kind, name in (("train", "reward"), ("validation", "cider")):
        left, right = metrics(tmp_path / "whole", kind), metrics(tmp_path / "parts", kind)
        assert [(x["step"], x[name]) for x in left] == [(x["step"], x[name]) for x in right]


def test_rows_of_robot_tasks_keep_their_loss(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = self_critical(make_training, max_steps=1, robot_loss_weight=1.0)
    made = workshop.trainer(tmp_path / "run", training)
    made.train()
    objective, samples = made._objective, workshop.dataset(training, True)
    both = [samples[0], samples[1], samples[len(samples) - 1], samples[len(samples) - 2]]
    mixed: Batch = samples.collate(both)
    torch.manual_seed(0)
    sampled = objective.sample(mixed)
    assert sampled is not None
    assert sampled.rows_B.tolist() == [True, True, False, False]
    made.model.eval()
    together = objective(mixed, sampled=sampled).sums
    alone = objective(samples.collate(both[2:])).sums
    torch.testing.assert_close(together["robot"], alone["robot"])
    assert float(together["reward"]) == pytest.approx(sampled.reward_sum)
    assert objective.sample(samples.collate(both[2:])) is None


def test_best_by_cider_also_serves_ordinary_training(
    workshop: Any, make_training: MakeTraining, make_events: Callable[..., Any], tmp_path: Path
) -> None:
    events = make_events()
    training = make_training(max_steps=4, eval_every=2, best_by="cider", cider_images=3)
    summary = workshop.trainer(tmp_path / "run", training, callback=events).train()
    ciders = {report.step: report.cider for report in events.of("validation")}
    assert summary.best_cider == max(ciders.values())
    assert all(report.loss is not None for report in events.of("validation"))


def test_what_cannot_write_captions_is_refused(
    workshop: Any, make_training: MakeTraining, make_config: Any, tmp_path: Path
) -> None:
    training = self_critical(make_training)
    with pytest.raises(ConfigError, match="bidirectional"):
        workshop.trainer(tmp_path / "run", training, make_config(attention_mode="bidirectional"))
    sharded = self_critical(make_training, parallel="fsdp")
    with pytest.raises(ConfigError, match="fsdp"):
        workshop.trainer(tmp_path / "run", sharded, world=World(rank=0, size=2))
    with pytest.raises(ConfigError, match="num_sampled_captions"):
        self_critical(make_training, num_sampled_captions=1)
    assert not (tmp_path / "run").exists()
