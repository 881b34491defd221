"""Pictures that arrive in a folder, found by looking at it again and again. No torch.

Looking works on every file system, also where changes are made by another computer (NFS, SMB), of
which notifications by the kernel say nothing; and it is needed in any case to see that a file is no
longer written to.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitgen.dataset.images import IMAGE_SUFFIXES
from bitgen.errors import InputError

POLL_SECONDS = 0.25
"""Between two looks."""
SETTLE_SECONDS = 0.5
"""A file that has not changed for so long is taken to be whole."""
RETRY_SECONDS = 3.0
"""What cannot be read is read again after so long without a change: a slow writer may have paused,
and NFS shows the size of a file up to three seconds late."""
_LONGEST_WAIT = 2.0
_LOOKING_SHARE = 0.1


class _Version(NamedTuple):
    """What changes when a file is written to or replaced."""

    nbytes: int
    modified_ns: int


@dataclass
class _File:
    version: _Version
    since: float
    """When this version was seen first, on the clock of the watch."""
    wait: float = SETTLE_SECONDS
    taken: bool = False
    retried: bool = False


class FolderWatch:
    """The pictures of one folder, each given out once as soon as it is whole.

    A picture is known by its ending; hidden files (those of rsync, for instance, while they are
    copied) and subfolders are left out. A file that is written again or replaced counts as a new
    picture, so a camera may write to the same name each time.

    Attributes:
        num_existing: pictures that were there at the start.
        error: why the folder could not be read at the last look; None where it could.
    """

    def __init__(
        self,
        folder: Path | str,
        include_existing: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look once: what is there now is old, and left out unless `include_existing`.

        Raises:
            InputError: no folder, or one that cannot be read.
        """
        self.folder = Path(folder)
        self.error: OSError | None = None
        self._clock = clock
        self._files: dict[str, _File] = {}
        self._seconds = 0.0
        if not self.folder.is_dir():
            raise InputError(
                f"There is no folder {folder} to watch.",
                remedy="Make it first, or check the path.",
            )
        self._look()
        if self.error is not None:
            raise InputError(f"The folder {folder} cannot be read: {self.error.strerror}.")
        self.num_existing = len(self._files)
        if not include_existing:
            for file in self._files.values():
                file.taken = True

    def ready(self) -> list[Path]:
        """Look, and give out the pictures that are whole and were not given out, oldest first."""
        self._look()
        if self.error is not None:
            return []
        now = self._clock()
        whole = [
            (file.version.modified_ns, name)
            for name, file in self._files.items()
            if not file.taken and file.version.nbytes and now - file.since >= file.wait
        ]
        for _, name in whole:
            self._files[name].taken = True
        return [self.folder / name for _, name in sorted(whole)]

    def try_again(self, picture: Path) -> bool:
        """Give out once more what could not be read, unless it changes or goes before.

        Returns:
            False where it has been tried again already.
        """
        file = self._files.get(picture.name)
        if file is None or not file.taken:
            return True  # changed or gone since: no loss
        if file.retried:
            return False
        file.retried, file.taken = True, False
        file.since, file.wait = self._clock(), RETRY_SECONDS
        return True

    @property
    def wait_seconds(self) -> float:
        """How long to wait until the next look, longer for folders that take long to look at."""
        return min(max(POLL_SECONDS, self._seconds / _LOOKING_SHARE), _LONGEST_WAIT)

    def _look(self) -> None:
        """Bring what is known of the files up to date. What is known outlives an error."""
        started = time.perf_counter()
        found: dict[str, _File] = {}
        now = self._clock()
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    version = _version(entry)
                    if version is None:
                        continue
                    known = self._files.get(entry.name)
                    is_same = known is not None and known.version == version
                    found[entry.name] = known if known and is_same else _File(version, now)
        except OSError as error:
            self.error = error
            return
        self.error = None
        self._files = found
        self._seconds = time.perf_counter() - started


def _version(entry: os.DirEntry[str]) -> _Version | None:
    """None for what is no picture, or has just gone."""
    if entry.name.startswith(".") or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
        return None
    try:
        # Not that of the entry, which Windows takes from the folder, where it may be old.
        status = os.stat(entry.path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return _Version(status.st_size, status.st_mtime_ns)
