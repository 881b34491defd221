"""`bitgen demo`, small."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bitgen.training.checkpoint import open_run


@pytest.mark.slow
def test_demo_writes_everything_and_measures(run, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "demo"
    arguments = (
        *("demo", "--output_dir", output, "--num_train", 24, "--num_val", 6, "--max_steps", 2),
        *("--batch_size", 8, "--cache_dir", tmp_path / "cache", "--device", "cpu"),
    )
    finished = run(*arguments, "--json")
    assert finished.code == 0, finished.stderr
    figures = finished.json()
    assert figures["num_captions"] == figures["artifact_captions_equal"] == 6
    for share in ("object_right", "all_right", "robots_exact_match", "robots_exact_match_shuffled"):
        assert 0 <= figures[share] <= 1
    assert figures["all_right"] <= min(figures["object_right"], figures["place_right"])
    assert figures["artifact_bytes"] == (output / "demo.safetensors").stat().st_size
    assert open_run(output).step == 2
    with Image.open(output / "sheet.png") as sheet:
        assert min(sheet.size) > 200

    again = run(*arguments)
    assert again.code == 2
    assert "--overwrite" in again.stderr
    replaced = run(*arguments, "--overwrite")
    assert replaced.code == 0, replaced.stderr
    assert "6 of 6" in replaced.stdout
    assert str(output / "sheet.png") in replaced.stdout
