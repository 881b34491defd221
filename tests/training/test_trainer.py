from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.images import normalize_images
from bitgen.dataset.robots import RobotTask
from bitgen.errors import (
    ConfigError,
    DatasetError,
    DiskFullError,
    Interrupted,
    ModelFileError,
    OutputExistsError,
    TrainingError,
)
from bitgen.model.bitgen import BitGenModel
from bitgen.model.compilation import require_compiler
from bitgen.training import checkpoint, objective, trainer
from bitgen.training.checkpoint import load_checkpoint, open_run
from bitgen.training.data_order import epoch_order
from bitgen.training.loader import BatchLoader
from bitgen.training.objective import Objective
from bitgen.training.robot_calibration import ROBOT_TEMPERATURES
from bitgen.training.task_words import fit_task_words
from bitgen.training.trainer import Trainer

MakeTraining = Callable[..., TrainingConfig]
MakeConfig = Callable[..., BitGenConfig]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    run = open_run(run_dir, prefer="last")
    assert run.checkpoint_dir is not None
    return load_checkpoint(run.checkpoint_dir).model


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = final_weights(first), final_weights(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def first_gradients(run_dir: Path) -> dict[str, torch.Tensor]:
    """The (clipped) gradients of a run of one update, times 1 - beta1: Adam's first moments."""
    tensors = load_checkpoint(run_dir / "checkpoints" / "step_000001").training
    return {name: value for name, value in tensors.items() if name.endswith(":exp_avg")}


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# Learning ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("all_panels")
def test_it_learns_captions_and_robots_and_writes_the_whole_run(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(
        num_epochs=40, batch_size=8, learning_rate=1e-2, eval_every=20, save_every=30
    )
    # All tasks are trained on: six alone do not tell which word of a task matters.
    train_set = workshop.dataset(training, True, tasks=workshop.tasks)
    made = workshop.trainer(tmp_path / "run", training, callback=events, train_set=train_set)
    summary = made.train()
    assert summary.steps == 120 and summary.epochs == 40
    # An untrained model guesses uniformly over the rows of the embedding.
    assert summary.first_loss == pytest.approx(5.95, rel=0.05)
    assert summary.loss is not None and summary.loss < 1.0
    assert summary.validation is not None and summary.validation.loss is not None
    assert summary.validation.loss < 1.0
    assert summary.validation.robot_exact_match == 1.0
    assert summary.skipped_steps == 0
    assert summary.curves is not None
    assert summary.curves.read_bytes().startswith(b"\x89PNG")

    kinds = [kind for kind, _ in events.events if kind != "validation_progress"]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert kinds.count("step") == 120
    start = events.of("start")[0]
    assert (start.first_step, start.total_steps, start.precision) == (0, 120, "fp32")
    assert (start.device, start.train_samples, start.val_samples) == ("cpu", 21, 15)
    assert [report.step for report in events.of("validation")] == list(range(20, 121, 20))
    saved = {step for _, step, _ in events.of("checkpoint")}
    assert {30, 60, 90, 120} <= saved
    best = [step for _, step, is_best in events.of("checkpoint") if is_best]
    assert best[-1] == summary.best_step == open_run(tmp_path / "run").step

    train_lines = metrics(tmp_path / "run", "train")
    assert [line["step"] for line in train_lines] == list(range(1, 121))
    assert train_lines[0]["learning_rate"] == pytest.approx(1e-2 / 4)
    assert train_lines[-1]["epoch"] == 40
    needed = {"loss", "robot_loss", "grad_norm", "tokens_per_second", "images_per_second"}
    assert needed <= train_lines[0].keys()
    last = metrics(tmp_path / "run", "validation")[-1]
    assert last["robot_exact_match"] == 1.0 and last["loss"] == summary.validation.loss
    assert last["robot_threshold"] == summary.validation.robot_threshold
    assert last["robot_temperature"] == summary.validation.robot_temperature
    assert last["robot_temperature"] in ROBOT_TEMPERATURES


def test_words_of_tasks_are_fitted_judged_and_kept(
    workshop: Any,
    make_config: Callable[..., BitGenConfig],
    make_training: MakeTraining,
    tmp_path: Path,
) -> None:
    tasks = [
        RobotTask(f"{verb} around number {number}", (robot,))
        for number in range(12)
        for verb, robot in (("fly", "Drone"), ("dive", "Diver"))
    ]
    config = make_config(robot_sets=(1, 2))
    training = make_training(max_steps=2, batch_size=8)

    def sets(training: Any) -> dict[str, Any]:
        return {
            "train_set": workshop.dataset(training, True, [], tasks[:16], config),
            "val_set": workshop.dataset(training, False, [], tasks[16:], config),
        }

    run_dir = tmp_path / "run"
    workshop.trainer(run_dir, training, config, **sets(training)).train()
    last = metrics(run_dir, "validation")[-1]
    assert last["robot_word_weight"] == 0.75 and last["robot_exact_match"] == 1.0
    expected = fit_task_words(
        tasks[:16], config.robot_names, config.robot_sets, config.task_word_bins
    ).tensors()
    saved = final_weights(run_dir)
    for name, array in expected.items():
        torch.testing.assert_close(saved[name], torch.from_numpy(array))

    longer = make_training(max_steps=4, batch_size=8)
    workshop.trainer(run_dir, longer, config, **sets(longer)).train(resume=True)
    for name in expected:
        assert torch.equal(final_weights(run_dir)[name], saved[name])


def test_ternary_weights_train_under_bfloat16_and_are_saved_in_float32(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(num_epochs=20, batch_size=8, learning_rate=1e-2, precision="bf16")
    summary = workshop.trainer(tmp_path / "run", training).train()
    assert summary.loss is not None and summary.loss < 2.0
    assert {value.dtype for value in final_weights(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_and_resumes_on_cuda(
    precision: str, workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    def training(num_epochs: int) -> TrainingConfig:
        return make_training(
            num_epochs=num_epochs, batch_size=8, learning_rate=1e-2, precision=precision,
            device="cuda", num_workers=2,
        )  # fmt: skip

    workshop.trainer(tmp_path / "run", training(10)).train()
    summary = workshop.trainer(tmp_path / "run", training(20)).train(resume=True)
    assert summary.steps == 60
    assert summary.loss is not None and summary.loss < 2.5


def test_the_run_says_what_it_was_trained_on(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    info = {"coco_data": ["data/coco"], "train_images": 12}
    workshop.trainer(tmp_path / "run", make_training(num_epochs=1), data_info=info).train()
    run = open_run(tmp_path / "run")
    assert run.data == info
    assert json.loads(run.tokenizer_json) == json.loads(workshop.tokenizer.to_json())
    assert [robot["name"] for robot in json.loads(run.robots_json)] == ["Drone", "Diver"]


def test_without_validation_set_last_is_kept_and_there_is_no_best(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(num_epochs=2)
    made = workshop.trainer(tmp_path / "run", training, callback=events, val_set=None)
    summary = made.train()
    assert summary.validation is None and events.of("validation") == []
    assert open_run(tmp_path / "run").step == summary.steps
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_captions_alone_have_no_robot_figures(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(num_epochs=1)
    sets = {
        "train_set": workshop.dataset(training, True, tasks=[]),
        "val_set": workshop.dataset(training, False, tasks=[]),
    }
    workshop.trainer(tmp_path / "run", training, callback=events, **sets).train()
    assert all(report.robot_loss is None for report in events.of("step"))
    report = events.of("validation")[-1]
    assert report.loss is not None
    assert (report.robot_loss, report.robot_exact_match) == (None, None)


def test_robot_tasks_alone_train_without_a_caption_loss(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(num_epochs=2)
    sets = {
        "train_set": workshop.dataset(training, True, images=[]),
        "val_set": workshop.dataset(training, False, images=[]),
    }
    summary = workshop.trainer(tmp_path / "run", training, callback=events, **sets).train()
    assert summary.loss is None and summary.skipped_steps == 0
    assert all(report.loss is None and report.robot_loss > 0 for report in events.of("step"))


def test_an_empty_training_set_is_refused_before_anything_is_written(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training()
    empty = workshop.dataset(training, True, images=[], tasks=[])
    with pytest.raises(DatasetError, match="empty"):
        workshop.trainer(tmp_path / "run", training, train_set=empty)
    assert not (tmp_path / "run").exists()


def test_validation_changes_neither_weights_nor_random_state(
    workshop: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(dropout=0.2)
    often, never = make_training(num_epochs=2, eval_every=1), make_training(num_epochs=2)
    workshop.trainer(tmp_path / "often", often, config).train()
    workshop.trainer(tmp_path / "never", never, config, val_set=None).train()
    assert_same_weights(tmp_path / "often", tmp_path / "never")


def test_validation_loss_is_per_token_over_the_set_whatever_the_batches(
    workshop: Any, events: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    found = []
    for size in (1, 4, 50):
        # No update moves the weights: the rate is as good as zero.
        training = make_training(batch_size=size, max_steps=1, learning_rate=1e-30)
        summary = workshop.trainer(
            tmp_path / str(size), training, make_config(quantization="none", freeze_encoder=True)
        ).train()
        assert summary.validation is not None
        found.append((summary.validation.loss, summary.validation.robot_loss))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_validation_can_be_capped(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    made = workshop.trainer(tmp_path / "run", make_training(max_steps=1), callback=events)
    made.max_validation_batches = 2
    made.train()
    assert events.of("validation_progress") == [(1, 2), (2, 2)]


# One update -------------------------------------------------------------------------------------


def test_accumulated_batches_give_the_gradients_of_one_large_batch(
    workshop: Any, events: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    """4 x 8 equals 1 x 32, although the small batches hold different numbers of tokens."""
    losses = {}
    for size, parts in ((32, 1), (8, 4)):
        # Balancing experts is no sum over tokens (docs/training.md), so there are none here.
        training = make_training(
            num_epochs=4, batch_size=size, grad_accumulation=parts, captions="all", save_every=1,
            keep_checkpoints=9, learning_rate=3e-4,
        )  # fmt: skip
        run_dir = tmp_path / f"{parts}x{size}"
        train_set = workshop.dataset(training, True, images=workshop.images[:13])
        assert len(train_set) == 32
        config = make_config(quantization="none", predict_tokens=3)
        workshop.trainer(run_dir, training, config, train_set=train_set).train()
        lines = metrics(run_dir, "train")
        names = ("loss", "true_loss", "robot_loss", "future_2_loss", "future_3_loss", "grad_norm")
        losses[size] = [tuple(x[name] for name in names) for x in lines]
    assert len(losses[32]) == len(losses[8]) == 4
    for large, small in zip(losses[32], losses[8], strict=True):
        assert small == pytest.approx(large, rel=1e-5)
    # Not the weights: AdamW makes a full step of a gradient that is nothing but rounding (which is
    # also why the learning rate is low).
    large, small = (first_gradients(tmp_path / name) for name in ("1x32", "4x8"))
    assert large.keys() == small.keys()
    largest = max(gradient.abs().max().item() for gradient in large.values())
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_bidirectional_mode_trains_words_and_robots_and_no_captions(
    workshop: Any, events: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(attention_mode="bidirectional")
    training = make_training(num_epochs=8)
    sets = {
        f"{name}_set": workshop.dataset(training, name == "train", config=config)
        for name in ("train", "val")
    }
    summary = workshop.trainer(tmp_path / "run", training, config, events, **sets).train()
    assert summary.loss is None and summary.validation.loss is None
    steps = events.of("step")
    assert all(step.tokens == 0 for step in steps)
    robot_losses, word_losses = (
        [getattr(step, kind) for step in steps if getattr(step, kind) is not None]
        for kind in ("robot_loss", "image_word_loss")
    )
    assert sum(robot_losses[-3:]) < sum(robot_losses[:3])
    assert sum(word_losses[-3:]) < sum(word_losses[:3])
    assert any("bidirectional" in message for message in events.of("warning"))
    nothing = make_training(image_word_weight=0)
    with pytest.raises(ConfigError, match="nothing to learn"):
        train_set = workshop.dataset(nothing, True, tasks=[], config=config)
        workshop.trainer(tmp_path / "none", nothing, config, train_set=train_set)


@pytest.mark.slow
def test_experts_and_further_tokens_are_trained_and_reported(
    workshop: Any, make_events: Any, make_training: MakeTraining, make_config: Any, tmp_path: Path
) -> None:
    config = make_config(num_experts=4, experts_per_token=2, predict_tokens=3, num_layers=2)
    training = make_training(num_epochs=8, activation_checkpointing=True, save_every=9)
    events = make_events()
    workshop.trainer(tmp_path / "run", training, config, events).train()
    steps = events.of("step")
    for name in ("future_2", "future_3"):
        losses = [step.other_losses[name] for step in steps if name in step.other_losses]
        assert losses[0] == pytest.approx(math.log(config.vocab_size), rel=0.2)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for step in steps:
        # 1 for equal shares; a little less where the likelier experts are not the more chosen.
        assert 0.9 < step.other_losses["load_balance"] <= 4
        assert step.other_losses["router_z"] > 0
        assert len(step.expert_load) == 2
        for shares in step.expert_load:
            assert len(shares) == 4 and sum(shares) == pytest.approx(1)
    line = metrics(tmp_path / "run", "train")[-1]
    assert {"future_2_loss", "future_3_loss", "load_balance_loss", "expert_load"} <= line.keys()
    # Resumed, and with layers kept instead of recomputed, it ends with the same bits.
    stopped = make_events(on_step_do=stop_at(14))
    with pytest.raises(Stop):
        workshop.trainer(tmp_path / "parts", training, config, stopped).train()
    kept = dataclasses.replace(training, activation_checkpointing=False)
    workshop.trainer(tmp_path / "parts", kept, config).train(resume=True)
    assert_same_weights(tmp_path / "run", tmp_path / "parts")


def test_masked_language_modelling_learns_hidden_words(
    workshop: Any, events: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(attention_mode="bidirectional")
    training = make_training(
        num_epochs=16, objective="mlm", mlm_probability=0.3, captions="all", image_word_weight=0.0
    )
    sets = {
        f"{name}_set": workshop.dataset(training, name == "train", tasks=[], config=config)
        for name in ("train", "val")
    }
    summary = workshop.trainer(tmp_path / "run", training, config, events, **sets).train()
    losses = [step.loss for step in events.of("step")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert summary.validation.loss < 0.8 * losses[0]
    # About 30% of the words are asked for, and no more.
    tokens = [step.tokens for step in events.of("step")]
    assert 4 <= sum(tokens) / len(tokens) <= 20
    assert not events.of("warning")


def test_the_reported_loss_is_the_mean_over_all_tokens_of_the_update(
    workshop: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    training = make_training(batch_size=4, grad_accumulation=3, max_steps=1, length_buckets=False)
    config = make_config(quantization="none")
    made = workshop.trainer(tmp_path / "run", training, config)
    torch.manual_seed(training.seed)
    reference = BitGenModel(config)
    train_set = workshop.dataset(training, True)
    train_set.set_epoch(0)
    order = epoch_order(len(train_set), training.seed, 0)[:12]
    batch = train_set.collate([train_set[index] for index in order])
    logits = reference(
        batch.input_ids,
        images=normalize_images(batch.images, config.image_mean, config.image_std),
        attention_mask=reference.build_attention_mask(
            batch.attention_mask, batch.prefix_lengths, batch.image_mask
        ),
    ).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
    )
    made.train()
    line = metrics(tmp_path / "run", "train")[0]
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert line["tokens"] == int((batch.labels[:, 1:] != -100).sum())


def test_clipping_limits_what_a_gradient_may_do_but_reports_its_true_norm(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    norms = {}
    for clip in (0.0, 1e-3):
        training = make_training(grad_clip=clip, max_steps=1)
        made = workshop.trainer(tmp_path / str(clip), training)
        made.train()
        norms[clip] = metrics(tmp_path / str(clip), "train")[0]["grad_norm"]
        gradients = [p.grad.norm() for p in made._parameters if p.grad is not None]
        left = torch.stack(gradients).norm().item()
        assert left == pytest.approx(clip or norms[clip], rel=1e-3)
    assert norms[0.0] == norms[1e-3] > 1e-2


# Order and resuming -----------------------------------------------------------------------------


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert epoch_order(50, 1, 1) == orders[3]


def test_each_epoch_draws_its_own_samples_also_after_a_resume(
    workshop: Any,
    make_training: MakeTraining,
    make_events: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    load = BatchLoader.load

    def noting_load(self: BatchLoader, batches: Any, epoch: int) -> Any:
        drawn.append(epoch)
        return load(self, batches, epoch)

    monkeypatch.setattr(BatchLoader, "load", noting_load)
    training = make_training(num_epochs=3, save_every=7)
    callback = make_events(on_step_do=stop_at(8))
    with pytest.raises(Stop):
        workshop.trainer(tmp_path / "run", training, callback=callback, val_set=None).train()
    assert drawn == [0, 1]
    drawn.clear()
    workshop.trainer(tmp_path / "run", training, val_set=None).train(resume=True)
    assert drawn == [1, 2]


def test_the_last_updates_of_an_epoch_hold_what_is_left(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    # 18 samples: batches of 4, 4, 4, 4, 2, in groups of two.
    training = make_training(num_epochs=2, batch_size=4, grad_accumulation=2)
    workshop.trainer(tmp_path / "run", training, callback=events).train()
    assert [report.images for report in events.of("step")] == [8, 8, 2] * 2
    assert [report.epoch for report in events.of("step")] == [1, 1, 1, 2, 2, 2]


def test_max_steps_counts_whatever_the_epochs(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    for steps in (2, 12):
        training = make_training(num_epochs=1, max_steps=steps)
        summary = workshop.trainer(tmp_path / str(steps), training, callback=events).train()
        assert summary.steps == steps
    assert events.of("start")[-1].num_epochs == 3


def test_patience_stops_after_validations_without_a_better_one_and_saves(
    workshop: Any, events: Any, make_events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    # At this rate it gets worse from some step on.
    options = {
        "num_epochs": 400, "learning_rate": 0.3, "grad_clip": 0.0, "eval_every": 2,
        "schedule": "cosine",
    }  # fmt: skip
    training = make_training(**options, patience=3)
    run_dir = tmp_path / "run"
    summary = workshop.trainer(run_dir, training, callback=events).train()
    losses = [x["loss"] + x["robot_loss"] for x in metrics(run_dir, "validation")]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3
    assert summary.steps == 2 * len(losses) < 100
    assert summary.best_step == 2 * (best + 1)
    assert open_run(run_dir, prefer="last").step == summary.steps
    assert any("patience 3" in message for message in events.of("warning"))
    # Resumed, it goes on to the next validation, which is counted with those before it.
    again = workshop.trainer(run_dir, training, callback=make_events()).train(resume=True)
    assert again.steps == summary.steps + 2
    without = make_training(**{**options, "num_epochs": 9})
    assert workshop.trainer(tmp_path / "without", without).train().steps > summary.steps


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int], None]:
    def stop(now: int) -> None:
        if now == step:
            raise Stop

    return stop


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stopped_at", [4, 8])
def test_a_resumed_training_ends_bitwise_like_an_uninterrupted_one(
    num_workers: int,
    stopped_at: int,
    workshop: Any,
    make_training: MakeTraining,
    make_config: MakeConfig,
    make_events: Callable[..., Any],
    tmp_path: Path,
) -> None:
    training = make_training(num_epochs=3, num_workers=num_workers, save_every=3, eval_every=4)
    config = make_config(dropout=0.1)
    whole = workshop.trainer(tmp_path / "whole", training, config).train()
    callback = make_events(on_step_do=stop_at(stopped_at))
    with pytest.raises(Stop):
        workshop.trainer(tmp_path / "parts", training, config, callback=callback).train()
    torch.manual_seed(12345)  # whatever happened in between
    resumed_events = make_events()
    made = workshop.trainer(tmp_path / "parts", training, config, callback=resumed_events)
    parts = made.train(resume=True)
    assert 0 < resumed_events.of("start")[0].first_step < stopped_at
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert (parts.steps, parts.loss, parts.first_loss) == (
        whole.steps,
        whole.loss,
        whole.first_loss,
    )
    assert (parts.best_step, parts.best_loss) == (whole.best_step, whole.best_loss)
    for kind in ("train", "validation"):
        left, right = metrics(tmp_path / "whole", kind), metrics(tmp_path / "parts", kind)
        assert [(x["step"], x["loss"]) for x in left] == [(x["step"], x["loss"]) for x in right]


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    workshop: Any, make_training: MakeTraining, make_events: Callable[..., Any], tmp_path: Path
) -> None:
    training = make_training(num_epochs=2)
    workshop.trainer(tmp_path / "whole", training).train()
    callback = make_events(on_step_do=stop_at(2))
    with pytest.raises(Stop):
        workshop.trainer(tmp_path / "parts", training, callback=callback).train()
    assert open_run(tmp_path / "parts").checkpoint_dir is None
    workshop.trainer(tmp_path / "parts", training).train(resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    steps = [line["step"] for line in metrics(tmp_path / "parts", "train")]
    assert steps == list(range(1, 11))


def test_a_finished_run_is_left_as_it_is_or_goes_on_with_more_epochs(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    workshop.trainer(run_dir, make_training(num_epochs=1)).train()
    before = final_weights(run_dir)
    again = workshop.trainer(run_dir, make_training(num_epochs=1), callback=events)
    assert again.train(resume=True).steps == 5
    assert events.of("step") == []
    assert all(torch.equal(before[name], value) for name, value in final_weights(run_dir).items())
    longer = make_training(num_epochs=2, save_every=2, eval_every=3, keep_checkpoints=1)
    summary = workshop.trainer(run_dir, longer, callback=events).train(resume=True)
    assert [report.step for report in events.of("step")] == [6, 7, 8, 9, 10]
    assert summary.differences == ()
    assert open_run(run_dir).training.num_epochs == 2


def test_other_settings_are_used_and_reported(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    workshop.trainer(run_dir, make_training(num_epochs=1)).train()
    changed = make_training(num_epochs=3, learning_rate=5e-4, batch_size=6)
    info = {"coco_data": ["circles"]}
    made = workshop.trainer(run_dir, changed, callback=events, data_info=info)
    summary = made.train(resume=True)
    assert summary.differences == (
        "batch_size is 4 in the run, 6 now",
        "learning_rate is 0.003 in the run, 0.0005 now",
        "data.coco_data is ['squares'] in the run, ['circles'] now",
    )
    assert events.of("start")[0].differences == summary.differences
    assert any("learning_rate" in message for message in events.of("warning"))
    assert [report.images for report in events.of("step")] == [6, 6, 6] * 2
    assert max(line["learning_rate"] for line in metrics(run_dir, "train")[5:]) <= 5e-4


def test_another_batch_size_goes_on_behind_the_samples_that_were_seen(
    workshop: Any, make_training: MakeTraining, make_events: Callable[..., Any], tmp_path: Path
) -> None:
    callback = make_events(on_step_do=stop_at(3))
    training = make_training(num_epochs=1, save_every=2)
    with pytest.raises(Stop):
        workshop.trainer(tmp_path / "run", training, callback=callback).train()
    events = make_events()
    # 8 of 18 samples were seen.
    larger = make_training(num_epochs=1, batch_size=9)
    workshop.trainer(tmp_path / "run", larger, callback=events).train(resume=True)
    assert [report.images for report in events.of("step")] == [9, 1]


def test_resuming_with_another_architecture_names_both_and_changes_nothing(
    workshop: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    workshop.trainer(run_dir, make_training(num_epochs=1)).train()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    other = make_config(num_layers=2, intermediate_size=64)
    with pytest.raises(ConfigError, match="num_layers is 1 in the run, 2 now") as caught:
        workshop.trainer(run_dir, make_training(num_epochs=2), other).train(resume=True)
    assert "intermediate_size is 32 in the run, 64 now" in caught.value.message
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_resuming_with_another_tokenizer_is_refused(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    workshop.trainer(tmp_path / "run", make_training(num_epochs=1)).train()
    other = type(workshop.tokenizer).train(["other words"] * 3, 300)
    made = workshop.trainer(tmp_path / "run", make_training(num_epochs=2), tokenizer=other)
    with pytest.raises(ConfigError, match="tokenizer"):
        made.train(resume=True)


def test_resuming_nothing_and_starting_over_something_are_refused(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match="There is no model"):
        workshop.trainer(tmp_path / "run", make_training()).train(resume=True)
    assert not (tmp_path / "run").exists()
    workshop.trainer(tmp_path / "run", make_training(num_epochs=1)).train()
    with pytest.raises(OutputExistsError, match="exists already"):
        workshop.trainer(tmp_path / "run", make_training(num_epochs=1)).train()


# Trouble ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_resumes_bitwise(
    number: int,
    workshop: Any,
    make_training: MakeTraining,
    make_events: Callable[..., Any],
    tmp_path: Path,
) -> None:
    training = make_training(num_epochs=2)
    workshop.trainer(tmp_path / "whole", training).train()

    def send(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    callback = make_events(on_step_do=send)
    with pytest.raises(Interrupted, match="step 3 of 10") as caught:
        workshop.trainer(tmp_path / "parts", training, callback=callback).train()
    assert caught.value.exit_code == 130
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert open_run(tmp_path / "parts", prefer="last").step == 3
    workshop.trainer(tmp_path / "parts", training).train(resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_during_validation_cuts_it_short_and_saves(
    workshop: Any, make_training: MakeTraining, make_events: Callable[..., Any], tmp_path: Path
) -> None:
    callback = make_events()
    callback.on_validation_progress = lambda done, total: os.kill(os.getpid(), signal.SIGINT)
    training = make_training(num_epochs=2, eval_every=2)
    with pytest.raises(Interrupted):
        workshop.trainer(tmp_path / "run", training, callback=callback).train()
    assert callback.of("validation") == []
    assert open_run(tmp_path / "run", prefer="last").step == 2
    # The validation is made up for, so that the best checkpoint is that of an undisturbed run.
    workshop.trainer(tmp_path / "run", training).train(resume=True)
    workshop.trainer(tmp_path / "whole", training).train()
    for name in ("run", "whole"):
        validations = metrics(tmp_path / name, "validation")
        assert [line["step"] for line in validations] == [2, 4, 6, 8, 10]
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert open_run(tmp_path / "run").step == open_run(tmp_path / "whole").step


def test_a_second_signal_acts_at_once(
    workshop: Any, make_training: MakeTraining, make_events: Callable[..., Any], tmp_path: Path
) -> None:
    def send_twice(step: int) -> None:
        deferring = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        # Another thread may be given the signal: two that come before Python looks count as one.
        deadline = time.monotonic() + 10
        while signal.getsignal(signal.SIGINT) is deferring and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    callback = make_events(on_step_do=send_twice)
    # A program that a shell started in the background inherits that SIGINT is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            workshop.trainer(tmp_path / "run", make_training(), callback=callback).train()
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_loading_processes_survive_the_signals_of_their_group(
    workshop: Any, make_training: MakeTraining, make_events: Callable[..., Any], tmp_path: Path
) -> None:
    hit = []

    def send_to_workers(step: int) -> None:
        for worker in multiprocessing.active_children() if step == 1 else []:
            hit.append(worker.pid)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(int(worker.pid or 0), number)

    callback = make_events(on_step_do=send_to_workers)
    training = make_training(num_epochs=1, batch_size=1, num_workers=2)
    made = workshop.trainer(tmp_path / "run", training, callback=callback, val_set=None)
    assert made.train().steps == 18
    assert len(hit) == 2


def test_it_trains_in_another_thread_without_touching_signals(
    workshop: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    steps = []
    made = workshop.trainer(tmp_path / "run", make_training(num_epochs=1))
    thread = threading.Thread(target=lambda: steps.append(made.train().steps))
    thread.start()
    thread.join()
    assert steps == [5]


def spoil_losses(
    monkeypatch: pytest.MonkeyPatch,
    bad_steps: set[int],
    name: str = "caption_loss",
    factor: float = float("nan"),
) -> None:
    """Multiply a loss in some steps."""
    original, loss = Trainer._update, getattr(objective, name)

    def update(self: Trainer, *arguments: Any) -> Any:
        if self._progress.step + 1 not in bad_steps:
            return original(self, *arguments)
        with monkeypatch.context() as patched:
            patched.setattr(
                objective, name, lambda *given: (loss(*given)[0] * factor, loss(*given)[1])
            )
            return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", update)


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(
    workshop: Any,
    events: Any,
    make_training: MakeTraining,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil_losses(monkeypatch, {2, 4})
    weights = []
    made = workshop.trainer(tmp_path / "run", make_training(num_epochs=1), callback=events)
    model = made._model
    events.on_step_do = lambda step: weights.append(
        torch.cat([p.detach().flatten() for p in model.parameters()])
    )
    summary = made.train()
    assert summary.skipped_steps == 2
    why = "loss or gradients not finite"
    assert [report.skipped for report in events.of("step")] == [None, why, None, why, None]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2])
    assert all(weight.isfinite().all() for weight in weights)
    assert metrics(tmp_path / "run", "train")[1]["loss"] is None
    assert summary.loss is not None


def test_ten_bad_steps_in_a_row_stop_and_name_the_last_good_checkpoint(
    workshop: Any, make_training: MakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nine in a row are survived, twenty are not.
    spoil_losses(monkeypatch, {*range(3, 12), *range(20, 40)})
    training = make_training(num_epochs=10, save_every=15)
    with pytest.raises(TrainingError, match="10 updates in a row .* up to step 29") as caught:
        workshop.trainer(tmp_path / "run", training).train()
    assert "step_000015" in str(caught.value.remedy)
    assert all(value.isfinite().all() for value in final_weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("caption_loss", 30.0, "loss .* exploded"),
        # The image words' loss is not looked at, but its gradient is.
        ("image_word_loss", 1e5, "gradient norm .* exploded"),
    ],
)
def test_an_exploding_update_is_skipped_and_reported(
    workshop: Any,
    events: Any,
    make_training: MakeTraining,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    factor: float,
    message: str,
) -> None:
    spoil_losses(monkeypatch, {25}, name, factor)
    made = workshop.trainer(tmp_path / "run", make_training(num_epochs=6), callback=events)
    model = made.model
    weights = []
    events.on_step_do = lambda step: weights.append(model.projector.up_proj.weight.detach().clone())
    made.train()
    reports = events.of("step")
    assert [report.step for report in reports if report.skipped] == [25]
    assert re.match(message, reports[24].skipped)
    assert torch.equal(weights[23], weights[24]) and not torch.equal(weights[24], weights[25])


def test_updates_without_anything_to_learn_do_not_make_others_look_exploded(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    """Word pretraining on updates of which many hold robot tasks alone: gradients of zero."""
    training = make_training(batch_size=1, num_epochs=6, word_pretraining_steps=90)
    summary = workshop.trainer(tmp_path / "run", training, callback=events).train()
    norms = [report.grad_norm for report in events.of("step")[:90]]
    assert norms.count(0.0) > 20
    assert summary.skipped_steps == 0


def test_float16_overflow_is_skipped_without_counting_towards_giving_up(
    workshop: Any,
    events: Any,
    make_training: MakeTraining,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaler:
        """The loss scaling of CUDA, on the CPU: gradients overflow until the scale is small."""

        scale_now = 2.0**14

        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return self.scale_now

        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            return loss * (float("inf") if self.scale_now > 2 else self.scale_now)

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= self.scale_now

        def step(self, optimizer: torch.optim.Optimizer) -> None:
            optimizer.step()

        def update(self) -> None:
            self.scale_now = max(1.0, self.scale_now / 2)

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.scale_now}

    monkeypatch.setattr(trainer, "make_grad_scaler", lambda device, dtype: Scaler())
    made = workshop.trainer(tmp_path / "run", make_training(num_epochs=4), callback=events)
    summary = made.train()
    assert summary.skipped_steps == 13
    skipped = [report.skipped is not None for report in events.of("step")]
    assert skipped == [True] * 13 + [False] * 7
    assert open_run(tmp_path / "run").state["scaler"] == {"scale": 1.0}


def test_a_full_disk_stops_with_the_earlier_checkpoint_intact(
    workshop: Any, make_training: MakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_file
    saved = []

    def save_one(tensors: Any, path: Any, metadata: Any = None) -> None:
        saved.append(path)
        if len(saved) > 3:  # the second checkpoint's second file
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_one)
    training = make_training(num_epochs=2, save_every=3)
    with pytest.raises(DiskFullError):
        workshop.trainer(tmp_path / "run", training).train()
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step_000003"]
    monkeypatch.undo()
    assert workshop.trainer(tmp_path / "run", training).train(resume=True).steps == 10


def test_a_warm_up_longer_than_the_training_is_warned_of(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(num_epochs=1, warmup_steps=200)
    workshop.trainer(tmp_path / "run", training, callback=events).train()
    assert any("warm-up of 200" in message for message in events.of("warning"))


def test_without_matplotlib_the_training_ends_with_a_warning(
    workshop: Any,
    events: Any,
    make_training: MakeTraining,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(metrics_path: Path, output_png: Path) -> None:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(trainer, "draw_curves", fail)
    made = workshop.trainer(tmp_path / "run", make_training(num_epochs=1), callback=events)
    assert made.train().curves is None
    assert any("matplotlib" in message for message in events.of("warning"))


def test_it_never_prints(
    workshop: Any, make_training: MakeTraining, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workshop.trainer(tmp_path / "run", make_training(num_epochs=1)).train()
    assert capfd.readouterr() == ("", "")


# Figures ----------------------------------------------------------------------------------------


def test_speed_does_not_count_validation_saving_or_callbacks(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path, monkeypatch: Any
) -> None:
    now = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    update = Trainer._update

    def slow_update(self: Trainer, *arguments: Any) -> Any:
        now[0] += 2.0
        return update(self, *arguments)

    def slow_validation(self: Trainer, *arguments: Any) -> None:
        now[0] += 1000.0

    def slow_callback(step: int) -> None:
        now[0] += 500.0

    monkeypatch.setattr(Trainer, "_update", slow_update)
    monkeypatch.setattr(Trainer, "_validate", slow_validation)
    events.on_step_do = slow_callback
    training = make_training(num_epochs=2, batch_size=6, eval_every=1)
    summary = workshop.trainer(tmp_path / "run", training, callback=events).train()
    assert summary.seconds == pytest.approx(12.0)
    assert summary.images_per_second == pytest.approx(3.0)
    first = events.of("step")[0]
    assert first.images_per_second == pytest.approx(3.0)
    assert first.tokens_per_second == pytest.approx(first.tokens / 2)
    assert first.seconds_remaining == pytest.approx(10.0)


# Word pretraining -------------------------------------------------------------------------------


def test_word_pretraining_moves_the_image_side_alone_and_then_captions_begin(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(max_steps=5, word_pretraining_steps=3, save_every=3, batch_size=8)
    made = workshop.trainer(tmp_path / "run", training, callback=events)
    before = {name: value.clone() for name, value in made._model.state_dict().items()}
    made.train()
    after_words = load_file(tmp_path / "run/checkpoints/step_000003/model.safetensors")
    moved = {
        name.split(".")[0] for name in before if not torch.equal(before[name], after_words[name])
    }
    # The selector's biases were set to the tasks' shares before the first update.
    assert moved == {"image_encoder", "projector", "text_decoder", "robot_selector"}
    assert torch.equal(
        before["robot_selector.task_proj.weight"], after_words["robot_selector.task_proj.weight"]
    )
    layers = [name for name in before if name.startswith("text_decoder.layers")]
    assert layers and all(torch.equal(before[name], after_words[name]) for name in layers)
    steps = events.of("step")
    assert [step.loss is None for step in steps] == [True] * 3 + [False] * 2
    assert all(step.image_word_loss is not None for step in steps)
    after_captions = final_weights(tmp_path / "run")
    assert any(not torch.equal(after_words[name], after_captions[name]) for name in layers)


def test_a_share_of_all_updates_becomes_a_number_that_stays(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(max_steps=5, word_pretraining_steps=None, batch_size=8)
    workshop.trainer(tmp_path / "run", training, callback=events).train()
    assert [step.loss is None for step in events.of("step")] == [True] * 3 + [False] * 2
    assert events.of("start")[0].word_pretraining_steps == 3
    recorded = open_run(tmp_path / "run").training
    assert recorded.word_pretraining_steps == 3
    longer = dataclasses.replace(recorded, max_steps=10)
    workshop.trainer(tmp_path / "run", longer).train(resume=True)
    assert open_run(tmp_path / "run").training.word_pretraining_steps == 3


def test_without_captioned_pictures_there_is_no_word_pretraining(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(max_steps=2, word_pretraining_steps=None)
    train_set = workshop.dataset(training, True, images=[])
    made = workshop.trainer(tmp_path / "run", training, train_set=train_set, callback=events)
    made.train()
    assert events.of("start")[0].word_pretraining_steps == 0
    assert all(step.robot_loss is not None for step in events.of("step"))


def test_patience_begins_with_captions(
    workshop: Any, make_training: MakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = objective.Judged(torch.ones(len(objective.FIGURES), dtype=torch.float64), None)
    monkeypatch.setattr(Objective, "judge", lambda self, batch: same)
    options = {"max_steps": 9, "word_pretraining_steps": 4, "eval_every": 1, "patience": 2}
    training = make_training(**options, batch_size=8)
    assert workshop.trainer(tmp_path / "run", training).train().steps == 6


def test_each_part_of_a_training_has_a_warm_up(
    workshop: Any, events: Any, make_training: MakeTraining, tmp_path: Path
) -> None:
    training = make_training(max_steps=5, word_pretraining_steps=3, warmup_steps=2, batch_size=8)
    workshop.trainer(tmp_path / "run", training, callback=events).train()
    (message,) = (message for message in events.of("warning") if "warm-up" in message)
    assert "not over within the 2 of what follows:" in message


def test_word_pretraining_needs_the_image_word_loss() -> None:
    with pytest.raises(ConfigError, match="image_word_weight"):
        TrainingConfig(word_pretraining_steps=5, image_word_weight=0.0)


@pytest.mark.parametrize("size", [0, 16])
def test_pictures_of_word_pretraining_are_blended_as_their_words_are(
    workshop: Any, make_training: MakeTraining, make_config: MakeConfig, size: int
) -> None:
    config = make_config(patch_size=8, quantization="none")
    training = make_training(word_mixup=0.4, word_pretraining_image_size=size, batch_size=8)
    torch.manual_seed(0)
    model = BitGenModel(config).train()
    losses = Objective(model, training, torch.device("cpu"), torch.float32)
    samples = workshop.dataset(training, True, tasks=[], config=config)
    batch = samples.collate([samples[index] for index in range(8)])
    torch.manual_seed(1)
    found = losses(batch, words_only=True).sums["image_word"]
    torch.manual_seed(1)
    share = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample()
    images = normalize_images(batch.images, config.image_mean, config.image_std)
    if size:
        images = torch.nn.functional.interpolate(
            images, (size, size), mode="bilinear", antialias=True
        )
    before = torch.cat([images[-1:], images[:-1]])
    words = model.image_words(share * images + (1 - share) * before).log_softmax(dim=-1)
    targets = torch.zeros_like(words).scatter_add(1, batch.word_ids, batch.word_weights)
    blended = share * targets + (1 - share) * torch.cat([targets[-1:], targets[:-1]])
    torch.testing.assert_close(found, -(blended * words).sum(), rtol=1e-4, atol=1e-4)


def test_the_pictures_of_word_pretraining_fit_the_encoder(
    make_training: MakeTraining, make_config: MakeConfig
) -> None:
    model = BitGenModel(make_config(patch_size=8))
    options = (torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="not a multiple of the patch size 8") as raised:
        Objective(model, make_training(word_pretraining_image_size=21), *options)
    assert raised.value.remedy == "Take 24."
    other = BitGenModel(make_config(image_encoder="mobilenet_v3_small", image_size=64))
    with pytest.raises(ConfigError, match="is for the encoder vit"):
        Objective(other, make_training(word_pretraining_image_size=32), *options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_and_recomputed_layers_train_as_plain_ones(
    workshop: Any, make_training: MakeTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    try:
        require_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(error.message)
    config, losses = make_config(quantization="none"), {}
    # To compile takes most of a minute; tests/model/test_compilation.py compiles without the other.
    both = {"compile": True, "activation_checkpointing": True}
    for name, options in (("plain", {}), ("both", both)):
        training = make_training(max_steps=3, **options)
        workshop.trainer(tmp_path / name, training, config).train()
        losses[name] = [line["grad_norm"] for line in metrics(tmp_path / name, "train")]
    assert losses["both"] == pytest.approx(losses["plain"], rel=1e-3)
