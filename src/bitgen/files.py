"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitgen.errors import DiskFullError, InputError

DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Numbers of the errors of a disk, or a share of it, that is full."""


@contextlib.contextmanager
def write_whole(output: Path, what: str) -> Iterator[BinaryIO]:
    """A file to write into, which becomes `output` when the block ends without an error.

    Folders are made, and a file there is replaced.

    Args:
        output: the file.
        what: its name in messages, such as "picture sheet".

    Raises:
        DiskFullError: the disk is full.
        InputError: it cannot be written for other reasons.
    """
    temporary: Path | None = None
    try:
        folder = output.absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=folder)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
        temporary.chmod(0o644)
        os.replace(temporary, output)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"The disk is full: the {what} could not be written to {output}.",
                remedy="Make room, or choose another folder.",
            ) from error
        raise InputError(f"The {what} cannot be written to {output}: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
