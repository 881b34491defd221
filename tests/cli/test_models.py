"""Which model a command takes: the one that is named, the newest run, or the one that ships."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitgen import shipped

TASK = "Bring back the red ball."


@pytest.fixture
def card(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a model, and a working folder without runs. Returns the model's card."""
    package = tmp_path / "package"
    folder = package / "data" / "model"
    folder.mkdir(parents=True)
    shutil.copyfile(exported, folder / "tiny.safetensors")
    (folder / "README.md").write_text("A card.")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    return folder / "README.md"


@pytest.fixture
def picture(scenes: Path) -> Path:
    return sorted((scenes / "val2017").iterdir())[0]


def test_without_runs_the_model_that_ships_answers(
    run, card: Path, exported: Path, picture: Path
) -> None:
    finished = run("infer", picture, "--task", TASK, "--json")
    assert finished.code == 0
    assert finished.stderr == "Using the model that ships with BitGen, tiny.\n"
    named = run("infer", picture, "--task", TASK, "--json", "--model", exported)
    assert finished.json() == named.json()
    assert named.stderr == ""


def test_a_run_comes_before_the_model_that_ships(
    run, card: Path, trained: Path, picture: Path
) -> None:
    Path("runs", "unfinished").mkdir(parents=True)
    assert "ships with BitGen" in run("infer", picture).stderr
    shutil.copytree(trained, Path("runs", "mine"), symlinks=True)
    assert run("infer", picture).stderr == f"Using the newest run, {Path('runs', 'mine')}.\n"
    finished = run("infer", picture, "--model", "shipped")
    assert (finished.code, finished.stderr) == (0, "")


def test_info_shows_the_model_that_ships_and_where_its_card_is(
    run, card: Path, trained: Path
) -> None:
    finished = run("info")
    assert finished.code == 0
    assert str(card) in finished.stdout
    assert run("info", "shipped").stdout == finished.stdout
    assert "model card" not in run("info", trained).stdout


def test_only_runs_are_exported(run, card: Path) -> None:
    finished = run("export", "--output", "copy.safetensors")
    assert finished.code == 2
    assert "no trained run" in finished.stderr
    assert not Path("copy.safetensors").exists()


def test_without_run_and_model_the_error_says_what_to_do(
    run, card: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "bare" / "src" / "bitgen")
    finished = run("infer", picture)
    assert finished.code == 2
    assert "no trained run in runs" in finished.stderr
    assert "bitgen train" in finished.stderr
    finished = run("infer", picture, "--model", "shipped")
    assert finished.code == 2
    assert "built without a model" in finished.stderr


def test_the_choice_needs_no_torch_where_there_are_no_runs(tmp_path: Path) -> None:
    program = (
        "import sys; from bitgen.cli.models import model_to_ask\n"
        "from bitgen import shipped\n"
        "from pathlib import Path\n"
        "Path('data', 'model').mkdir(parents=True)\n"
        "Path('data', 'model', 'tiny.safetensors').touch()\n"
        "shipped._PACKAGE = Path.cwd()\n"
        "print(model_to_ask(None).name, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["tiny.safetensors", "False"]
