"""Ternary values are counted as an own quantization of the saved weights counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import TernaryLinear
from bitgen.training.checkpoint import load_checkpoint
from bitgen.training.weight_statistics import TernaryStatistics


def ternary(weight: torch.Tensor) -> np.ndarray:
    """`round(W / mean(abs(W)))`, clipped (arXiv 2402.17764, equations 1 to 3)."""
    values = weight.double().numpy()
    scaled: np.ndarray = np.clip(np.round(values / np.abs(values).mean()), -1, 1)
    return scaled


def test_flips_and_shares_are_those_of_the_weights_before_and_after_an_update(
    workshop: Any, events: Any, make_training: Any, tmp_path: Path
) -> None:
    training = make_training(
        num_epochs=2, learning_rate=0.02, weights_every=3, save_every=1, keep_checkpoints=99
    )
    events.on_weights = lambda report: events.events.append(("weights", (report,)))
    made = workshop.trainer(tmp_path / "run", training, callback=events)
    made.train()
    layers = [n for n, m in made.model.named_modules() if isinstance(m, TernaryLinear)]
    reports = events.of("weights")
    assert [report.step for report in reports] == [3, 6, 9]
    for report in reports:
        before, after = (
            load_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{step:06d}").model
            for step in (report.step - 1, report.step)
        )
        flips = num_weights = 0
        assert set(report.shares) == set(layers)
        for name in layers:
            was, now = ternary(before[f"{name}.weight"]), ternary(after[f"{name}.weight"])
            flips += int((was != now).sum())
            num_weights += now.size
            expected = [float((now == value).mean()) for value in (-1, 0, 1)]
            assert report.shares[name] == pytest.approx(expected, abs=1e-4)
        assert report.flips > 0
        assert abs(report.flips - flips) <= 2  # values on the edge, in float32 and float64
        assert report.flip_share == pytest.approx(report.flips / num_weights)


def test_a_model_in_full_precision_has_nothing_to_count(
    workshop: Any, events: Any, make_training: Any, make_config: Any, tmp_path: Path
) -> None:
    config = make_config(quantization="none")
    statistics = TernaryStatistics(BitGenModel(config))
    assert statistics.num_weights == 0 and statistics.shares() == {}
    reports: list[Any] = []
    events.on_weights = reports.append
    training = make_training(num_epochs=1, weights_every=1)
    workshop.trainer(tmp_path / "run", training, config, events).train()
    assert reports == []
