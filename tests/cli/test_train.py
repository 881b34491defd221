"""`bitgen train`, from options to a run, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from bitgen.config import BitGenConfig
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.training.checkpoint import open_run

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copied(scenes: Path, tmp_path: Path) -> Path:
    """The scenes, to be damaged."""
    return Path(shutil.copytree(scenes, tmp_path / "copied"))


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_holds_what_was_asked_for(trained: Path, scenes: Path) -> None:
    opened = open_run(trained)
    assert opened.config.model_size == "nano"
    assert opened.config.image_size == 32
    assert len(opened.config.robot_names) == 5
    assert opened.training.batch_size == 8
    assert opened.data["coco_data"] == [str(scenes.resolve())]
    assert (opened.data["train_images"], opened.data["val_images"]) == (40, 8)
    # The held-out tasks are those beside the training tasks, not a share of them.
    assert opened.data["train_tasks"] == len(json.loads((scenes / "robots_train.json").read_text()))
    assert opened.data["val_tasks"] == len(json.loads((scenes / "robots_val.json").read_text()))
    assert (trained / "curves.png").is_file()
    assert [line["step"] for line in metrics(trained) if line["kind"] == "train"] == [1, 2, 3, 4]


def test_the_size_decides_what_is_not_given(
    run, scenes: Path, small_training: list[str], tmp_path: Path
) -> None:
    options = [*small_training, "--max_steps", "1"]
    del options[options.index("--image_size") : options.index("--image_size") + 2]
    finished = run("train", "--coco_data", scenes, "--output_dir", tmp_path / "run", *options)
    assert finished.code == 0, finished.stderr
    assert open_run(tmp_path / "run").config == BitGenConfig.preset("nano")


def test_summary_as_json_and_several_data_sets(
    run, scenes: Path, copied: Path, small_training: list[str], tmp_path: Path
) -> None:
    finished = run(
        *("train", "--json", "--quiet", "--coco-data", scenes, f"--coco_data={copied}"),
        *("--output_dir", tmp_path / "run", "--captions", "all", "--no-augment"),
        *(*small_training, "--max_steps", 2),
    )
    assert finished.code == 0, finished.stderr
    summary = finished.json()
    assert summary["steps"] == 2
    assert summary["run"] == str(tmp_path / "run")
    assert summary["robot_exact_match"] is None
    assert summary["first_loss"] > 0
    opened = open_run(tmp_path / "run")
    assert opened.data["train_images"] == 80
    assert opened.training.augment is False
    assert opened.training.captions == "all"
    assert opened.config.robot_names == ()


def test_a_given_tokenizer_is_used_as_it_is(
    run, scenes: Path, small_training: list[str], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.train(["a red ball lies on the floor"] * 3, 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    finished = run(
        *("train", "--coco_data", scenes, "--tokenizer", tmp_path / "tokenizer.json"),
        *("--output_dir", tmp_path / "run", *small_training, "--max_steps", 1),
    )
    assert finished.code == 0, finished.stderr
    opened = open_run(tmp_path / "run")
    assert opened.config.vocab_size == tokenizer.vocab_size
    assert json.loads(opened.tokenizer_json) == json.loads(tokenizer.to_json())


def test_resume_goes_on_as_recorded(
    run, trained: Path, small_training: list[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    cache = small_training[-1]
    finished = run(
        "train", "--resume", "--output_dir", copy, "--max_steps", 6, "--cache_dir", cache
    )
    assert finished.code == 0, finished.stderr
    assert [line["step"] for line in metrics(copy) if line["kind"] == "train"] == list(range(1, 7))
    assert open_run(copy, prefer="last").step == 6
    assert open_run(copy).training.batch_size == 8


def test_resume_takes_the_newest_run(
    run, trained: Path, small_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "one", symlinks=True)
    monkeypatch.chdir(tmp_path)
    finished = run("train", "--resume", "--max_steps", 5, "--cache_dir", small_training[-1])
    assert finished.code == 0, finished.stderr
    assert open_run(tmp_path / "runs" / "one", prefer="last").step == 5


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model_size", "tiny"), ("--image_size", "64"), ("--quantization", "none")],
)
def test_resume_refuses_another_architecture(run, trained: Path, option: str, value: str) -> None:
    before = (trained / "config.json").read_bytes()
    finished = run("train", "--resume", "--output_dir", trained, option, value)
    assert finished.code == 2
    assert option.removeprefix("--") in finished.stderr
    assert (trained / "config.json").read_bytes() == before


def test_output_that_exists(
    run, scenes: Path, trained: Path, small_training: list[str], tmp_path: Path
) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    finished = run("train", "--coco_data", scenes, "--output_dir", trained, *small_training)
    assert finished.code == 2
    assert "--overwrite" in finished.stderr
    assert (trained / "metrics.jsonl").read_bytes() == before

    copy = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", copy, "--overwrite"),
        *(*small_training, "--max_steps", 1),
    )
    assert finished.code == 0, finished.stderr
    assert open_run(copy).step == 1

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", precious, "--overwrite"), *small_training
    )
    assert finished.code == 2
    assert (precious / "thesis.txt").read_text() == "years of work"


def assert_refused(finished, tmp_path: Path, *words: str) -> None:
    assert finished.code == 2, finished.stderr
    assert finished.stdout == ""
    message = finished.stderr
    errors = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, message
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--batch_size", "0"], "batch_size"),
        (["--precision", "fp8"], "precision"),
        (["--model_size", "huge"], "huge"),
        (["--image_size", "33"], "33"),
        (["--image_encoder", "nonsense"], "nonsense"),
        (["--dropout", "1.5"], "dropout"),
        (["--robot_data", "absent.json"], "absent.json"),
        (["--robots", "absent.json"], "absent.json"),
        (["--tokenizer", "absent.json"], "absent.json"),
        (["--encoder_weights", "absent.safetensors"], "absent.safetensors"),
        (["--resume", "--overwrite"], "--overwrite"),
    ],
)
def test_options_that_cannot_be(
    run, scenes: Path, small_training: list[str], tmp_path: Path, arguments: list[str], word: str
) -> None:
    finished = run(
        *("train", "--quiet", "--coco_data", scenes, "--output_dir", tmp_path / "run"),
        *(*small_training, *arguments),
    )
    assert_refused(finished, tmp_path, word)


def test_no_data(run, small_training: list[str], tmp_path: Path) -> None:
    output = ("--output_dir", tmp_path / "run", *small_training)
    assert_refused(run("train", *output), tmp_path, "--coco_data")
    absent = tmp_path / "absent"
    assert_refused(run("train", "--coco_data", absent, *output), tmp_path, str(absent))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(run("train", "--coco_data", empty, *output), tmp_path, str(empty))


@pytest.mark.parametrize("content", ["{broken", "", "[]", "INSTANCES", "NO CAPTIONS"])
def test_captions_that_are_not(
    run, copied: Path, small_training: list[str], tmp_path: Path, content: str
) -> None:
    file = copied / "annotations" / "captions_train2017.json"
    images = json.loads(file.read_text())["images"]
    if content == "INSTANCES":
        boxes = [
            {"id": 1, "image_id": images[0]["id"], "category_id": 1, "bbox": [0, 0, 1, 1]},
        ]
        content = json.dumps({"images": images, "annotations": boxes, "categories": []})
    elif content == "NO CAPTIONS":
        content = json.dumps({"images": images, "annotations": []})
    file.write_text(content)
    finished = run(
        "train", "--coco_data", copied, "--output_dir", tmp_path / "run", *small_training
    )
    assert_refused(finished, tmp_path, "captions_train2017.json")


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("This is no picture.")
    else:
        Image.new("RGB", (1, 50)).save(path)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "one pixel"])
def test_one_bad_image_is_skipped_and_counted(
    run, copied: Path, small_training: list[str], tmp_path: Path, how: str
) -> None:
    bad = sorted((copied / "train2017").iterdir())[0]
    damage(bad, how)
    finished = run(
        *("train", "--coco_data", copied, "--robot_data", copied / "robots_train.json"),
        *("--output_dir", tmp_path / "run", *small_training, "--max_steps", 1),
    )
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count(bad.name) == 1
    data = open_run(tmp_path / "run").data
    assert (data["train_images"], data["skipped_images"]) == (39, 1)


def test_more_than_one_in_a_hundred_bad_images_stops(
    run, copied: Path, small_training: list[str], tmp_path: Path
) -> None:
    bad = sorted((copied / "train2017").iterdir())[:2]
    for path in bad:
        damage(path, "truncated")
    finished = run(
        "train", "--coco_data", copied, "--output_dir", tmp_path / "run", *small_training
    )
    assert_refused(finished, tmp_path, "2 of 48 images", bad[0].name, bad[1].name)


def test_a_full_disk(
    run, scenes: Path, small_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitgen.training.checkpoint.save_file", fail)
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", tmp_path / "run", *small_training)
    )
    assert finished.code == 2
    assert "disk is full" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_interrupt_saves_and_exits_with_130(
    run, scenes: Path, small_training: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bitgen", "train", "--coco_data", str(scenes)),
            *("--output_dir", str(output), *small_training, "--max_steps", "100000"),
        ],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (output / "metrics.jsonl").is_file() or not metrics_text(output):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    step = open_run(output, prefer="last").step
    assert step >= 1
    finished = run(
        *("train", "--resume", "--output_dir", output, "--max_steps", step + 1),
        *("--cache_dir", small_training[-1]),
    )
    assert finished.code == 0, finished.stderr
    assert open_run(output, prefer="last").step == step + 1


def metrics_text(run_dir: Path) -> str:
    return (run_dir / "metrics.jsonl").read_text()


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_same_weights(
    run, scenes: Path, small_training: list[str], trained: Path, tmp_path: Path
) -> None:
    state = load_file(trained / "checkpoints" / "last" / "model.safetensors")
    weights, prefix = tmp_path / "encoder.safetensors", "image_encoder."
    encoder = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    save_file(encoder, weights)
    first_lines = []
    for given in ([], ["--encoder_weights", weights]):
        output = tmp_path / f"run{len(first_lines)}"
        options = ("--output_dir", output, *small_training, "--max_steps", 1)
        assert run("train", "--coco_data", scenes, *options, *given).code == 0
        untouched = (output / "metrics.jsonl").read_text("utf-8").splitlines()[0]
        shutil.rmtree(output / "checkpoints")
        (output / "checkpoints").mkdir()
        assert run("train", "--resume", "--output_dir", output, *small_training[-2:]).code == 0
        resumed = (output / "metrics.jsonl").read_text("utf-8").splitlines()[0]
        before, after = json.loads(untouched), json.loads(resumed)
        for name in ("step", "loss", "image_word_loss", "grad_norm"):
            assert after[name] == before[name]
        first_lines.append(before)
    assert first_lines[0]["loss"] != first_lines[1]["loss"]
