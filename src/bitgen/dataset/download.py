"""Fetch COCO's official archives over HTTP and unpack them.

Everything in progress lies in `OUTPUT/.download/`: `NAME.part` while it arrives, `NAME` when it is
whole, `NAME.done` once it is unpacked. So a download that is cut off or killed continues.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from bitgen.dataset.coco import YEARS, is_inside
from bitgen.errors import DiskFullError, DownloadError, InputError
from bitgen.files import DISK_FULL

COCO_URL = "http://images.cocodataset.org"

DownloadCallback = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all (0: not known) and what is being done."""

_STATE_FOLDER = ".download"
_CHUNK_BYTES = 256 * 1024
_TIMEOUT_SECONDS = 30.0
_RETRIES = 5
_RETRY_SECONDS = 2.0
_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))


class _ConnectionBrokenError(Exception):
    """The server, or the line to it, failed in the middle of an answer."""


def download_coco(
    output: Path,
    year: int = 2017,
    base_url: str = COCO_URL,
    splits: Sequence[str] = ("train", "val"),
    on_progress: DownloadCallback | None = None,
    *,
    keep_archives: bool = False,
    retry_seconds: float = _RETRY_SECONDS,
) -> None:
    """Fetch annotations and images of COCO and unpack them in the layout that training reads.

    What is there already is not fetched again, and what arrived in part is continued. Archives
    are removed once they are unpacked, unless `keep_archives`. `retry_seconds` is the pause after
    the first failure of a connection; it doubles with each further one.

    Raises InputError for a year, split or URL that cannot be, DownloadError if the server does not
    deliver or an archive is damaged or unsafe, DiskFullError if there is no room.
    """
    if year not in YEARS:
        raise InputError(
            f"COCO {year} cannot be downloaded.",
            remedy=f"Years with captions: {', '.join(map(str, sorted(YEARS)))}.",
        )
    unknown = [split for split in splits if split not in ("train", "val")]
    if unknown or not splits:
        raise InputError(f"splits must be train, val or both; got {', '.join(unknown) or 'none'}.")
    if not base_url.startswith(("http://", "https://")):
        raise InputError(f"The URL must begin with http:// or https://; got {base_url!r}.")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; a folder is needed to download into.")
    paths = [f"annotations/annotations_trainval{year}.zip"]
    paths += [f"zips/{split}{year}.zip" for split in splits]
    report = on_progress or (lambda done, total, what: None)
    state = output / _STATE_FOLDER
    with _clear_write_errors(output):
        state.mkdir(parents=True, exist_ok=True)
    for path in paths:
        archive = state / PurePosixPath(path).name
        marker = archive.with_name(f"{archive.name}.done")
        if not _is_unpacked(output, marker):
            if not archive.exists():
                _fetch(f"{base_url.rstrip('/')}/{path}", archive, report, retry_seconds)
            folders = _unpack(archive, output, report)
            with _clear_write_errors(output):
                marker.write_text(json.dumps({"folders": folders}))
        if not keep_archives:
            archive.unlink(missing_ok=True)


def _is_unpacked(output: Path, marker: Path) -> bool:
    """Whether all files of an archive were written, and are still there."""
    try:
        folders: dict[str, int] = json.loads(marker.read_bytes())["folders"]
        return all(len(os.listdir(output / name)) >= count for name, count in folders.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fetch(url: str, target: Path, report: DownloadCallback, retry_seconds: float) -> None:
    """Download to `target`, continuing `target.part`. Raises DownloadError."""
    part = target.with_name(f"{target.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            if _receive(url, part, report):
                os.replace(part, target)
                _version_file(part).unlink(missing_ok=True)
                return
            reason = f"the connection ended after {_size(part):,} bytes"
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            error.close()
            if error.code not in _TRANSIENT_STATUS:
                raise DownloadError(
                    f"{url} cannot be fetched: {reason}.",
                    remedy="Is this the URL of a server with COCO's files?",
                ) from error
        except (OSError, http.client.HTTPException, _ConnectionBrokenError) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        # A poor line that delivers something each time is not a failure.
        failures = 1 if _size(part) > before else failures + 1
        if failures > _RETRIES:
            raise DownloadError(
                f"{url} did not arrive: {reason}.",
                remedy="Run the command again: it continues where it stopped.",
            )
        time.sleep(retry_seconds * 2 ** (failures - 1))


def _receive(url: str, part: Path, report: DownloadCallback) -> bool:
    """Ask for what is missing and append it. Returns whether the file is whole.

    Raises HTTPError, another OSError or _ConnectionBrokenError where the connection fails.
    """
    start = _size(part)
    headers = {"User-Agent": "bitgen", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        version = _read_version(part)
        if version:  # the server then sends the whole file if it is not the same any more
            headers["If-Range"] = version
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing lies beyond what we hold: it is whole, or it is of another file.
        total = _content_range(error.headers)[1]
        error.close()
        if total == start:
            return True
        part.unlink()
        return False
    with response:
        if response.status == 206:
            first, total = _content_range(response.headers)
            if first != start:
                part.unlink()
                return False
        else:  # all of it, asked for or because the server cannot continue
            start, total = 0, None
        length = response.headers.get("Content-Length", "")
        if total is None and length.isdigit():
            total = start + int(length)
        _check_room(part.parent, (total or 0) - start)
        done = start
        with _clear_write_errors(part.parent):
            _version_file(part).write_text(_strong_version(response.headers))
            with part.open("ab" if start else "wb") as file:
                while chunk := _read(response):
                    file.write(chunk)
                    done += len(chunk)
                    report(done, total or 0, part.stem)
                file.flush()
                os.fsync(file.fileno())
    if total is not None and done > total:
        part.unlink()
        return False
    return total is None or done == total


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:  # not to be taken for the disk's
        raise _ConnectionBrokenError(str(error) or type(error).__name__) from error


def _unpack(archive: Path, output: Path, report: DownloadCallback) -> dict[str, int]:
    """Unpack a whole archive. Returns the number of files in each folder. Raises DownloadError."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _refuse_unsafe(opened.infolist(), archive.name)
            total = sum(member.file_size for member in members)
            missing = [m for m in members if _size(output / m.filename) != m.file_size]
            done = total - sum(member.file_size for member in missing)
            _check_room(output, total - done)
            what = f"unpacking {archive.name}"
            for member in missing:
                done += _unpack_member(opened, member, output / member.filename)
                report(done, total, what)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        archive.unlink(missing_ok=True)
        raise DownloadError(
            f"{archive.name} is damaged, or not a zip archive ({error}).",
            remedy="It was removed. Run the command again: it is fetched anew.",
        ) from error
    return dict(Counter(str(PurePosixPath(member.filename).parent) for member in members))


def _refuse_unsafe(members: Sequence[zipfile.ZipInfo], archive: str) -> None:
    """Raise DownloadError, before anything is written, for what no archive of COCO holds."""
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if not is_inside(member.filename):
            reason = "would be written outside of the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            reason = "is a link or a device"
        elif member.flag_bits & 1:
            reason = "is encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "is compressed in an unusual way"
        else:
            continue
        raise DownloadError(
            f"{archive} is not safe to unpack: {member.filename!r} {reason}. Nothing was unpacked.",
            remedy="Fetch it from another server.",
        )


def _unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> int:
    temporary = target.with_name(f"{target.name}.part")
    try:
        with archive.open(member) as source, _clear_write_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return member.file_size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _version_file(part: Path) -> Path:
    """Holds the server's name (ETag) for the version of the file that arrived in part."""
    return part.with_name(f"{part.name}.version")


def _read_version(part: Path) -> str:
    try:
        return _version_file(part).read_text()
    except OSError:
        return ""


def _strong_version(headers: Any) -> str:
    version = str(headers.get("ETag", ""))
    return "" if version.startswith("W/") else version


def _content_range(headers: Any) -> tuple[int | None, int | None]:
    """First byte and total of a Content-Range header, None where it does not say."""
    match = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", str(headers.get("Content-Range", "")).strip()
    )
    if match is None:
        return None, None
    first, total = match.groups()
    return (int(first) if first else None), (int(total) if total != "*" else None)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{needed / 1e9:.1f} GB are needed in {folder}, and {free / 1e9:.1f} GB are free.",
            remedy="Free some space, or choose a folder on another disk.",
        )


@contextlib.contextmanager
def _clear_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"No room is left in {folder}.",
                remedy="Free some space and run the command again: it continues.",
            ) from error
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}).",
            remedy="Choose another folder.",
        ) from error
