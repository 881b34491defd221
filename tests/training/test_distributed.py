"""Two processes, started by torchrun as a user starts them, train as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bitgen.dataset.scenes import write_scenes
from bitgen.training.checkpoint import load_checkpoint, open_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(sys.platform == "win32", reason="gloo and signals of POSIX"),
]
NUM_STEPS = 5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed") / "scenes"
    write_scenes(folder, num_train=44, num_val=9, image_size=96)
    return folder


def train_command(scenes: Path, run_dir: Path, *options: str, processes: int = 1) -> list[str]:
    """58 samples: updates of 16, the last one of an epoch short, so that one process has little."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += ["--max_restarts=1", "-m"]
    command = [
        *launcher, "bitgen", "train", "--coco_data", str(scenes),
        "--robot_data", str(scenes / "robots_train.json"),
        "--output_dir", str(run_dir), "--cache_dir", str(scenes / "cache"),
        "--model_size", "nano", "--max_steps", str(NUM_STEPS), "--warmup_steps", "1",
        "--precision", "fp32", "--device", "cpu", "--save_every", "1", "--keep_checkpoints", "9",
        "--eval_every", "3", "--weights_every", "2", *options,
    ]  # fmt: skip
    return command


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(scenes: Path, run_dir: Path, *options: str, processes: int = 1) -> str:
    done = subprocess.run(
        train_command(scenes, run_dir, *options, processes=processes),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run_dir: Path, step: int) -> Any:
    return load_checkpoint(run_dir / "checkpoints" / f"step_{step:06d}")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_result_of_one_on_the_same_global_batch(
    scenes: Path, tmp_path: Path, parallel: str
) -> None:
    """4 x 4 accumulated by one process equals 4 x 2 by each of two, in full precision.

    Tolerances: losses and gradient norms 1e-4 of their value (roundings of five updates), 2e-2 in
    validation, the first update's gradients 1e-4 of the largest one.
    """
    if parallel == "fsdp":
        pytest.importorskip("torch.distributed.fsdp", reason="no FSDP")
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            pytest.skip(f"torch {torch.__version__} has no FSDP2")
    options = ("--batch_size", "4", "--quantization", "none")
    train(scenes, tmp_path / "one", *options, "--grad_accumulation", "4")
    output = train(
        scenes, tmp_path / "two", *options, "--grad_accumulation", "2", "--parallel", parallel,
        processes=2,
    )  # fmt: skip
    assert output.count("Caption pictures with") == 1  # one process alone reports
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [(x["kind"], x["step"]) for x in one] == [(x["kind"], x["step"]) for x in two]
    assert [x["kind"] for x in one].count("train") == NUM_STEPS
    for expected, found in zip(one, two, strict=True):
        for name in ("loss", "robot_loss", "image_word_loss", "grad_norm"):
            if expected.get(name) is not None:
                # Validation normalises by running statistics, which are means of the processes'.
                tolerance = 2e-2 if expected["kind"] == "validation" else 1e-4
                assert found[name] == pytest.approx(expected[name], rel=tolerance), (name, expected)
        for name in ("tokens", "images", "epoch"):
            assert found.get(name) == expected.get(name)
    first, second = (checkpoint(tmp_path / name, 1).training for name in ("one", "two"))
    gradients = [name for name in first if name.endswith(":exp_avg")]
    assert gradients and {name for name in second if name.endswith(":exp_avg")} == set(gradients)
    largest = max(first[name].abs().max().item() for name in gradients)
    for name in gradients:
        torch.testing.assert_close(
            second[name], first[name], rtol=1e-4, atol=1e-4 * largest, msg=name
        )
    # The run of two is an ordinary one: one process goes on with it.
    train(
        scenes, tmp_path / "two", "--resume", "--max_steps", str(NUM_STEPS + 1),
        "--grad_accumulation", "4",
    )  # fmt: skip
    assert open_run(tmp_path / "two", prefer="last").step == NUM_STEPS + 1


def processes_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_torchrun_starts_a_killed_training_again_and_nothing_is_lost(
    scenes: Path, tmp_path: Path
) -> None:
    """One of two processes dies by SIGKILL; all are started again and go on: bitwise the same."""
    options = ("--batch_size", "8")
    train(scenes, tmp_path / "whole", *options, processes=2)
    run_dir = tmp_path / "killed"
    command = train_command(scenes, run_dir, *options, processes=2)
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    deadline = time.monotonic() + 300
    while not (run_dir / "checkpoints" / "step_000002").exists():
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.02)
    os.kill(max(processes_of(launcher.pid)), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output[-4000:]
    assert "Going on after step" in output
    expected, found = checkpoint(tmp_path / "whole", NUM_STEPS), checkpoint(run_dir, NUM_STEPS)
    assert expected.model.keys() == found.model.keys()
    for name, value in expected.model.items():
        assert torch.equal(value, found.model[name]), name
    steps = [line["step"] for line in metrics(run_dir) if line["kind"] == "train"]
    assert steps == list(range(1, NUM_STEPS + 1))
