"""`bitgen train`, from options to a run, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitgen.config import BitGenConfig
from bitgen.dataset.coco import load_coco
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.export.loaded import load_run
from bitgen.export.safetensors import load_artifact
from bitgen.training.checkpoint import open_run
from bitgen.training.estimate import MemoryEstimate

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
    assert open_run(tmp_path / "run").config == BitGenConfig.preset("nano", caption_idf=True)


def test_summary_as_json_and_several_data_sets(
    run, scenes: Path, copied: Path, small_training: list[str], tmp_path: Path
) -> None:
    finished = run(
        *("train", "--json", "--quiet", "--coco-data", scenes, f"--coco_data={copied}"),
        *("--output_dir", tmp_path / "run", "--captions", "all", "--no-augment"),
        *(*small_training, "--max_steps", 2, "--weights_every", 2),
    )
    assert finished.code == 0, finished.stderr
    summary = finished.json()
    assert summary["steps"] == 2
    assert summary["run"] == str(tmp_path / "run")
    assert summary["robot_exact_match"] is None
    assert summary["first_loss"] > 0
    assert (summary["device"], summary["processes"], summary["precision"]) == ("cpu", 1, "fp32")
    assert summary["wall_seconds"] > summary["seconds"] > 0
    assert summary["best_validation"]["step"] == summary["best_step"] == 2
    assert summary["best_validation"]["loss"] == summary["validation_loss"]
    assert summary["skipped_steps"] == 0 and summary["last_skipped"] is None
    assert sum(summary["ternary_shares"]) == pytest.approx(1, abs=1e-5)
    assert summary["flips"] > 0
    paddings = [
        line["padding_share"] for line in metrics(tmp_path / "run") if "padding_share" in line
    ]
    assert summary["padding_share"] == pytest.approx(sum(paddings) / 2)
    opened = open_run(tmp_path / "run")
    assert opened.data["train_images"] == 80
    assert opened.training.augment is False
    assert opened.training.captions == "all"
    assert opened.config.robot_names == ()


def test_the_table_at_the_end_and_info_say_what_was_recorded(
    run, scenes: Path, small_training: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    finished = run(
        *("train", "--coco_data", scenes, "--robot_data", scenes / "robots_train.json"),
        *("--output_dir", output, *small_training, "--weights_every", 2),
    )
    assert finished.code == 0, finished.stderr
    lines = metrics(output)
    lines[1]["skipped"] = "gradient norm 1e+05 exploded (usually 3)"
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = next(line for line in lines if line.get("is_best"))
    flips = next(line for line in reversed(lines) if line["kind"] == "weights")
    in_both = {
        "best validation": f"step 4: loss {best['loss']:.3f}, robot loss {best['robot_loss']:.3f}",
        "padding": "% of text positions",
        "ternary weights": f"0 {flips['total_shares'][1]:.1%}",
        "flips an update": f"{flips['flips']:,} of them",
    }
    table, info = finished.stdout, run("info", output).stdout
    for text in (table, info):
        for name, words in in_both.items():
            (row,) = (line for line in text.splitlines() if line.strip().startswith(name))
            assert words in row
    assert "cpu, fp32" in table and "skipped" not in table
    assert "two_stage, learning rate 0.002, warm-up of 1 updates, batches of 8" in info
    assert "1, the last one step 2: gradient norm 1e+05 exploded (usually 3)" in info
    assert run("info", output, "--json").json()["figures"]["last_skipped_step"] == 2
    assert run("info", output / "checkpoints" / "last", "--json").json()["figures"] is None


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


def test_a_tokenizer_from_before_the_mask_token_serves_for_all_but_mlm(
    run, scenes: Path, small_training: list[str], tmp_path: Path
) -> None:
    content = json.loads(Tokenizer.train(["a red ball lies on the floor"] * 3, 300).to_json())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|mask|>"]
    # As then, words begin where the mask token stands now.
    vocabulary = {t: i for t, i in content["model"]["vocab"].items() if t != "<|mask|>"}
    content["model"]["vocab"] = {t: i - (i > 5) for t, i in vocabulary.items()}
    old = tmp_path / "tokenizer.json"
    old.write_text(json.dumps(content), encoding="utf-8")
    command = (
        *("train", "--quiet", "--coco_data", scenes, "--tokenizer", old, *small_training),
        *("--max_steps", 1, "--output_dir", tmp_path / "run"),
    )
    refused = run(*command, "--objective", "mlm", "--attention_mode", "bidirectional")
    assert_refused(refused, tmp_path, "<|mask|>", "--tokenizer")
    assert run(*command).code == 0
    picture = next((scenes / "val2017").iterdir())
    assert run("infer", picture, "--model", tmp_path / "run", "--quiet").code == 0


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
        (["--num_experts", "2", "--experts_per_token", "3"], "experts_per_token"),
        (["--router_z_weight", "-1"], "router_z_weight"),
        (["--robot_data", "absent.json"], "absent.json"),
        (["--robots", "absent.json"], "absent.json"),
        (["--tokenizer", "absent.json"], "absent.json"),
        (["--encoder_weights", "absent.safetensors"], "absent.safetensors"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--objective", "nonsense"], "objective"),
        (["--objective", "mlm"], "--attention_mode bidirectional"),
        (["--mlm_probability", "1"], "mlm_probability"),
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


# The recipe of tiny and small ---------------------------------------------------------------------


@pytest.fixture
def photographs(scenes: Path, small_training: list[str]) -> list[object]:
    """Options of a training of tiny, small enough, that name nothing of its recipe."""
    return [
        *("--coco_data", scenes, "--model_size", "tiny", "--image_size", "64"),
        *("--warmup_steps", "1", "--precision", "fp32", *small_training[-4:]),
    ]


@pytest.mark.slow
def test_tiny_learns_words_first_and_goes_on_with_as_many(
    run, photographs: list[object], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    finished = run("train", *photographs, "--num_epochs", 3, "--output_dir", output)
    assert finished.code == 0, finished.stderr
    assert "The first 1 steps train the image encoder alone" in finished.stderr
    training = open_run(output).training
    assert (training.batch_size, training.norm_batch, training.schedule) == (64, 64, "cosine")
    assert (training.min_learning_rate, training.word_mixup) == (2e-4, 0.2)
    assert training.word_pretraining_steps == 1  # of 3: an update an epoch
    assert training.word_pretraining_image_size == 0  # not above the 64 px of the pictures
    config = open_run(output).config
    assert (config.patch_size, config.stem_residual_convolutions) == (32, 1)
    assert "1 updates on image words first, batches of 64" in run("info", output).stdout

    # Of four there would be two.
    longer = run("train", "--resume", "--output_dir", output, "--num_epochs", 4, *photographs[-2:])
    assert longer.code == 0, longer.stderr
    assert open_run(output).training.word_pretraining_steps == 1
    losses = [line["loss"] for line in metrics(output) if line["kind"] == "train"]
    assert [loss is None for loss in losses] == [True] + [False] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (60, 0, 0.2)),
        (("--image_size", "160"), (60, 96, 0.2)),
        (("--word_pretraining_steps", "0"), (0, 0, 0.2)),
        (("--word_pretraining_steps", "5", "--word_mixup", "0"), (5, 0, 0.0)),
        (("--freeze_encoder",), (0, 0, 0.0)),
        (("--image_encoder", "resnet18"), (0, 0, 0.0)),
        (("--image_word_weight", "0"), (0, 0, 0.0)),
    ],
    ids=str,
)
def test_where_words_are_learnt_first(
    run,
    photographs: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    expected: tuple[int, int, float],
) -> None:
    estimated = []

    def estimate(config: object, training: object, shape: object) -> MemoryEstimate:
        estimated.append(training)  # what it would take is not asked here
        return MemoryEstimate("cpu", *[0] * 8, total=2000)

    monkeypatch.setattr("bitgen.training.estimate.estimate_memory", estimate)
    monkeypatch.setattr("bitgen.training.estimate.free_bytes", lambda device: 1000)
    finished = run("train", "--dry_run", "--json", *photographs, "--max_steps", 100, *options)
    assert finished.code == 0, finished.stderr
    (training,) = estimated
    found = finished.json()["word_pretraining_updates"]
    assert (found, training.word_pretraining_image_size, training.word_mixup) == expected


@pytest.mark.slow
def test_a_training_that_starts_from_tiny_learns_no_words_first(
    run, photographs: list[object], scenes: Path, tmp_path: Path
) -> None:
    first = run(
        "train", *photographs, "--max_steps", 1, "--batch_size", 8, "--output_dir", tmp_path / "a"
    )
    assert first.code == 0, first.stderr
    second = run(
        *("train", "--coco_data", scenes, "--initial_model", tmp_path / "a", "--max_steps", 3),
        *("--warmup_steps", 1, "--output_dir", tmp_path / "b", *photographs[-4:]),
    )
    assert second.code == 0, second.stderr
    training = open_run(tmp_path / "b").training
    assert (training.batch_size, training.norm_batch, training.schedule) == (64, 64, "cosine")
    assert (training.word_pretraining_steps, training.min_learning_rate) == (0, 1e-5)


def test_word_pretraining_asked_for_where_it_cannot_be_is_refused(
    run, photographs: list[object], tmp_path: Path
) -> None:
    for options, word in (
        (("--image_encoder", "resnet18", "--word_pretraining_image_size", 96), "resnet18"),
        (("--image_word_weight", 0, "--word_pretraining_steps", 5), "image_word_weight"),
    ):
        refused = run("train", *photographs, *options, "--output_dir", tmp_path / "run")
        assert refused.code == 2
        assert word in refused.stderr


def test_help_says_what_the_sizes_take(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(run("train", "--help").stdout.split())
    assert "Default: 60% of the updates for tiny and small, else 0." in text
    assert "Default: 64 for tiny and small, else 32." in text
    assert "Default: 32 for tiny and small, else 16." in text
    assert "Default: 96 for nano, 160 for tiny, else 224." in text


# What it would take, without training ------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    run, scenes: Path, small_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small_training[: small_training.index("--cache_dir")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "cache"))
    before = sorted(scenes.rglob("*"))
    command = ["train", "--dry_run", "--coco_data", scenes, *options]
    command += ["--robot_data", scenes / "robots_train.json"]
    finished = run(*command, "--json")
    assert finished.code == 0, finished.stderr
    found = finished.json()
    memory = found["memory"]
    parts = [value for name, value in memory.items() if name not in ("device", "total")]
    assert memory["total"] == sum(parts) > 100e6
    assert found["fits"] is True
    tasks = json.loads((scenes / "robots_train.json").read_text())
    assert found["train_samples"] == 40 + len(tasks)
    assert found["updates_per_epoch"] == -(-found["train_samples"] // 8)
    assert found["total_updates"] == 4  # --max_steps
    assert found["seconds_in_total"] == pytest.approx(4 * found["seconds_per_update"])
    assert found["exported_bytes"] == sum(part["exported_bytes"] for part in found["parts"])
    assert list(tmp_path.iterdir()) == []
    assert sorted(scenes.rglob("*")) == before


@pytest.mark.slow
def test_a_dry_run_counts_updates_of_words_by_their_own_time(
    run, scenes: Path, small_training: list[str]
) -> None:
    command = ("train", "--dry_run", "--coco_data", scenes, *small_training)
    finished = run(*command, "--word_pretraining_steps", 3, "--json")
    assert finished.code == 0, finished.stderr
    found = finished.json()
    assert found["word_pretraining_updates"] == 3
    whole, words = found["seconds_per_update"], found["seconds_per_word_update"]
    assert found["seconds_in_total"] == pytest.approx(whole + 3 * words)
    table = run(*command, "--word_pretraining_steps", 3).stdout
    assert "the first 3 updates, of the image encoder alone" in table


def test_a_dry_run_that_does_not_fit_warns(
    run, scenes: Path, small_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitgen.training.estimate.free_bytes", lambda device: 1000)
    finished = run("train", "--dry_run", "--coco_data", scenes, *small_training)
    assert finished.code == 0, finished.stderr
    assert "warning: This does not fit" in finished.stderr
    assert "not measured: it does not fit in memory" in finished.stdout
    assert "image encoder" in finished.stdout
    assert "activations" in finished.stdout


def test_a_dry_run_refuses_what_training_would(run, scenes: Path, trained: Path) -> None:
    resumed = run("train", "--dry_run", "--resume", "--output_dir", trained)
    assert resumed.code == 2
    assert "--dry_run is for a new training" in resumed.stderr
    existing = run("train", "--dry_run", "--coco_data", scenes, "--output_dir", trained)
    assert existing.code == 2
    assert "exists already" in existing.stderr


def test_a_training_starts_from_another_runs_weights(
    run, scenes: Path, trained: Path, small_training: list[str], tmp_path: Path
) -> None:
    """Which are validated and saved first; a second stage then rewards captions."""
    command = (
        *("train", "--quiet", "--initial_model", trained, "--coco_data", scenes),
        *("--objective", "self_critical", "--num_sampled_captions", 2, "--max_caption_tokens", 6),
        *("--batch_size", 4, "--max_steps", 1, "--cache_dir", small_training[-1]),
    )
    finished = run(*command, "--json", "--output_dir", tmp_path / "run")
    assert finished.code == 0, finished.stderr
    assert finished.json()["cider"] is not None
    opened, first = open_run(tmp_path / "run"), open_run(trained)
    assert opened.config == first.config
    assert opened.tokenizer_json == first.tokenizer_json
    assert opened.robots_json == first.robots_json
    assert opened.data["initial_model"] == [str(trained.resolve())]
    weights = load_file(tmp_path / "run" / "checkpoints" / "step_000000" / "model.safetensors")
    expected = load_file(first.model_path)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].equal(value), name
    assert [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "validation"] == [
        0, 1,
    ]  # fmt: skip


def test_frequencies_of_captions_are_counted_where_a_model_has_none(
    run, scenes: Path, make_run, small_training: list[str], tmp_path: Path
) -> None:
    old = make_run("old")  # as runs were before they had them
    assert not open_run(old).config.caption_idf
    finished = run(
        *("train", "--initial_model", old, "--coco_data", scenes, "--max_steps", 1),
        *("--batch_size", 4, "--cache_dir", small_training[-1], "--output_dir", tmp_path / "new"),
    )
    assert finished.code == 0, finished.stderr
    tokenizer = Tokenizer.from_json(open_run(old).tokenizer_json)
    texts = [text for image in load_coco([scenes], "train") for text in image.captions]
    words = {token for text in texts for token in tokenizer.encode(text)}
    assert open_run(tmp_path / "new").config.caption_idf
    idf = load_run(tmp_path / "new").model.caption_idf
    unseen = torch.tensor([token not in words for token in range(len(idf))])
    assert idf[unseen].unique().tolist() == pytest.approx([math.log(40)], rel=1e-3)
    assert 0 <= idf[~unseen].min() < idf[~unseen].max() <= idf[unseen][0]


def test_a_training_starts_from_an_exported_file(
    run, scenes: Path, exported: Path, trained: Path, small_training: list[str], tmp_path: Path
) -> None:
    finished = run(
        *("train", "--initial_model", exported, "--coco_data", scenes, "--max_steps", 1),
        *("--cache_dir", small_training[-1], "--output_dir", tmp_path / "run"),
    )
    assert finished.code == 0, finished.stderr
    opened, first = open_run(tmp_path / "run"), open_run(trained)
    assert f"Starting from step {first.step:,} of {exported}" in finished.stderr
    assert (opened.config, opened.tokenizer_json) == (first.config, first.tokenizer_json)
    assert opened.robots_json == first.robots_json
    started = load_run(tmp_path / "run" / "checkpoints" / "step_000000").model.state_dict()
    expected = load_artifact(exported).model.state_dict()
    assert started.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(started[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image_size", "64"], ["image_size is 32 there, 64 here"]),
        (["--model_size", "tiny"], ["num_layers is 3 there, 6 here", "image_size"]),
        (["--encoder_weights", "DEFAULT"], ["--encoder_weights"]),
        (["--initial_model", "absent"], ["absent"]),
        (["--resume"], ["--initial_model"]),
    ],
)
def test_what_does_not_fit_the_initial_model_is_refused(
    run, scenes: Path, trained: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    finished = run(
        *("train", "--quiet", "--initial_model", trained, "--coco_data", scenes),
        *("--output_dir", tmp_path / "run", *arguments),
    )
    assert_refused(finished, tmp_path, *words)
