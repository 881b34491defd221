from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitgen.kernels.quantize import quantize_weight
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import TernaryLinear
from bitgen.training.figures import read_figures, read_metrics
from bitgen.training.weight_statistics import TernaryStatistics


def write(path: Path, lines: list[dict[str, Any]], rest: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return path


def test_figures_of_a_run(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "padding_share": 0.5, "skipped": None},
        {"kind": "train", "step": 2, "padding_share": 0.2, "skipped": "loss exploded"},
        {"kind": "weights", "step": 2, "flips": 9, "flip_share": 0.9, "total_shares": [1, 0, 0]},
        {"kind": "validation", "step": 2, "loss": 3.0, "is_best": True},
        {"kind": "train", "step": 3, "padding_share": 0.2, "skipped": "gradient norm exploded"},
        {"kind": "validation", "step": 3, "loss": 2.0, "robot_loss": 0.5, "is_best": True},
        {"kind": "train", "step": 4, "padding_share": 0.1, "skipped": None},
        {"kind": "weights", "step": 4, "flips": 7, "flip_share": 0.1,
         "total_shares": [0.25, 0.5, 0.25]},
        {"kind": "validation", "step": 4, "loss": 4.0, "robot_loss": 0.5, "is_best": False},
    ]  # fmt: skip
    figures = read_figures(write(tmp_path / "metrics.jsonl", lines))
    assert figures.padding_share == pytest.approx(0.25)
    assert (figures.skipped_steps, figures.last_skipped_step) == (2, 3)
    assert figures.last_skipped == "gradient norm exploded"
    best = {
        "step": 3,
        "loss": 2.0,
        "plan_loss": None,
        "robot_loss": 0.5,
        "robot_exact_match": None,
        "robot_threshold": None,
        "robot_temperature": None,
        "robot_word_weight": None,
        "cider": None,
    }
    assert figures.best_validation == best
    assert (figures.ternary_step, figures.flips, figures.flip_share) == (4, 7, 0.1)
    assert figures.ternary_shares == (0.25, 0.5, 0.25)


def test_figures_of_a_run_of_an_earlier_bitgen(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 1.0, "skipped": step == 2} for step in (1, 2)]
    path = write(tmp_path / "metrics.jsonl", lines, rest='{"kind": "train", "st')
    assert read_metrics(path) == lines
    figures = read_figures(path)
    assert (figures.skipped_steps, figures.last_skipped_step, figures.last_skipped) == (1, 2, None)
    assert figures.padding_share is figures.ternary_shares is figures.best_validation is None
    assert figures.flips is None


def test_total_shares_are_those_of_all_weights_together(make_config: Any) -> None:
    torch.manual_seed(3)
    model = BitGenModel(make_config(intermediate_size=96))
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    for index, layer in enumerate(layers):  # heavier tails round more weights to zero
        torch.nn.init.normal_(layer.weight).data.pow_(1 + 2 * (index % 2))
    values = torch.cat([quantize_weight(layer.weight)[0].flatten() for layer in layers])
    expected = [float((values == value).double().mean()) for value in (-1, 0, 1)]
    statistics = TernaryStatistics(model)
    shares = statistics.shares()
    assert statistics.total(shares) == pytest.approx(expected, abs=1e-6)
    plain_mean = sum(zero for _, zero, _ in shares.values()) / len(shares)
    assert abs(plain_mean - expected[1]) > 1e-3  # layers differ in size and in shares
