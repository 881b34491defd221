"""Pictures: decoded once, resized keeping their aspect, cached in memory-mapped files.

Shapes: B batch, 3 channels (red, green, blue), H = W = S the side of the square picture in pixels.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from bitgen.config import IMAGE_RESIZES
from bitgen.errors import DatasetError, DiskFullError, ImageError

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 100_000_000
"""A picture with more pixels is refused by its header, before it is decoded."""

MIN_SIDE = 2
"""Shortest side, in pixels, of a picture that shows anything."""

PAD_COLOUR = (124, 116, 104)
"""Colour of the bars that "pad" adds: ImageNet's mean, which normalises to about zero."""

# Only formats that are plain rasters: some of Pillow's others start programs (EPS) or fetch fonts.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
"""Endings, in lower case, of the files that are taken for pictures in a folder."""

_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_CACHE_VERSION = 1
_SHARD_BYTES = 64 * 2**20
_TEMPORARY_SUFFIX = ".tmp"
_ABANDONED_SECONDS = 24 * 3600
_LOCK_POLL_SECONDS = 0.25

_FileKey = tuple[str, int, int]
"""Absolute path, bytes, modification time in nanoseconds."""

ProgressCallback = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


def load_image(path: Path | str, image_size: int, resize: str) -> np.ndarray:
    """Decode a file and make it a square picture of `image_size` pixels.

    JPEG, PNG, WebP, BMP, GIF (first frame), TIFF, PPM; grey, CMYK, palette, alpha (over white) and
    16-bit; the EXIF orientation is applied. `resize` "crop" brings the short side to `image_size`
    and cuts the middle out; "pad" brings the long side to it and adds bars of `PAD_COLOUR`.

    Returns uint8 [3, S, S]. Raises ImageError if the file is missing, empty, truncated, not a
    picture, less than 2 pixels wide or high, or of more than `MAX_PIXELS` pixels (judged by the
    header, before anything is decoded).
    """
    with _quiet_pillow(), _open_image(Path(path)) as image:
        try:
            # Lets the JPEG decoder shrink by 2, 4 or 8 while it decodes: several times faster.
            image.draft(None, _draft_size(image.size, image_size, resize))
            return prepare_image(image, image_size, resize)
        except ImageError as error:
            raise ImageError(f"{path}: {error.message}") from error


def prepare_image(image: Image.Image, image_size: int, resize: str) -> np.ndarray:
    """Make an open picture a square of `image_size` pixels; see `load_image`.

    Returns uint8 [3, S, S]; the given picture is not changed. Raises ImageError.
    """
    if resize not in IMAGE_RESIZES:
        raise ValueError(f"resize must be one of {', '.join(IMAGE_RESIZES)}; got {resize!r}.")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
    _check_size(image.size)
    try:
        with _quiet_pillow():
            small = _resize(_to_resizable(image), image_size, resize)
            small = _over_white(small).convert("RGB")
            # Turned when it is small, which costs less; the resize above is symmetric.
            transpose = _EXIF_TRANSPOSES.get(_orientation(image))
            if transpose is not None:
                small = small.transpose(transpose)
            if small.size != (image_size, image_size):
                small = _pad(small, image_size)
    except Exception as error:  # Pillow raises nearly any type on damaged data
        raise ImageError(f"the picture cannot be decoded ({_reason(error)}).") from error
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def normalize_images(
    images_B3HW: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Bring pixels from 0..255 to `(pixel / 255 - mean) / std`, per channel.

    Takes uint8 [B, 3, H, W], returns float32 of the same shape on the same device.
    """
    import torch  # here, so that checking and downloading data starts without it

    device = images_B3HW.device
    mean_311 = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
    std_311 = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)
    return images_B3HW.to(torch.float32).div_(255).sub_(mean_311).div_(std_311)


def default_cache_dir() -> Path:
    """Where decoded pictures are kept: $BITGEN_CACHE, $XDG_CACHE_HOME/bitgen, ~/.cache/bitgen."""
    if os.environ.get("BITGEN_CACHE"):
        return Path(os.environ["BITGEN_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "bitgen"
    return Path.home() / ".cache" / "bitgen"


class ImageCache:
    """Pictures decoded and resized once, read back from memory-mapped files.

    The folder holds shards of about 64 MiB: `NAME.rgb` (uint8 rows [N, 3, S, S]) and `NAME.json`
    (which file, of which size and modification time, each row is). A shard's JSON is renamed into
    place last, so a kill at any moment leaves whole shards only; shards are never changed, so
    several processes may prepare and read at once.

    It may be pickled: workers open the files by themselves.
    """

    def __init__(self, directory: Path, image_size: int, resize: str) -> None:
        if resize not in IMAGE_RESIZES:
            raise ValueError(f"resize must be one of {', '.join(IMAGE_RESIZES)}; got {resize!r}.")
        self.image_size = image_size
        self.resize = resize
        self.directory = Path(directory) / f"images-v{_CACHE_VERSION}-{image_size}px-{resize}"
        self._row_bytes = 3 * image_size * image_size
        self._rows_per_shard = max(16, _SHARD_BYTES // self._row_bytes)
        self._shards: dict[str, int] = {}  # name -> number of rows
        self._known: dict[_FileKey, tuple[str, int]] = {}  # file -> shard, row
        self._rows: dict[str, tuple[str, int]] = {}  # path prepared here -> shard, row
        self._maps: dict[str, np.ndarray] = {}

    def prepare(
        self,
        paths: Sequence[Path],
        on_progress: ProgressCallback | None = None,
        num_workers: int = 0,
    ) -> dict[Path, str]:
        """Decode, in threads, what the cache does not hold yet.

        `num_workers` is the number of threads; 0 takes one a core. `on_progress(done, total)` is
        called from this thread. Returns the files that cannot be used, and why. Raises
        DiskFullError, or DatasetError where the cache cannot be written; either leaves a valid
        cache.
        """
        total = len(paths)
        report = on_progress or (lambda done, total: None)
        bad: dict[Path, str] = {}
        keys: dict[_FileKey, Path] = {}
        for path in dict.fromkeys(paths):
            try:
                keys[_file_key(path)] = path
            except OSError as error:
                bad[path] = f"{path}: {_reason(error)}."
        with _clear_write_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        with self._lock(keys, report, total):
            missing = self._missing(keys)
            done = total - len(missing)
            report(done, total)
            for start in range(0, len(missing), self._rows_per_shard):
                chunk = missing[start : start + self._rows_per_shard]
                self._write_shard(chunk, keys, bad, done + start, total, report, num_workers)
        for key, path in keys.items():
            if key in self._known:
                self._rows[os.path.abspath(path)] = self._known[key]
        return bad

    def __contains__(self, path: Path) -> bool:
        return os.path.abspath(path) in self._rows

    def __getitem__(self, path: Path) -> np.ndarray:
        """Return the picture as uint8 [3, S, S], a copy. Raises KeyError if not prepared."""
        row = self._rows.get(os.path.abspath(path))
        if row is None:
            raise KeyError(f"{path} was not prepared, or cannot be decoded.")
        shard, index = row
        if shard not in self._maps:
            shape = (self._shards[shard], 3, self.image_size, self.image_size)
            file = self.directory / f"{shard}.rgb"
            self._maps[shard] = np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
        return np.array(self._maps[shard][index])

    def __getstate__(self) -> dict[str, Any]:
        # What only `prepare` needs stays behind, and memory maps cannot travel.
        return {**self.__dict__, "_maps": {}, "_known": {}}

    def _missing(self, keys: dict[_FileKey, Path]) -> list[_FileKey]:
        self._read_index()
        return [key for key in keys if key not in self._known]

    def _read_index(self) -> None:
        """Learn the shards that were added since, by this process or another."""
        for file in self.directory.glob("*.json"):
            shard = file.stem
            if shard in self._shards:
                continue
            try:
                entries = json.loads(file.read_bytes())["files"]
                keys = [(str(path), int(size), int(mtime)) for path, size, mtime in entries]
                length = (self.directory / f"{shard}.rgb").stat().st_size
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not ours, or removed meanwhile: what it held is decoded again
            if length != len(keys) * self._row_bytes:
                continue
            self._shards[shard] = len(keys)
            self._known.update({key: (shard, row) for row, key in enumerate(keys)})

    def _write_shard(
        self,
        chunk: list[_FileKey],
        keys: dict[_FileKey, Path],
        bad: dict[Path, str],
        done: int,
        total: int,
        report: ProgressCallback,
        num_workers: int,
    ) -> None:
        pixels = np.empty((len(chunk), 3, self.image_size, self.image_size), dtype=np.uint8)
        good: list[_FileKey] = []
        executor = ThreadPoolExecutor(num_workers or available_cpus(), "decode")
        try:
            for key, picture in zip(chunk, executor.map(self._decode, chunk), strict=True):
                if isinstance(picture, str):
                    bad[keys[key]] = picture
                else:
                    pixels[len(good)] = picture
                    good.append(key)
                done += 1
                report(done, total)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        if not good:
            return
        # Named by its content: two processes that write the same shard write the same file.
        name = hashlib.blake2b(json.dumps(good).encode(), digest_size=12).hexdigest()
        content = pixels[: len(good)].data.cast("B")
        with _clear_write_errors(self.directory):
            # By write(), not through a memory map: on a full disk that would kill the process.
            _write_atomically(self.directory / f"{name}.rgb", content)
            _write_atomically(self.directory / f"{name}.json", json.dumps({"files": good}).encode())
        self._read_index()

    def _decode(self, key: _FileKey) -> np.ndarray | str:
        try:
            return load_image(key[0], self.image_size, self.resize)
        except ImageError as error:
            return error.message

    def _remove_abandoned(self) -> None:
        """Remove what a killed process left half-written, a day ago or longer."""
        for file in self.directory.glob(f"*{_TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                    file.unlink()

    @contextlib.contextmanager
    def _lock(
        self, keys: dict[_FileKey, Path], report: ProgressCallback, total: int
    ) -> Iterator[None]:
        """Keep two processes from decoding the same files twice.

        Only saves work: the shards are safe without it, where the system has no such locks.
        """
        with _clear_write_errors(self.directory):
            file = (self.directory / "lock").open("ab")
        with file:
            while not _try_lock(file):
                missing = self._missing(keys)
                report(total - len(missing), total)
                if not missing:
                    break
                time.sleep(_LOCK_POLL_SECONDS)
            yield  # closing the file, or the end of the process, releases it


def available_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _file_key(path: Path) -> _FileKey:
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open a picture and judge it by its header. Raises ImageError."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(f"{path}: {_reason(error)}.") from error
    with file:
        try:
            empty = not file.peek(1)
        except OSError as error:  # a folder, a failing disk
            raise ImageError(f"{path}: {_reason(error)}.") from error
        if empty:
            raise ImageError(f"{path}: the file is empty.")
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise ImageError(f"{path}: {_too_large(int(pixels[0]) if pixels else None)}") from error
        except Exception as error:  # Pillow raises nearly any type on damaged data
            raise ImageError(
                f"{path}: not a picture, or its beginning is damaged.",
                remedy="Pictures are read as JPEG, PNG, WebP, BMP, GIF, TIFF or PPM.",
            ) from error
        with image:
            try:
                _check_size(image.size)
            except ImageError as error:
                raise ImageError(f"{path}: {error.message}") from error
            yield image


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"the picture is {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are"
            " needed."
        )
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels: {_too_large(width * height)}")


def _too_large(pixels: int | None) -> str:
    received = "the picture" if pixels is None else f"{pixels / 1e6:,.0f} megapixels"
    return f"{received} exceeds the limit of {MAX_PIXELS / 1e6:.0f} megapixels; it was not decoded."


def _draft_size(size: tuple[int, int], image_size: int, resize: str) -> tuple[int, int]:
    """Smallest size to decode at, such that the resize never has to enlarge."""
    side = min(size) if resize == "crop" else max(size)
    width, height = (max(MIN_SIDE, -(-length * image_size // side)) for length in size)
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF, which cameras do write: the picture itself may be whole
        return 1


def _to_resizable(image: Image.Image) -> Image.Image:
    """Bring the modes that cannot be resized smoothly to L, RGB or RGBA."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("RGB")


def _to_8_bits(grey_HW: np.ndarray) -> np.ndarray:
    """Bring grey of 16 bits, 32 bits or floating point to uint8."""
    grey_HW = np.nan_to_num(grey_HW)
    largest = float(grey_HW.max())
    if np.issubdtype(grey_HW.dtype, np.floating):
        scale = 255.0 if largest <= 1 else 1.0
    else:
        # Pillow opens 16-bit files as 32 bits in some versions; either way 65535 is white.
        scale = 255 / 65535 if grey_HW.dtype.itemsize == 2 or largest > 255 else 1.0
    return np.clip(np.rint(grey_HW * scale), 0, 255).astype(np.uint8)


def _resize(image: Image.Image, image_size: int, resize: str) -> Image.Image:
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    target = (image_size, image_size)
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    else:
        scale = image_size / max(width, height)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image.resize(target, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


def _pad(image: Image.Image, image_size: int) -> Image.Image:
    padded = Image.new("RGB", (image_size, image_size), PAD_COLOUR)
    padded.paste(image, ((image_size - image.width) // 2, (image_size - image.height) // 2))
    return padded


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.rstrip(".") or type(error).__name__


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filters = contextlib.ExitStack()


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings (damaged EXIF, size) back: `ImageError` says what matters.

    Warning filters belong to the whole process and decoding runs in threads, so the first to come
    sets them and the last to leave restores them.
    """
    global _quiet_depth
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_filters.close()


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


@contextlib.contextmanager
def _clear_write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"No room is left for the cache of decoded pictures in {directory}.",
                remedy="Free some space, or set BITGEN_CACHE to a folder on another disk.",
            ) from error
        raise DatasetError(
            f"The cache of decoded pictures cannot be written in {directory} ({_reason(error)}).",
            remedy="Set BITGEN_CACHE to a folder that can be written.",
        ) from error
