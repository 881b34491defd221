from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitgen.training.curves import _running_mean, draw_curves


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def training_lines(count: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "loss": 8.0 / step**0.5,
            "robot_loss": None if step % 3 else 0.5,
            "learning_rate": 1e-3,
            "tokens_per_second": 900.0 + step % 7,
        }
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [1, 5, 3000])
def test_a_training_of_any_length_is_drawn(count: int, tmp_path: Path) -> None:
    lines = training_lines(count)
    lines.append(
        {"kind": "validation", "step": count, "loss": 3.0, "robot_loss": 0.4,
         "robot_exact_match": 0.75}
    )  # fmt: skip
    output = tmp_path / "curves.png"
    draw_curves(write(tmp_path / "metrics.jsonl", lines), output)
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 600 * 800
    # The validation's red and the training's blue are there.
    for colour in ((0xD1, 0x49, 0x5B), (0x4C, 0x78, 0xA8)):
        assert (abs(pixels.astype(int) - colour).sum(axis=1) < 12).sum() > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_an_older_picture_is_replaced_and_nothing_to_draw_is_no_error(tmp_path: Path) -> None:
    output = tmp_path / "curves.png"
    output.write_text("old")
    draw_curves(write(tmp_path / "metrics.jsonl", []), output)
    with Image.open(output) as image:
        assert image.format == "PNG"


def test_pyplot_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    draw_curves(write(tmp_path / "metrics.jsonl", training_lines(3)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_running_mean_is_centred_and_leaves_straight_lines_straight() -> None:
    line = [float(value) for value in range(30)]
    assert _running_mean(line, 4) == pytest.approx(line)
    assert _running_mean([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]
