"""The run folder: what one training writes, and how it is read again.

    runs/NAME/
      config.json tokenizer.json robots.json metrics.jsonl
      checkpoints/step_000500/{model.safetensors, training_state.safetensors, state.json}
      checkpoints/last -> step_000500     checkpoints/best -> step_000300

Everything is written to a temporary sibling, flushed to the disk and renamed, so that a kill at
any moment leaves either the old or the new file. Tensors are safetensors and the rest is JSON:
reading a run from a stranger runs no code.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.errors import (
    BitGenError,
    ConfigError,
    DiskFullError,
    ModelFileError,
    OutputExistsError,
)
from bitgen.files import DISK_FULL

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
ROBOTS_FILE = "robots.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"
TRAINING_STATE_FILE = "training_state.safetensors"
STATE_FILE = "state.json"

_STEP_PREFIX = "step_"
_TEMPORARY = ".tmp-"
# How runs were trained that were written before there was this setting.
_BEFORE = {"schedule": "cosine", "task_word_dropout": 0.0, "robot_phrase_dropout": 0.0}


@dataclass(frozen=True)
class RunFiles:
    """What a run holds, with the checkpoint that was chosen."""

    run_dir: Path
    config: BitGenConfig
    training: TrainingConfig
    data: dict[str, Any]  # what it was trained on, as `create_run` was told
    tokenizer_json: str
    robots_json: str  # the robot catalog, as `robots.json` holds it
    checkpoint_dir: Path | None  # None: killed before the first checkpoint

    @property
    def model_path(self) -> Path:
        """The chosen checkpoint's weights. Raises ModelFileError where there is none yet."""
        return self._checkpoint() / MODEL_FILE

    @property
    def state(self) -> dict[str, Any]:
        """`state.json` of the chosen checkpoint: step, epoch, losses, and what resuming needs."""
        return _read_versioned_json(self._checkpoint() / STATE_FILE)

    @property
    def step(self) -> int:
        """Updates after which the chosen checkpoint was written."""
        return int(self.state["step"])

    def _checkpoint(self) -> Path:
        if self.checkpoint_dir is None:
            raise ModelFileError(
                f"The run {self.run_dir} holds no checkpoint yet.",
                remedy="Continue its training with --resume.",
            )
        return self.checkpoint_dir


@dataclass(frozen=True)
class Checkpoint:
    """Everything that one checkpoint holds, read into memory (CPU)."""

    path: Path
    model: dict[str, torch.Tensor]
    training: dict[str, torch.Tensor]
    state: dict[str, Any]


# Writing ----------------------------------------------------------------------------------------


def create_run(
    run_dir: Path,
    *,
    config: BitGenConfig,
    training: TrainingConfig,
    data: Mapping[str, Any],
    tokenizer_json: str,
    robots_json: str,
) -> Path:
    """Make a new run folder, whole or not at all.

    Raises OutputExistsError where something (other than an empty folder) is there already.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise OutputExistsError(
            f"{run_dir} exists already.",
            remedy="Continue it with --resume, or choose another --output_dir.",
        )
    with name_full_disk(run_dir):
        run_dir.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(run_dir)
    with _temporary_folder(run_dir) as folder:
        (folder / CHECKPOINTS_FOLDER).mkdir()
        _write_text(folder / CONFIG_FILE, _config_json(config, training, data))
        _write_text(folder / TOKENIZER_FILE, tokenizer_json)
        _write_text(folder / ROBOTS_FILE, robots_json)
    return run_dir


def update_run_config(
    run_dir: Path, config: BitGenConfig, training: TrainingConfig, data: Mapping[str, Any]
) -> None:
    """Record the settings with which a resumed run goes on."""
    _replace_text(Path(run_dir) / CONFIG_FILE, _config_json(config, training, data))


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: Mapping[str, torch.Tensor],
    training: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    is_best: bool,
    keep: int,
) -> Path:
    """Write `checkpoints/step_NNNNNN`, point `last` (and `best`) at it, remove old ones.

    `keep` older checkpoints stay besides last and best. Raises DiskFullError where no room is
    left; the checkpoints that were there before are then untouched and no temporary stays.
    """
    folder = Path(run_dir) / CHECKPOINTS_FOLDER
    target = folder / f"{_STEP_PREFIX}{step:06d}"
    with _temporary_folder(target) as temporary:
        write_tensors(temporary / MODEL_FILE, model)
        write_tensors(temporary / TRAINING_STATE_FILE, training)
        _write_text(
            temporary / STATE_FILE,
            json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}, indent=2) + "\n",
        )
    if is_best:
        _point(folder / "best", target.name)
    _point(folder / "last", target.name)
    _prune(folder, keep)
    return target


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, flushed to the disk. Raises DiskFullError; does not replace safely
    by itself: give a temporary path and rename it."""
    with name_full_disk(path):
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path
        )
        # Newer safetensors writes through a private temporary file: give it the usual rights.
        path.chmod(0o666 & ~_umask())
        _flush(path)


def remove_temporaries(run_dir: Path) -> None:
    """Remove what a killed process left half-written in this run."""
    for folder in (Path(run_dir), Path(run_dir) / CHECKPOINTS_FOLDER):
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name.startswith(".") and _TEMPORARY in path.name:
                    _remove(path)


def _remove_abandoned(run_dir: Path) -> None:
    """Remove what processes that are gone left beside this run when they were making it."""
    for path in run_dir.parent.glob(f".{glob.escape(run_dir.name)}{_TEMPORARY}*"):
        process = path.name.rpartition("-")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            _remove(path)


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there, asking with signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


class MetricsLog:
    """`metrics.jsonl` of a run: one JSON object a line, each in the file once it is written."""

    def __init__(self, run_dir: Path, last_step: int) -> None:
        """Open for appending; lines beyond `last_step`, or cut off by a kill, are dropped."""
        self.path = Path(run_dir) / METRICS_FILE
        kept = [line for line in self._lines() if _step_of(line) <= last_step]
        _replace_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Add one line; numbers that are not finite become null. Raises DiskFullError."""
        line = json.dumps({key: _finite_or_none(value) for key, value in values.items()})
        with name_full_disk(self.path):
            self._file.write(f"{line}\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is buffered by then."""
        self._file.close()

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _config_json(config: BitGenConfig, training: TrainingConfig, data: Mapping[str, Any]) -> str:
    values = {
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "training": training.to_dict(),
        "data": dict(data),
    }
    return json.dumps(values, indent=2) + "\n"


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" of the system, also as safetensors reports it, into DiskFullError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors keeps the system's error only as text.
        full = (
            error.errno in DISK_FULL
            if isinstance(error, OSError)
            else any(f"(os error {code})" in str(error) for code in DISK_FULL)
        )
        if not full:
            raise
        raise DiskFullError(
            f"The disk is full: {path} could not be written. What was there before is intact.",
            remedy="Free some space, or give another --output_dir.",
        ) from error


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends without an error."""
    temporary = _temporary_name(target)
    try:
        with name_full_disk(target):
            _remove(temporary)
            temporary.mkdir()
            yield temporary
            _flush(temporary)
            if target.is_dir() and any(target.iterdir()):
                # A folder that is not empty cannot be replaced in one move.
                displaced = _temporary_name(target.with_name(target.name + "-old"))
                _remove(displaced)
                target.rename(displaced)
                temporary.rename(target)
                _remove(displaced)
            else:
                temporary.rename(target)
            _flush(target.parent)
    except BaseException:
        _remove(temporary)
        raise


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}{_TEMPORARY}{os.getpid()}")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _replace_text(path: Path, text: str) -> None:
    temporary = _temporary_name(path)
    try:
        with name_full_disk(path):
            _write_text(temporary, text)
            temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def _flush(path: Path) -> None:
    """Make the file, or the folder's list of names, survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _point(link: Path, target_name: str) -> None:
    """Make `link` a relative symbolic link to its sibling, replacing an older one at once."""
    temporary = _temporary_name(link)
    _remove(temporary)
    with name_full_disk(link):
        temporary.symlink_to(target_name, target_is_directory=True)
        temporary.replace(link)


def _prune(folder: Path, keep: int) -> None:
    pointed = {(folder / name).resolve().name for name in ("last", "best")}
    others = [path for path in _step_folders(folder) if path.name not in pointed]
    for path in others[: len(others) - keep] if keep else others:
        # Renamed first: a kill while files are removed leaves no half checkpoint behind.
        doomed = _temporary_name(path)
        path.rename(doomed)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


# Reading ----------------------------------------------------------------------------------------


def open_run(path: Path | str, prefer: str = "best") -> RunFiles:
    """Read a run by its folder, or by one of its checkpoints' folders.

    For a run's folder the checkpoint is `prefer` ("best" or "last"), else the other, else the
    newest; `checkpoint_dir` is None where nothing was saved yet. Raises ModelFileError where the
    path is missing, not a run, damaged, or of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(
            f"There is no model at {path}.", remedy="Give a run's folder or an exported file."
        )
    checkpoint: Path | None
    if (path / CONFIG_FILE).is_file():
        run_dir, checkpoint = path, _choose_checkpoint(path / CHECKPOINTS_FOLDER, prefer)
    elif _is_checkpoint(path):
        checkpoint = path.resolve()
        run_dir = checkpoint.parent.parent
    else:
        raise ModelFileError(
            f"{path} is not a BitGen run: it holds no {CONFIG_FILE}.",
            remedy="Give the folder that `bitgen train` wrote.",
        )
    values = _read_versioned_json(run_dir / CONFIG_FILE)
    try:
        config = BitGenConfig.from_dict(values["model"])
        training = TrainingConfig.from_dict({**_BEFORE, **values["training"]})
        data = dict(values["data"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else _reason(error)
        raise ModelFileError(f"{run_dir / CONFIG_FILE} is not a run's: {reason}.") from error
    return RunFiles(
        run_dir=run_dir,
        config=config,
        training=training,
        data=data,
        tokenizer_json=_read_text(run_dir / TOKENIZER_FILE),
        robots_json=_read_text(run_dir / ROBOTS_FILE),
        checkpoint_dir=checkpoint,
    )


def load_checkpoint(checkpoint_dir: Path) -> Checkpoint:
    """Read a checkpoint whole. Raises ModelFileError where it is missing, damaged or newer."""
    checkpoint_dir = Path(checkpoint_dir)
    return Checkpoint(
        path=checkpoint_dir,
        state=_read_versioned_json(checkpoint_dir / STATE_FILE),
        model=read_tensors(checkpoint_dir / MODEL_FILE),
        training=read_tensors(checkpoint_dir / TRAINING_STATE_FILE),
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file by name, on the CPU. Raises ModelFileError."""
    try:
        return _as_shaped_today(load_file(path))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing.") from error
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"{path} is truncated or not a safetensors file ({error}).",
            remedy="Take another checkpoint of the run, or copy the file again.",
        ) from error


def _as_shaped_today(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Earlier files hold the robots' shared bias as a scalar; it is a vector of one."""
    return {
        name: value.reshape(1)
        if "robot_selector.shared_bias" in name and not name.endswith(":step")
        else value
        for name, value in tensors.items()
    }


def load_model_tensors(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: Path
) -> None:
    """Load weights into the model. Raises ModelFileError where names or shapes differ."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unknown {name}" for name in unknown] + misshapen
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelFileError(
            f"{source} does not fit the model: {'; '.join(problems[:3])}{more}.",
            remedy="Its config.json and its weights come from different models.",
        )
    model.load_state_dict(dict(tensors))


def latest_run(runs_dir: Path | str) -> Path:
    """The run under `runs_dir` that saved a checkpoint last. Raises ModelFileError if none."""
    found = find_latest_run(runs_dir)
    if found is None:
        raise ModelFileError(
            f"There is no trained run in {runs_dir}.",
            remedy="Train one with `bitgen train`, or name a model with --model.",
        )
    return found


def find_latest_run(runs_dir: Path | str) -> Path | None:
    """The run under `runs_dir` that saved a checkpoint last; None if no run did."""
    runs_dir = Path(runs_dir)
    found: list[tuple[int, Path]] = []
    for run_dir in sorted(runs_dir.iterdir()) if runs_dir.is_dir() else []:
        if run_dir.name.startswith(".") or not (run_dir / CONFIG_FILE).is_file():
            continue
        checkpoint = _choose_checkpoint(run_dir / CHECKPOINTS_FOLDER, "last")
        if checkpoint is not None:
            found.append(((checkpoint / STATE_FILE).stat().st_mtime_ns, run_dir))
    return max(found)[1] if found else None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() and (folder / MODEL_FILE).is_file()


def _step_folders(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found: list[tuple[int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else []:
        number = path.name[len(_STEP_PREFIX) :]
        if path.name.startswith(_STEP_PREFIX) and number.isdigit() and _is_checkpoint(path):
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def _choose_checkpoint(folder: Path, prefer: str) -> Path | None:
    # A copy of a run can lack the links or hold folders in their place: both are read.
    for name in (prefer, "last", "best"):
        if _is_checkpoint(folder / name):
            return (folder / name).resolve()
    steps = _step_folders(folder)
    return steps[-1] if steps else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}).") from error


def _read_versioned_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except ValueError as error:
        raise ModelFileError(f"{path} is not JSON: it is truncated or foreign.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ModelFileError(f"{path} is not BitGen's: it names no format_version.")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this BitGen reads up to {FORMAT_VERSION}.",
            remedy="Upgrade BitGen.",
        )
    return dict(values)


def _reason(error: Exception) -> str:
    return (error.message if isinstance(error, BitGenError) else str(error)).rstrip(".")
