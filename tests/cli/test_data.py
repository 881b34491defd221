"""`bitgen data`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def test_scenes_say_how_to_train_and_keep_what_is_there(run, tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    small = ("--num_train", 3, "--num_val", 2, "--image_size", 32)
    finished = run("data", "scenes", folder, *small)
    assert finished.code == 0, finished.stderr
    assert f"bitgen train --coco_data {folder}" in finished.stdout
    assert len(list((folder / "val2017").iterdir())) == 2

    assert run("data", "scenes", folder, *small).code == 2
    assert run("data", "scenes", folder, *small, "--overwrite").code == 0

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert run("data", "scenes", tmp_path / "mine", *small, "--overwrite").code == 2
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("option", ["--num_train", "--num_val", "--image_size"])
def test_scenes_of_no_size(run, tmp_path: Path, option: str) -> None:
    finished = run("data", "scenes", tmp_path / "scenes", option, 0)
    assert finished.code == 2
    assert not (tmp_path / "scenes").exists()


def test_check_of_a_good_and_a_damaged_set(run, scenes: Path, tmp_path: Path) -> None:
    good = run("data", "check", scenes)
    assert good.code == 0, good.stdout
    assert "No problems found." in good.stdout

    damaged = Path(shutil.copytree(scenes, tmp_path / "damaged"))
    first, second = sorted((damaged / "train2017").iterdir())[:2]
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    finished = run("data", "check", damaged)
    assert finished.code == 2
    assert first.name in finished.stdout
    assert second.name in finished.stdout
    report = run("data", "check", damaged, "--json").json()
    named = {Path(problem["file"]).name for problem in report["problems"]}
    assert {first.name, second.name} <= named


def test_check_of_nothing(run, tmp_path: Path) -> None:
    finished = run("data", "check", tmp_path / "absent")
    assert finished.code == 2
    assert "absent" in finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "arguments", [("imagenet", "--output", "out"), ("coco", "--output", "out", "--year", "1999")]
)
def test_downloads_that_do_not_exist(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = run("data", "download", *arguments)
    assert finished.code == 2
    assert not (tmp_path / "out").exists()


def test_download_from_a_server_that_is_not_there(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitgen.dataset.download.time.sleep", lambda seconds: None)
    finished = run(
        *("data", "download", "coco", "--output", tmp_path / "out"),
        *("--base_url", "http://127.0.0.1:9"),
    )
    assert finished.code == 1
    assert "127.0.0.1:9" in finished.stderr
    assert "Traceback" not in finished.stderr
