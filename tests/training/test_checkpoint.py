from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.errors import DiskFullError, ModelFileError, OutputExistsError
from bitgen.training import checkpoint
from bitgen.training.checkpoint import (
    MetricsLog,
    create_run,
    latest_run,
    load_checkpoint,
    load_model_tensors,
    open_run,
    read_tensors,
    remove_temporaries,
    save_checkpoint,
    update_run_config,
)

CONFIG = BitGenConfig(robot_names=("Drone",))
TRAINING = TrainingConfig(num_epochs=3)


def new_run(run_dir: Path) -> Path:
    return create_run(
        run_dir,
        config=CONFIG,
        training=TRAINING,
        data={"coco_data": ["somewhere"], "train_images": 7},
        tokenizer_json='{"a": "é"}',
        robots_json="[]",
    )


def save(run_dir: Path, step: int, is_best: bool = False, keep: int = 2, value: float = 0) -> Path:
    return save_checkpoint(
        run_dir,
        step,
        model={"weight": torch.full((3, 2), float(step) + value)},
        training={"optimizer.weight:step": torch.tensor(float(step))},
        state={"loss": 0.5},
        is_best=is_best,
        keep=keep,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_reads_back_as_it_was_created(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "runs" / "mine")
    assert names(run_dir) == ["checkpoints", "config.json", "robots.json", "tokenizer.json"]
    assert names(run_dir.parent) == ["mine"]
    values = json.loads((run_dir / "config.json").read_text())
    assert values["format_version"] == 1
    assert set(values) == {"format_version", "model", "training", "data"}
    run = open_run(run_dir)
    assert (run.config, run.training) == (CONFIG, TRAINING)
    assert run.data == {"coco_data": ["somewhere"], "train_images": 7}
    assert (run.tokenizer_json, run.robots_json) == ('{"a": "é"}', "[]")
    assert run.checkpoint_dir is None
    with pytest.raises(ModelFileError, match="no checkpoint yet"):
        _ = run.model_path


def test_an_existing_run_is_left_alone_and_an_empty_folder_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    new_run(tmp_path / "empty")
    before = (tmp_path / "empty" / "config.json").read_text()
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        new_run(tmp_path / "empty")
    assert "--resume" in str(caught.value.remedy)
    assert (tmp_path / "empty" / "config.json").read_text() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        new_run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "robots.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(text)

    monkeypatch.setattr(checkpoint, "_write_text", full)
    with pytest.raises(DiskFullError):
        new_run(tmp_path / "run")
    assert names(tmp_path) == []


def test_a_checkpoint_reads_back_with_links_and_rights(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    path = save(run_dir, 500, is_best=True)
    assert path == run_dir / "checkpoints" / "step_000500"
    assert names(path) == ["model.safetensors", "state.json", "training_state.safetensors"]
    assert os.readlink(run_dir / "checkpoints" / "last") == "step_000500"
    assert os.readlink(run_dir / "checkpoints" / "best") == "step_000500"
    rights = stat.S_IMODE((path / "model.safetensors").stat().st_mode)
    assert rights == stat.S_IMODE((path / "state.json").stat().st_mode)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.model["weight"], torch.full((3, 2), 500.0))
    assert loaded.training["optimizer.weight:step"].item() == 500
    assert loaded.state == {"format_version": 1, "step": 500, "loss": 0.5}


def test_a_run_opens_at_best_or_last_and_a_checkpoint_by_its_own_folder(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    best, last = save(run_dir, 1, is_best=True), save(run_dir, 2)
    assert open_run(run_dir).checkpoint_dir == best
    assert open_run(run_dir, prefer="last").checkpoint_dir == last
    assert open_run(run_dir, prefer="last").step == 2
    for name, expected in (("step_000002", last), ("last", last), ("best", best)):
        run = open_run(run_dir / "checkpoints" / name)
        assert run.checkpoint_dir == expected
        assert run.model_path == expected / "model.safetensors"
        assert (run.run_dir, run.config) == (run_dir, CONFIG)


def test_a_copied_run_without_links_opens_at_its_newest_checkpoint(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    save(run_dir, 999_999, is_best=True)
    newest = save(run_dir, 1_000_000)
    for link in ("last", "best"):
        (run_dir / "checkpoints" / link).unlink()
    assert open_run(run_dir).checkpoint_dir == newest


def test_old_checkpoints_go_but_best_last_and_the_newest_others_stay(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    for step in range(1, 8):
        save(run_dir, step, is_best=step == 2, keep=2)
    expected = ["best", "last", "step_000002", "step_000005", "step_000006", "step_000007"]
    assert names(run_dir / "checkpoints") == expected
    save(run_dir, 8, keep=0)
    assert names(run_dir / "checkpoints") == ["best", "last", "step_000002", "step_000008"]


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    save(run_dir, 5)
    path = save(run_dir, 5, value=1)
    assert load_checkpoint(path).model["weight"][0, 0] == 6
    assert names(run_dir / "checkpoints") == ["last", "step_000005"]


def full_disk_by_system() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device")


def full_disk_by_safetensors() -> Exception:
    # What safetensors makes of the system's error.
    return SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("make_error", [full_disk_by_system, full_disk_by_safetensors])
@pytest.mark.parametrize("failing", ["model.safetensors", "training_state.safetensors"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_temporary(
    make_error: Callable[[], Exception],
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = new_run(tmp_path / "run")
    save(run_dir, 1, is_best=True)
    original = checkpoint.save_file

    def save_half(tensors: Any, path: Path, metadata: Any = None) -> None:
        if Path(path).name == failing:
            Path(path).write_bytes(b"half")
            raise make_error()
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_half)
    with pytest.raises(DiskFullError, match="disk is full"):
        save(run_dir, 2)
    assert names(run_dir / "checkpoints") == ["best", "last", "step_000001"]
    run = open_run(run_dir, prefer="last")
    assert run.checkpoint_dir is not None
    assert load_checkpoint(run.checkpoint_dir).model["weight"][0, 0] == 1


def test_another_failing_write_keeps_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = new_run(tmp_path / "run")

    def fail(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        save(run_dir, 1)
    assert not isinstance(caught.value, DiskFullError)
    assert names(run_dir / "checkpoints") == []


@pytest.mark.parametrize("survivors", range(6))
def test_a_kill_between_any_two_renames_leaves_a_run_that_opens(
    survivors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of a name is one moment; the process dies after `survivors` of them."""
    run_dir = new_run(tmp_path / "run")
    for step in (1, 2, 3):
        save(run_dir, step, is_best=True, keep=1)
    left = survivors

    class Killed(BaseException):
        pass

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **settings: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*arguments, **settings)

        return change

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "symlink_to"):
            patched.setattr(Path, name, count(getattr(Path, name)))
        patched.setattr(checkpoint, "_remove", lambda path: None)  # the dead tidy nothing
        with pytest.raises(Killed):
            save(run_dir, 4, is_best=True, keep=1)
    run = open_run(run_dir, prefer="last")
    assert run.checkpoint_dir is not None
    assert run.step in (3, 4)
    assert load_checkpoint(run.checkpoint_dir).model["weight"][0, 0] == run.step
    assert open_run(run_dir, prefer="best").step in (3, 4)
    remove_temporaries(run_dir)
    save(run_dir, 5, is_best=True, keep=1)
    assert not [name for name in names(run_dir / "checkpoints") if name.startswith(".")]
    assert open_run(run_dir).step == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").write_text("{"), "not JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "names no format_version"),
        (lambda run: (run / "config.json").write_text('{"format_version": 1}'), "missing"),
        (lambda run: (run / "config.json").write_text('{"format_version": 2}'), "version 2"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda run: (run / "robots.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    ],
)
def test_damaged_runs_are_refused(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    run_dir = new_run(tmp_path / "run")
    save(run_dir, 1)
    damage(run_dir)
    with pytest.raises(ModelFileError, match=message):
        open_run(run_dir)


def test_a_config_with_a_field_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    values = json.loads((run_dir / "config.json").read_text())
    values["model"]["telepathy"] = True
    (run_dir / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match="telepathy"):
        open_run(run_dir)


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="There is no model"):
        open_run(tmp_path / "missing")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ModelFileError, match="not a BitGen run"):
        open_run(tmp_path / "photos")
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(ModelFileError, match="not a BitGen run"):
        open_run(tmp_path / "file.txt")


@pytest.mark.parametrize("content", [b"", b"abc", None])
def test_truncated_weights_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = save(new_run(tmp_path / "run"), 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.raises(ModelFileError, match="truncated"):
        load_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(ModelFileError, match="missing"):
        read_tensors(path)


def test_weights_of_another_model_are_refused_by_name_and_shape() -> None:
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ModelFileError, match="missing bias; unknown other"):
        load_model_tensors(
            model, {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, Path("somewhere")
        )
    with pytest.raises(ModelFileError, match=r"weight is \[4, 2\], expected \[3, 2\]"):
        load_model_tensors(
            model, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3)}, Path("somewhere")
        )
    load_model_tensors(model, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, Path("x"))
    assert model(torch.ones(1, 2)).tolist() == [[3.0, 3.0, 3.0]]


def test_the_latest_run_is_the_one_that_saved_last(tmp_path: Path) -> None:
    first, second = new_run(tmp_path / "a"), new_run(tmp_path / "b")
    new_run(tmp_path / "without checkpoint")
    (tmp_path / "other").mkdir()
    for run_dir, moment in ((first, 2_000), (second, 1_000)):
        os.utime(save(run_dir, 1) / "state.json", (moment, moment))
    assert latest_run(tmp_path) == first
    os.utime(save(second, 2) / "state.json", (3_000, 3_000))
    assert latest_run(tmp_path) == second


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_without_a_trained_run_there_is_no_latest(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match="no trained run") as caught:
        latest_run(tmp_path / name)
    assert "bitgen train" in str(caught.value.remedy)


def test_the_settings_of_a_resumed_run_replace_the_recorded_ones(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    update_run_config(run_dir, CONFIG, TrainingConfig(num_epochs=9), {"train_images": 8})
    run = open_run(run_dir)
    assert (run.training.num_epochs, run.data) == (9, {"train_images": 8})
    assert names(run_dir) == ["checkpoints", "config.json", "robots.json", "tokenizer.json"]


def test_metrics_are_lines_of_json_without_nan(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    log.write({"kind": "train", "step": 1, "loss": float("nan"), "skipped": True})
    # In the file at once, not when it is closed.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    log.close()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "step": 1, "loss": None, "skipped": True}
    ]


def test_metrics_beyond_the_resumed_step_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, last_step=2)
    log.write({"step": 3, "again": True})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_metrics_on_a_full_disk_are_a_disk_full_error(tmp_path: Path) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None: ...

    log = MetricsLog(tmp_path, last_step=0)
    log.close()
    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        log.write({"step": 1})
