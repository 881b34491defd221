"""Pictures: decoded once, resized keeping their aspect, cached in memory-mapped files.

Shapes: B batch, 3 channels (red, green, blue), H = W = S the side of the square picture in pixels.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bitgen.config import IMAGE_RESIZES
from bitgen.dataset.shards import ProgressCallback, RowKey, ShardCache, reason_of
from bitgen.errors import ImageError

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
        raise ImageError(f"the picture cannot be decoded ({reason_of(error)}).") from error
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


class ImageCache(ShardCache):
    """Pictures decoded and resized once, read back from memory-mapped files.

    Its shards are `NAME.rgb`: uint8 rows [N, 3, S, S].
    """

    def __init__(self, directory: Path, image_size: int, resize: str) -> None:
        if resize not in IMAGE_RESIZES:
            raise ValueError(f"resize must be one of {', '.join(IMAGE_RESIZES)}; got {resize!r}.")
        super().__init__(
            Path(directory) / f"images-v{_CACHE_VERSION}-{image_size}px-{resize}",
            row_shape=(3, image_size, image_size),
            dtype=np.uint8,
            suffix=".rgb",
            contents="decoded pictures",
        )
        self.image_size = image_size
        self.resize = resize

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
        return self._prepare(dict.fromkeys(paths, ("",)), on_progress, num_workers)

    def __getitem__(self, path: Path) -> np.ndarray:
        """Return the picture as uint8 [3, S, S], a copy. Raises KeyError if not prepared."""
        return self._row(path)

    def _make_rows(
        self, chunk: Sequence[RowKey], num_workers: int
    ) -> Generator[np.ndarray | str, None, None]:
        with decoding_threads(num_workers) as executor:
            yield from executor.map(self._decode, [key.path for key in chunk])

    def _decode(self, path: str) -> np.ndarray | str:
        try:
            return load_image(path, self.image_size, self.resize)
        except ImageError as error:
            return error.message


@contextlib.contextmanager
def decoding_threads(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that decode pictures, 0 for one a core; what has not begun at the end is given up."""
    executor = ThreadPoolExecutor(num_workers or available_cpus(), "decode")
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def available_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open a picture and judge it by its header. Raises ImageError."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(f"{path}: {reason_of(error)}.") from error
    with file:
        try:
            empty = not file.peek(1)
        except OSError as error:  # a folder, a failing disk
            raise ImageError(f"{path}: {reason_of(error)}.") from error
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
