from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bitgen.training.curves import _running_mean, draw_curves

pytestmark = pytest.mark.usefixtures("all_panels")


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


def drawn_titles(lines: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> list[str]:
    """Titles of the panels, of a picture that is drawn."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    draw_curves(write(tmp_path / "metrics.jsonl", lines), tmp_path / "curves.png")
    (figure,) = figures
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_panels_are_those_that_the_run_has_something_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = training_lines(40)
    old = ["Caption loss", "Robot selection", "Learning rate", "Speed"]
    assert drawn_titles(lines, tmp_path, monkeypatch) == old
    for line in lines:
        line |= {"skipped": line["step"] == 7, "grad_norm": None if line["step"] == 7 else 1.5}
    with_norm = [*old[:2], "Gradient norm, before clipping", *old[2:]]
    assert drawn_titles(lines, tmp_path, monkeypatch) == with_norm
    for line in lines:
        line |= {"image_word_loss": 5.0, "future_2_loss": 6.0, "true_loss": line["loss"]}
        line |= {"padding_share": 0.3, "skipped": "loss exploded" if line["step"] == 7 else None}
    lines.append(
        {"kind": "weights", "step": 40, "flips": 3, "flip_share": 0.01, "total_shares": [0.3] * 3}
    )
    assert drawn_titles(lines, tmp_path, monkeypatch) == [
        *old[:2],
        *("Words foretold from the image", "Other losses", "Gradient norm, before clipping"),
        *old[2:],
        *("Padding", "Ternary weights: flips an update"),
    ]


def test_a_training_by_rewards_and_one_of_plans_have_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line | {"reward": 0.1, "loss": None} for line in training_lines(5)]
    lines.append({"kind": "validation", "step": 5, "cider": 0.2, "plan_loss": 3.0})
    titles = ["Caption loss", "CIDEr-D", "Robot selection", "Learning rate", "Speed"]
    assert drawn_titles(lines, tmp_path, monkeypatch) == titles


def test_nothing_finite_to_draw_is_no_error(tmp_path: Path, monkeypatch: Any) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "loss": None, "grad_norm": 0.0, "tokens_per_second": 0.0,
         "padding_share": 0.0, "skipped": "loss or gradients not finite"},
        {"kind": "weights", "step": 1, "flips": 0, "flip_share": 0.0},
    ]  # fmt: skip
    titles = drawn_titles(lines, tmp_path, monkeypatch)
    assert "Gradient norm, before clipping" in titles
    assert "Caption loss" not in titles
