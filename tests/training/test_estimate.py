"""What a dry run foretells, against the same updates on real tensors."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.robots import Robot, RobotTask
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers
from bitgen.training.estimate import estimate_memory, free_bytes, largest_batch, part_sizes
from bitgen.training.rehearsal import (
    BatchShape,
    Rehearsal,
    StorageTracker,
    batch_tensors,
    make_batch,
    rehearse_without_memory,
)
from bitgen.training.setup import TrainingData

CPU = torch.device("cpu")
# Operations of torch 2.2 make a few small tensors less on real data than on fake ones.
TOLERANCE = 0.005 if torch.__version__.startswith("2.2.") else 0.002
SHAPE = BatchShape(rows=6, text_length=13, num_words=9, num_robots=2, robot_length=11)


@pytest.fixture
def config(make_config: Any) -> BitGenConfig:
    return make_config()


def tracked(
    config: BitGenConfig, training: TrainingConfig, shape: BatchShape, dtype: torch.dtype
) -> tuple[Rehearsal, StorageTracker]:
    """The rehearsal with real tensors."""
    batch, tracker = make_batch(config, shape), StorageTracker()
    tracker.ignore(batch_tensors(batch))
    with tracker:
        rehearsal = Rehearsal(BitGenModel(config), training, batch, shape.robot_length, CPU, dtype)
        tracker.restart_peak()
        rehearsal.update()
    return rehearsal, tracker


# What is counted --------------------------------------------------------------------------------


def test_the_tracker_counts_what_lives() -> None:
    given, tracker = torch.zeros(1000), StorageTracker()
    tracker.ignore([given])
    with tracker:
        kept = given + 1  # 4,000 bytes
        view = kept[:10]
        (kept * 2).sum()
        assert given.view(10, 100).shape == (10, 100)
        del kept
    assert tracker.live.total == 4000  # of which the view keeps all
    assert tracker.peak.total in (8000, 8004)
    del view
    assert tracker.live.total == 0
    assert tracker.live.heap == tracker.live.mapped == 0


def test_the_tracker_tells_large_blocks_apart() -> None:
    tracker = StorageTracker()
    with tracker:
        large = torch.empty(32 << 20, dtype=torch.uint8)
        small = torch.empty((32 << 20) - 1, dtype=torch.uint8)
    assert tracker.peak == (len(large) + len(small), len(small), len(large))


@pytest.mark.parametrize("quantization", ["ternary", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_live_as_real_ones_do(
    config: BitGenConfig, make_training: Any, quantization: str, dtype: torch.dtype
) -> None:
    config = replace(config, quantization=quantization, dropout=0.1)
    fake, foretold = rehearse_without_memory(config, make_training(), SHAPE, CPU, dtype)
    real, counted = tracked(config, make_training(), SHAPE, dtype)
    assert foretold.peak.total == pytest.approx(counted.peak.total, rel=TOLERANCE)
    assert foretold.live.total == pytest.approx(counted.live.total, rel=TOLERANCE)
    for part in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(fake, part)() == getattr(real, part)()
    state = real.weight_bytes() + real.gradient_bytes() + real.optimizer_bytes()
    assert counted.at_start.total == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mode": "causal"},
        {"attention_mode": "bidirectional"},
        {"image_encoder": "mobilenet_v3_small", "freeze_encoder": True},
        {"num_kv_heads": 1},
    ],
    ids=str,
)
def test_other_architectures(
    config: BitGenConfig, make_training: Any, changes: dict[str, Any]
) -> None:
    config = replace(config, **changes)
    _, foretold = rehearse_without_memory(config, make_training(), SHAPE, CPU, torch.float32)
    _, counted = tracked(config, make_training(), SHAPE, torch.float32)
    assert foretold.peak.total == pytest.approx(counted.peak.total, rel=TOLERANCE)


def test_a_rehearsal_learns_as_the_trainer_does(config: BitGenConfig, make_training: Any) -> None:
    """Its updates are updates: every weight moves, and accumulation repeats the batch."""
    torch.manual_seed(0)
    model = BitGenModel(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = make_training(grad_accumulation=2)
    rehearsal = Rehearsal(model, training, make_batch(config, SHAPE), 11, CPU, torch.float32)
    rehearsal.update()
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


# Memory -----------------------------------------------------------------------------------------


def test_parts_add_up(config: BitGenConfig, make_training: Any) -> None:
    estimate = estimate_memory(config, make_training(), SHAPE)
    parts = asdict(estimate)
    total, _ = parts.pop("total"), parts.pop("device")
    assert total == sum(parts.values())
    assert all(value >= 0 for value in parts.values())
    num_parameters = sum(p.numel() for p in BitGenModel(config).parameters())
    assert estimate.gradients == 4 * num_parameters
    assert estimate.optimizer == pytest.approx(8 * num_parameters, rel=0.01)
    assert estimate.weights >= 4 * num_parameters


@pytest.mark.slow
def test_larger_batches_and_texts_take_more(config: BitGenConfig, make_training: Any) -> None:
    def activations(**changes: Any) -> int:
        shape, training = replace(SHAPE, **changes), make_training()
        _, tracker = rehearse_without_memory(config, training, shape, CPU, torch.float32)
        return tracker.peak.total - tracker.at_start.total

    by_rows = [activations(rows=rows) for rows in (4, 16, 32, 64)]
    assert by_rows == sorted(set(by_rows))
    assert by_rows[3] - by_rows[2] == pytest.approx(2 * (by_rows[2] - by_rows[1]), rel=0.1)
    assert activations(text_length=40) > activations(text_length=13)
    assert activations(text_length=13) == activations(text_length=16)  # both are padded to 16


@pytest.mark.slow
def test_activation_checkpointing_takes_less(config: BitGenConfig, make_training: Any) -> None:
    deep, large = replace(config, num_layers=8, encoder_layers=8), replace(SHAPE, rows=32)
    peaks = {}
    for enabled in (False, True):
        training = make_training(activation_checkpointing=enabled)
        _, tracker = rehearse_without_memory(deep, training, large, CPU, torch.float32)
        peaks[enabled] = tracker.peak.total - tracker.at_start.total
    assert peaks[True] < 0.8 * peaks[False]


def test_experts_and_further_tokens_are_counted(config: BitGenConfig, make_training: Any) -> None:
    larger = replace(config, num_experts=4, experts_per_token=2, predict_tokens=3)
    before, after = (estimate_memory(each, make_training(), SHAPE) for each in (config, larger))
    assert after.weights > before.weights and after.activations > before.activations


def test_no_memory_is_taken(make_training: Any) -> None:
    """A model whose training takes a terabyte is rehearsed."""
    config = BitGenConfig(num_layers=1, encoder_layers=1, vocab_size=2**28)
    _, tracker = rehearse_without_memory(config, make_training(), SHAPE, CPU, torch.float32)
    assert tracker.peak.total > 1e12


def test_batches_of_accumulation_and_workers_count(
    config: BitGenConfig, make_training: Any
) -> None:
    one = estimate_memory(config, make_training(), SHAPE).data
    more = make_training(grad_accumulation=3, num_workers=2)
    assert estimate_memory(config, more, SHAPE).data == 7 * one
    batch = make_batch(config, SHAPE)
    assert one == sum(tensor.nbytes for tensor in batch_tensors(batch))


def test_free_memory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    monkeypatch.setattr("bitgen.training.estimate._MEMORY_INFO", info)
    assert free_bytes(CPU) is None
    info.write_text("MemTotal:       24000 kB\nMemAvailable:   1500 kB\n")
    assert free_bytes(CPU) == 1500 * 1024


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["ternary", "none"])
def test_parts_hold_every_parameter_once(config: BitGenConfig, quantization: str) -> None:
    model = BitGenModel(replace(config, quantization=quantization))
    parts = part_sizes(model)
    counted = sum(part.ternary_parameters + part.float_parameters for part in parts)
    assert counted == sum(p.numel() for p in model.parameters())
    pack_ternary_layers(model)
    exported = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sum(part.exported_bytes for part in parts) == exported
    assert (sum(part.ternary_parameters for part in parts) > 0) == (quantization == "ternary")


def test_the_largest_batch_holds_the_longest_text(make_training: Any) -> None:
    captions = ["a red square", "a very large and very red square " * 3, "x"]
    images = [CaptionedImage(Path(f"{i}.png"), i, (text,)) for i, text in enumerate(captions)]
    robot = Robot("Drone", ("fly",), ("weak",), ("air",))
    task = RobotTask("fly over there", ("Drone",))
    data = TrainingData(images, [], [task], [], [robot])
    tokenizer = Tokenizer.train(data.texts(), 384)
    longest = len(tokenizer.encode(" ".join(captions[1].split())))
    cases = {longest - 1: longest, longest: longest + 1, longest + 1: longest + 2}
    for limit, length in cases.items():  # <|bos|>, and <|eos|> where there is room
        shape = largest_batch(data, tokenizer, make_training(max_caption_tokens=limit))
        assert shape.text_length == length
    assert shape.rows == make_training().batch_size
    assert (shape.num_robots, shape.robot_length) == (1, len(tokenizer.encode_robot(robot.text())))
    long_task = replace(data, train_tasks=[RobotTask("go " * 200, ("Drone",))])
    shape = largest_batch(long_task, tokenizer, make_training())
    assert shape.text_length == len(tokenizer.encode_task("go " * 200))
