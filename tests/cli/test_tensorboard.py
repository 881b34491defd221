"""`bitgen train --logs tensorboard`, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bitgen import BitGen
from bitgen.cli.tensorboard import NUM_SAMPLES, TensorBoardCallback, _samples
from bitgen.config import BitGenConfig

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import (  # noqa: E402
    EventAccumulator,
)

EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}
WORDS = "samples/captions/text_summary"


def read_log(log_dir: Path) -> EventAccumulator:
    log = EventAccumulator(str(log_dir), size_guidance=EVERYTHING)
    log.Reload()
    return log


def scalars(log: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in log.Scalars(name)]


def recorded(run_dir: Path, kind: str, name: str) -> list[tuple[int, float]]:
    """The same of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], pytest.approx(line[name], rel=1e-6))
        for line in lines
        if line["kind"] == kind and line[name] is not None
    ]


Train = Callable[..., Path]
MAX_TOKENS = 5


@pytest.fixture(autouse=True)
def short_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has learnt nothing goes on and on."""
    monkeypatch.setattr("bitgen.cli.tensorboard.MAX_TOKENS", MAX_TOKENS)


@pytest.fixture
def train(run: Any, scenes: Path, small_training: list[str], tmp_path: Path) -> Train:
    """Trains on captions and robot tasks, with dropout, and returns the run."""

    def train(name: str, *options: object) -> Path:
        finished = run(
            *("train", "--coco_data", scenes, "--robot_data", scenes / "robots_train.json"),
            *("--output_dir", tmp_path / name, *small_training, "--dropout", 0.1),
            *("--eval_every", 2, "--save_every", 2, "--weights_every", 2, *options),
        )
        assert finished.code == 0, finished.stderr
        return tmp_path / name

    return train


def test_the_log_says_what_the_run_recorded(train: Train, scenes: Path) -> None:
    run_dir = train("run", "--logs", "tensorboard")
    log = read_log(run_dir / "tensorboard")
    for kind, names in {
        "train": {
            "training/loss": "loss",
            "training/robot_loss": "robot_loss",
            "training/image_word_loss": "image_word_loss",
            "training/gradient_norm": "grad_norm",
            "schedule/learning_rate": "learning_rate",
            "schedule/weight_decay": "weight_decay",
            "speed/tokens_per_second": "tokens_per_second",
            "speed/images_per_second": "images_per_second",
            "speed/padding_share": "padding_share",
        },
        "validation": {
            "validation/loss": "loss",
            "validation/robot_loss": "robot_loss",
            "validation/robot_exact_match": "robot_exact_match",
        },
        "weights": {"ternary/flips": "flips", "ternary/flip_share": "flip_share"},
    }.items():
        for tag, name in names.items():
            assert scalars(log, tag) == recorded(run_dir, kind, name), tag
            assert scalars(log, tag)
    ternary = [name for name in log.Tags()["scalars"] if name.startswith("ternary_zero/")]
    assert "ternary_zero/all" in ternary
    assert any("decoder.layers.0" in name for name in ternary)
    for name in ternary:
        of_value = [
            log.Scalars(name.replace("zero", value)) for value in ("minus_one", "zero", "plus_one")
        ]
        assert [event.step for event in of_value[1]] == [2, 4]
        for events in zip(*of_value, strict=True):
            assert sum(event.value for event in events) == pytest.approx(1, abs=1e-5)

    # The captions are those that the checkpoint of the same step gives.
    model = BitGen.load(run_dir / "checkpoints" / "step_000004", "cpu", backend="torch")
    captions = json.loads((scenes / "annotations" / "captions_val2017.json").read_text())
    rows = table(log, step=4)
    assert len(rows) == NUM_SAMPLES
    for picture, caption, reference in rows:
        (said,) = model.caption(scenes / "val2017" / picture, max_tokens=MAX_TOKENS)
        assert caption == " ".join(said.text.replace("|", r"\|").split())
        (image_id,) = (i["id"] for i in captions["images"] if i["file_name"] == picture)
        of_image = [a["caption"] for a in captions["annotations"] if a["image_id"] == image_id]
        assert reference in of_image
    assert [row[::2] for row in rows] == [row[::2] for row in table(log, step=2)]

    tags = {"samples/sheet", *(f"attention/{n}" for n in range(1, NUM_SAMPLES + 1))}
    assert set(log.Tags()["images"]) == tags
    for tag in tags:
        for event in log.Images(tag):
            with Image.open(io.BytesIO(event.encoded_image_string)) as image:
                assert np.asarray(image).std() > 5
        assert [event.step for event in log.Images(tag)] == [2, 4]


def table(log: EventAccumulator, step: int) -> list[tuple[str, ...]]:
    """Picture, caption and reference of each sample."""
    (event,) = (event for event in log.Tensors(WORDS) if event.step == step)
    _, _, *lines = event.tensor_proto.string_val[0].decode().splitlines()
    return [tuple(cell.strip() for cell in line[1:-1].split(" | ")) for line in lines]


@pytest.mark.slow
def test_a_logged_training_ends_with_the_same_bits(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples = TensorBoardCallback._write_samples

    def write_with_random_numbers(self: TensorBoardCallback, step: int) -> None:
        write_samples(self, step)
        torch.rand(7)
        assert not self._trainer.model.training

    monkeypatch.setattr(TensorBoardCallback, "_write_samples", write_with_random_numbers)
    plain, logged = train("plain"), train("logged", "--logs", "tensorboard")
    for name in ("model.safetensors", "training_state.safetensors"):
        expected, found = (
            load_file(run_dir / "checkpoints" / "last" / name) for run_dir in (plain, logged)
        )
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), key


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_the_same_log(run: Any, train: Train, tmp_path: Path) -> None:
    log_dir = tmp_path / "logs" / "one"
    run_dir = train("run", "--logs", "tensorboard", "--log_dir", log_dir)
    untouched = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
    # As after a kill at step 4, before that step was saved.
    checkpoints = run_dir / "checkpoints"
    shutil.rmtree(checkpoints / "step_000004")
    for link in ("last", "best"):
        (checkpoints / link).unlink()
        (checkpoints / link).symlink_to("step_000002")
    finished = run(
        *("train", "--resume", "--output_dir", run_dir),
        *("--logs", "tensorboard", "--log_dir", log_dir),
    )
    assert finished.code == 0, finished.stderr
    assert not (run_dir / "tensorboard").exists()
    log = read_log(log_dir)
    assert [step for step, _ in scalars(log, "training/loss")] == [1, 2, 3, 4]
    # Times tell which of the two wrote an event.
    speed = "speed/tokens_per_second"
    assert scalars(log, speed) == recorded(run_dir, "train", "tokens_per_second")
    assert [step for step, _ in scalars(log, "validation/loss")] == [2, 4]
    assert [event.step for event in log.Images("samples/sheet")] == [2, 4]
    again = load_file(checkpoints / "step_000004" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in untouched.items())


def test_without_the_package_nothing_is_prepared(
    run: Any, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", tmp_path / "run"),
        *("--cache_dir", tmp_path / "cache", "--logs", "tensorboard"),
    )
    assert finished.code == 2
    assert "pip install 'bitgen[logs]'" in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--logs", "paper"], "none, tensorboard"),
        (["--log_dir", "logs"], "--logs tensorboard"),
        (["--logs", "tensorboard", "--log_dir", __file__], "is a file"),
    ],
)
def test_options_that_cannot_be(
    run: Any, scenes: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    finished = run("train", "--coco_data", scenes, "--output_dir", tmp_path / "run", *options)
    assert finished.code == 2
    assert word in finished.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sharded", "number"),
    [
        ({}, False, NUM_SAMPLES),
        ({"attention_mode": "bidirectional"}, False, 0),
        ({}, True, 0),
        ({"max_positions": 36}, False, 0),  # the picture's tokens take them all
    ],
)
def test_samples_where_the_model_writes_captions(
    changes: dict[str, Any], sharded: bool, number: int
) -> None:
    images = tuple(range(10))
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(config=BitGenConfig.preset("nano", **changes), num_image_tokens=36),
        validation_set=SimpleNamespace(images=images),
        is_sharded=sharded,
    )
    samples = _samples(trainer)
    assert len(samples) == number
    assert samples == sorted(set(samples))
    trainer.validation_set = None
    assert _samples(trainer) == []


def test_a_mixture_of_experts_is_logged(train: Train) -> None:
    run_dir = train("run", "--logs", "tensorboard", "--num_experts", 2, "--max_steps", 1)
    (line,) = (
        line
        for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "train"
    )
    log = read_log(run_dir / "tensorboard")
    (balance,) = scalars(log, "training/load_balance_loss")
    assert balance == (1, pytest.approx(line["load_balance_loss"], rel=1e-6))
    for layer, shares in enumerate(line["expert_load"]):
        name = f"experts/largest_share_layer_{layer}"
        assert scalars(log, name) == [(1, pytest.approx(max(shares), rel=1e-6))]


def test_a_model_without_captions_is_logged_too(train: Train) -> None:
    run_dir = train(
        "run", "--logs", "tensorboard", "--attention_mode", "bidirectional", "--max_steps", 2
    )
    log = read_log(run_dir / "tensorboard")
    assert scalars(log, "training/robot_loss") == recorded(run_dir, "train", "robot_loss")
    assert log.Tags()["images"] == []
    assert "training/loss" not in log.Tags()["scalars"]
