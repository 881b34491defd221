"""A tiny data set and a run trained on it, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitgen.cli.app import main
from bitgen.dataset.scenes import write_scenes


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The single line of stdout, as JSON."""
        (line,) = self.stdout.splitlines()
        return json.loads(line)

    def json_lines(self) -> list[dict[str, Any]]:
        """Each line of stdout, as JSON."""
        return [json.loads(line) for line in self.stdout.splitlines()]


Run = Callable[..., Finished]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def run(*arguments: object) -> Finished:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Finished(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes to train on and 8 held out."""
    directory = tmp_path_factory.mktemp("cli") / "scenes"
    write_scenes(directory, num_train=40, num_val=8, seed=1, image_size=48)
    return directory


@pytest.fixture(scope="session")
def small_training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that make a training take a second or two."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--model_size", "nano", "--image_size", "32", "--batch_size", "8", "--max_steps", "4"),
        *("--warmup_steps", "1", "--precision", "fp32", "--device", "cpu"),
        *("--cache_dir", str(cache)),
    ]


@pytest.fixture(scope="session")
def trained(
    scenes: Path, small_training: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on captions and robot tasks."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "--quiet", "--coco_data", str(scenes)),
                *("--robot_data", str(scenes / "robots_train.json")),
                *("--output_dir", str(output), *small_training),
            ]
        )
    assert ended.value.code == 0
    return output


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as one file."""
    output = tmp_path_factory.mktemp("exported") / "model.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["export", "--quiet", "--model", str(trained), "--output", str(output)])
    assert ended.value.code == 0
    return output
