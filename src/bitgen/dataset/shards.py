"""What is made of files once, and read back from memory-mapped shards: pictures, features.

A cache is a folder of shards of about 64 MiB: `NAME` with a suffix of its kind (rows of one shape
and dtype) and `NAME.json` (what each row is made of). A shard's JSON is renamed into place last, so
a kill at any moment leaves whole shards only; shards are never changed, so several processes may
write and read at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from bitgen.errors import DatasetError, DiskFullError
from bitgen.files import DISK_FULL

_SHARD_BYTES = 64 * 2**20
_TEMPORARY_SUFFIX = ".tmp"
_ABANDONED_SECONDS = 24 * 3600
_LOCK_POLL_SECONDS = 0.25

ProgressCallback = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


class RowKey(NamedTuple):
    """What a row is made of."""

    path: str
    """Absolute."""
    size: int
    """Of the file, in bytes."""
    mtime_ns: int
    """When the file was changed last."""
    variant: str = ""
    """Which of several rows that are made of one file."""


class ShardCache:
    """Rows of one shape and dtype, each made once of a file. Subclasses say how.

    It may be pickled: workers open the files by themselves.
    """

    def __init__(
        self,
        directory: Path,
        row_shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        suffix: str,
        contents: str,
    ) -> None:
        """
        Args:
            directory: the cache's own; made when it is written.
            row_shape: of each row.
            dtype: of each row.
            suffix: of the files that hold rows.
            contents: what rows are, in words, for errors.
        """
        self.directory = directory
        self.row_shape, self.dtype = row_shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(row_shape)) * self.dtype.itemsize
        self._suffix, self._contents = suffix, contents
        self._rows_per_shard = max(16, _SHARD_BYTES // self.row_bytes)
        self._shards: dict[str, int] = {}  # name -> number of rows
        self._known: dict[RowKey, tuple[str, int]] = {}  # what it is made of -> shard, row
        self._rows: dict[tuple[str, str], tuple[str, int]] = {}  # prepared here: path, variant
        self._maps: dict[str, np.ndarray] = {}

    def _make_rows(
        self, chunk: Sequence[RowKey], num_workers: int
    ) -> Generator[np.ndarray | str, None, None]:
        """Each row of the chunk, in its order, or why there is none."""
        raise NotImplementedError

    def _prepare(
        self,
        wanted: Mapping[Path, Sequence[str]],
        on_progress: ProgressCallback | None,
        num_workers: int,
    ) -> dict[Path, str]:
        """Make the rows that are not there yet: of each file its variants.

        Returns the files that cannot be used, and why. Raises DiskFullError, also before anything
        is made where room for it is missing, or DatasetError; either leaves a valid cache.
        """
        total = sum(len(variants) for variants in wanted.values())
        report = on_progress or (lambda done, total: None)
        bad: dict[Path, str] = {}
        keys: dict[RowKey, Path] = {}
        for path, variants in wanted.items():
            try:
                status = os.stat(path)
            except OSError as error:
                bad[path] = f"{path}: {reason_of(error)}."
                continue
            file = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
            keys.update({RowKey(*file, variant): path for variant in variants})
        with self._clear_write_errors():
            self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        with self._lock(keys, report, total):
            missing = self._missing(keys)
            self._check_room(len(missing))
            done = total - len(missing)
            report(done, total)
            for start in range(0, len(missing), self._rows_per_shard):
                chunk = missing[start : start + self._rows_per_shard]
                self._write_shard(chunk, keys, bad, done + start, total, report, num_workers)
        for key, path in keys.items():
            if key in self._known:
                self._rows[os.path.abspath(path), key.variant] = self._known[key]
        return bad

    def __contains__(self, path: Path) -> bool:
        return (os.path.abspath(path), "") in self._rows

    def _row(self, path: Path, variant: str = "") -> np.ndarray:
        """A copy of a row. Raises KeyError if it was not prepared."""
        row = self._rows.get((os.path.abspath(path), variant))
        if row is None:
            raise KeyError(f"{path} was not prepared, or cannot be decoded.")
        shard, index = row
        if shard not in self._maps:
            shape = (self._shards[shard], *self.row_shape)
            file = self.directory / f"{shard}{self._suffix}"
            self._maps[shard] = np.memmap(file, dtype=self.dtype, mode="r", shape=shape)
        return np.array(self._maps[shard][index])

    def __getstate__(self) -> dict[str, Any]:
        # What only preparing needs stays behind, and memory maps cannot travel.
        return {**self.__dict__, "_maps": {}, "_known": {}}

    def _missing(self, keys: Mapping[RowKey, Path]) -> list[RowKey]:
        self._read_index()
        return [key for key in keys if key not in self._known]

    def _check_room(self, num_rows: int) -> None:
        needed = num_rows * self.row_bytes
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.directory).free
            if needed > free:
                raise DiskFullError(
                    f"The cache of {self._contents} in {self.directory} needs"
                    f" {needed / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free.",
                    remedy=self._room_remedy(),
                )

    def _room_remedy(self) -> str:
        return "Free some space, or set BITGEN_CACHE to a folder on another disk."

    def _read_index(self) -> None:
        """Learn the shards that were added since, by this process or another."""
        for file in self.directory.glob("*.json"):
            shard = file.stem
            if shard in self._shards:
                continue
            try:
                entries = json.loads(file.read_bytes())["files"]
                keys = [
                    RowKey(str(path), int(size), int(mtime), *map(str, variant))
                    for path, size, mtime, *variant in entries
                ]
                length = (self.directory / f"{shard}{self._suffix}").stat().st_size
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not ours, or removed meanwhile: what it held is made again
            if length != len(keys) * self.row_bytes:
                continue
            self._shards[shard] = len(keys)
            self._known.update({key: (shard, row) for row, key in enumerate(keys)})

    def _write_shard(
        self,
        chunk: Sequence[RowKey],
        keys: Mapping[RowKey, Path],
        bad: dict[Path, str],
        done: int,
        total: int,
        report: ProgressCallback,
        num_workers: int,
    ) -> None:
        rows = np.empty((len(chunk), *self.row_shape), dtype=self.dtype)
        good: list[RowKey] = []
        with contextlib.closing(self._make_rows(chunk, num_workers)) as made:
            for key, row in zip(chunk, made, strict=True):
                if isinstance(row, str):
                    bad[keys[key]] = row
                else:
                    rows[len(good)] = row
                    good.append(key)
                done += 1
                report(done, total)
        if not good:
            return
        entries = json.dumps([key if key.variant else key[:3] for key in good])
        # Named by its content: two processes that write the same shard write the same file.
        name = hashlib.blake2b(entries.encode(), digest_size=12).hexdigest()
        content = rows[: len(good)].reshape(-1).view(np.uint8).data
        with self._clear_write_errors():
            # By write(), not through a memory map: on a full disk that would kill the process.
            _write_atomically(self.directory / f"{name}{self._suffix}", content)
            _write_atomically(self.directory / f"{name}.json", f'{{"files": {entries}}}'.encode())
        self._read_index()

    def _remove_abandoned(self) -> None:
        """Remove what a killed process left half-written, a day ago or longer."""
        for file in self.directory.glob(f"*{_TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                    file.unlink()

    @contextlib.contextmanager
    def _lock(
        self, keys: Mapping[RowKey, Path], report: ProgressCallback, total: int
    ) -> Iterator[None]:
        """Keep two processes from making the same rows twice.

        Only saves work: the shards are safe without it, where the system has no such locks.
        """
        with self._clear_write_errors():
            file = (self.directory / "lock").open("ab")
        with file:
            while not _try_lock(file):
                missing = self._missing(keys)
                report(total - len(missing), total)
                if not missing:
                    break
                time.sleep(_LOCK_POLL_SECONDS)
            yield  # closing the file, or the end of the process, releases it

    @contextlib.contextmanager
    def _clear_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in DISK_FULL:
                raise DiskFullError(
                    f"No room is left for the cache of {self._contents} in {self.directory}.",
                    remedy=self._room_remedy(),
                ) from error
            raise DatasetError(
                f"The cache of {self._contents} cannot be written in {self.directory}"
                f" ({reason_of(error)}).",
                remedy="Set BITGEN_CACHE to a folder that can be written.",
            ) from error


def reason_of(error: Exception) -> str:
    """Why something failed, in the words of the system, without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.rstrip(".") or type(error).__name__


def _try_lock(file: BinaryIO) -> bool:
    """Take an exclusive lock if it is free. True also where the system has none to give."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _write_atomically(path: Path, content: bytes | memoryview) -> None:
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f"{path.name}.", suffix=_TEMPORARY_SUFFIX
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
