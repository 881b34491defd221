"""Pictures of every kind are decoded alike, bad ones are refused, and the cache holds them."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from bitgen.dataset import images, shards
from bitgen.dataset.images import (
    MAX_PIXELS,
    PAD_COLOUR,
    ImageCache,
    default_cache_dir,
    load_image,
    normalize_images,
    prepare_image,
)
from bitgen.errors import DatasetError, DiskFullError, ImageError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(width: int = 64, height: int = 64) -> Image.Image:
    """Red, green over blue, white: shows every turn and mirror."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def corners(picture: np.ndarray) -> list[tuple[int, ...]]:
    """Colours near the four corners, rounded to 0 or 255."""
    quarter = picture.shape[1] // 4
    rounded = np.where(picture > 127, 255, 0)
    return [
        tuple(rounded[:, y, x].tolist()) for y in (quarter, -quarter) for x in (quarter, -quarter)
    ]


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    (image or quadrants()).save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and ends where its pixels begin."""
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + content
    header = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 5000) + b"IDAT"


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size than its data has."""
    buffer = io.BytesIO()
    quadrants().save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


# Formats and modes


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif", "ppm"])
@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_every_format_gives_the_picture(tmp_path: Path, suffix: str, resize: str) -> None:
    picture = load_image(save(tmp_path / f"a.{suffix}"), 32, resize)
    assert picture.shape == (3, 32, 32)
    assert picture.dtype == np.uint8
    assert corners(picture) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"]
)
def test_every_mode_gives_three_channels(mode: str) -> None:
    source = quadrants()
    expected = np.asarray(source.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
    picture = prepare_image(image, 64, "crop").transpose(1, 2, 0)
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, axis=2)
        if mode == "1":  # dithered: only the solid quadrants are comparable
            picture, expected = picture[32:, 32:], expected[32:, 32:]
    assert np.abs(picture.astype(int) - expected).max() <= 4


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", quadrants().convert("CMYK"), quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert corners(load_image(path, 32, "crop")) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 10))
    if mode == "P":
        palette = Image.new("P", (20, 20), 1)
        palette.putpalette([9, 9, 9, 0, 0, 0])
        palette.paste(0, (0, 0, 20, 10))
        path = save(tmp_path / "a.png", palette, transparency=0)
    else:
        path = save(tmp_path / "a.png", image.convert(mode))
    picture = load_image(path, 20, "crop")
    assert (picture[:, 2] == 255).all()
    assert (picture[:, 17] == 0).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, axis=0)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(ramp))
    picture = load_image(path, 64, "crop")
    expected = np.rint(ramp / 257)
    assert np.abs(picture[0].astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((4, 4), 65535, np.int32), 255),
        (np.full((4, 4), 200, np.int32), 200),
        (np.full((4, 4), 0.5, np.float32), 128),
        (np.full((4, 4), 90.0, np.float32), 90),
        (np.full((4, 4), np.nan, np.float32), 0),
    ],
)
def test_other_greys(values: np.ndarray, expected: int) -> None:
    picture = prepare_image(Image.fromarray(values), 4, "crop")
    assert (picture == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", quadrants(120, 80), exif=exif.tobytes(), quality=95)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    for resize in ("crop", "pad"):
        turned = load_image(path, 48, resize)
        assert np.abs(turned.astype(int) - prepare_image(upright, 48, resize)).mean() < 3
    assert corners(load_image(path, 48, "crop")) == corners(prepare_image(upright, 48, "crop"))


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    assert corners(load_image(path, 32, "crop")) == [RED, GREEN, BLUE, WHITE]


# Resizing


def test_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREEN, (30, 0, 60, 30))
    picture = prepare_image(image, 15, "crop")
    assert (picture[:, :, 1:-1] == np.reshape(GREEN, (3, 1, 1))).all()
    assert (picture[1] > 230).all()  # smoothing takes a little of what lies beside the edge


def test_pad_shows_all_on_the_mean_colour() -> None:
    picture = prepare_image(Image.new("RGB", (90, 30), RED), 30, "pad")
    colours = picture.transpose(1, 2, 0)
    assert (colours[10:20] == RED).all()
    assert (colours[:10] == PAD_COLOUR).all()
    assert (colours[20:] == PAD_COLOUR).all()


def test_turned_picture_is_padded_on_its_sides(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", Image.new("RGB", (90, 30), RED), exif=exif.tobytes())
    colours = load_image(path, 30, "pad").transpose(1, 2, 0)
    assert (colours[:, 10:20] == RED).all()
    assert (colours[:, :10] == PAD_COLOUR).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    width=st.integers(2, 300),
    height=st.integers(2, 300),
    size=st.integers(1, 70),
    resize=st.sampled_from(["crop", "pad"]),
    suffix=st.sampled_from(["JPEG", "PNG"]),
)
def test_any_shape_gives_a_square_of_the_same_colour(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    size: int,
    resize: str,
    suffix: str,
) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    Image.new("RGB", (width, height), (40, 90, 200)).save(path, suffix)
    picture = load_image(path, size, resize)
    assert picture.shape == (3, size, size)
    middle = picture[:, (size - 1) // 2, (size - 1) // 2].astype(int)
    assert np.abs(middle - (40, 90, 200)).max() <= 4


def test_draft_decoding_looks_like_full_decoding(coco_dir: Path) -> None:
    for path in sorted((coco_dir / "val2017").iterdir())[:12]:
        with Image.open(path) as image:
            full = prepare_image(image, 64, "crop")
        assert np.abs(load_image(path, 64, "crop").astype(int) - full).mean() < 4


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_a_long_thin_photograph_survives_draft_decoding(tmp_path: Path, resize: str) -> None:
    path = save(tmp_path / "a.jpg", Image.new("RGB", (2000, 2), RED))
    assert np.abs(load_image(path, 32, resize)[0, 15].astype(int) - 255).max() <= 2


def test_the_given_picture_is_left_alone(tmp_path: Path) -> None:
    with Image.open(save(tmp_path / "a.jpg", quadrants(400, 300))) as image:
        prepare_image(image, 16, "crop")
        assert image.size == (400, 300)
        assert image.mode == "RGB"


@pytest.mark.parametrize(("size", "resize"), [(0, "crop"), (16, "stretch")])
def test_impossible_requests_are_refused(size: int, resize: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        prepare_image(quadrants(), size, resize)


# Bad input


def damaged_files(folder: Path) -> dict[str, Path]:
    """One file of each kind that must be refused, by a word of the message."""
    whole = save(folder / "whole.jpg", quadrants(300, 300)).read_bytes()
    whole_png = save(folder / "whole.png", quadrants(300, 300)).read_bytes()
    contents = {
        "empty": b"",
        "not a picture": b"These are words, not pixels.\n" * 50,
        "not a picture, or its beginning": whole[:20],
        "decoded": whole[: len(whole) // 2],
        "cannot be decoded": whole_png[: len(whole_png) // 2],
        "limit of 100 megapixels": png_header(20_000, 10_000),
        "1 x 50": save(folder / "thin.png", Image.new("RGB", (1, 50))).read_bytes(),
        "50 x 1": save(folder / "flat.png", Image.new("RGB", (50, 1))).read_bytes(),
    }
    files = {}
    for number, (word, content) in enumerate(contents.items()):
        files[word] = folder / f"bad{number}.jpg"
        files[word].write_bytes(content)
    files["No such file"] = folder / "nowhere.jpg"
    files["Is a directory"] = folder
    return files


def test_bad_files_are_refused_with_name_and_reason(tmp_path: Path) -> None:
    for word, path in damaged_files(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            load_image(path, 32, "crop")
        assert word in caught.value.message, word
        assert str(path) in caught.value.message


@pytest.mark.parametrize("pixels", [(10_001, 10_000), (20_000, 10_000), (60_000, 60_000)])
@pytest.mark.parametrize("content", [png_header, jpeg_claiming])
def test_too_large_is_refused_before_decoding(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pixels: tuple[int, int],
    content: Callable[[int, int], bytes],
) -> None:
    path = tmp_path / "huge"
    path.write_bytes(content(*pixels))
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the picture was decoded")
    )
    with pytest.raises(ImageError, match="limit of 100 megapixels"):
        load_image(path, 32, "crop")


def test_largest_allowed_size_passes_the_header_check(tmp_path: Path) -> None:
    assert MAX_PIXELS == 100_000_000
    path = tmp_path / "large.png"
    path.write_bytes(png_header(10_000, 10_000))
    with pytest.raises(ImageError, match="cannot be decoded"):  # its pixels are missing
        load_image(path, 32, "crop")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(ImageError, match="not a picture"):
        load_image(path, 32, "crop")


def test_warning_filters_are_restored_after_threads(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.jpg") for i in range(20)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda path: load_image(path, 16, "crop"), paths * 5))
    assert list(warnings.filters) == before


# Normalisation


def test_normalize_images() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = normalize_images(pixels, mean, std)
    assert normal.dtype == torch.float32
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(normal[:, channel].double(), expected, atol=1e-6, rtol=1e-6)
    assert pixels.dtype == torch.uint8


# Cache


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(40):
        pixels = generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        paths.append(save(folder / f"{number}.png", Image.fromarray(pixels)))
    return paths


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 16 * 3 * 16 * 16)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a path with each picture that is decoded."""
    calls: list[str] = []

    def count(path: str, image_size: int, resize: str) -> np.ndarray:
        calls.append(path)
        return load_image(path, image_size, resize)

    monkeypatch.setattr(images, "load_image", count)
    return calls


def assert_holds(cache: ImageCache, paths: list[Path]) -> None:
    for path in paths:
        assert path in cache
        assert np.array_equal(cache[path], load_image(path, cache.image_size, cache.resize))


def test_cache_returns_what_decoding_gives(
    tmp_path: Path, pictures: list[Path], small_shards: None
) -> None:
    seen: list[tuple[int, int]] = []
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    assert cache.prepare(pictures, lambda done, total: seen.append((done, total))) == {}
    assert_holds(cache, pictures)
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    assert len(list(cache.directory.glob("*.rgb"))) == 3
    cache[pictures[0]][:] = 0  # a copy: writing to it must not reach the cache
    assert_holds(cache, pictures)


def test_cached_pictures_are_not_decoded_again(
    tmp_path: Path, pictures: list[Path], decoded: list[str]
) -> None:
    ImageCache(tmp_path / "cache", 16, "crop").prepare(pictures[:30])
    assert len(decoded) == 30
    again = ImageCache(tmp_path / "cache", 16, "crop")
    again.prepare([*pictures, pictures[0]])
    assert sorted(decoded[30:]) == sorted(map(str, pictures[30:]))
    assert_holds(again, pictures)


@pytest.mark.parametrize(("size", "resize"), [(24, "crop"), (16, "pad")])
def test_other_settings_do_not_share_pictures(
    tmp_path: Path, pictures: list[Path], size: int, resize: str
) -> None:
    ImageCache(tmp_path, 16, "crop").prepare(pictures[:3])
    other = ImageCache(tmp_path, size, resize)
    other.prepare(pictures[:3])
    assert_holds(other, pictures[:3])


def test_a_changed_file_is_decoded_again(tmp_path: Path, pictures: list[Path]) -> None:
    path = pictures[0]
    ImageCache(tmp_path / "cache", 16, "crop").prepare([path])
    status = path.stat()
    save(path, Image.new("RGB", (24, 30), RED))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    cache.prepare([path])
    assert (cache[path] == np.reshape(RED, (3, 1, 1))).all()


def test_bad_pictures_are_named_and_left_out(tmp_path: Path, pictures: list[Path]) -> None:
    bad = damaged_files(tmp_path)
    mixed = [*pictures[:5], *bad.values(), *pictures[5:]]
    seen: list[tuple[int, int]] = []
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    reasons = cache.prepare(mixed, lambda done, total: seen.append((done, total)))
    assert set(reasons) == set(bad.values())
    for word, path in bad.items():
        assert word in reasons[path], word
        assert path not in cache
    assert seen[-1] == (len(mixed), len(mixed))
    assert_holds(cache, pictures)
    with pytest.raises(KeyError, match="bad0"):
        cache[bad["empty"]]


def test_relative_and_absolute_paths_are_one(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures[0].parent)
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    cache.prepare([Path(pictures[0].name)])
    assert np.array_equal(cache[pictures[0]], cache[Path(pictures[0].name)])


def test_pickled_cache_reads(tmp_path: Path, pictures: list[Path]) -> None:
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    cache.prepare(pictures)
    whole = cache[pictures[0]]
    content = pickle.dumps(cache)
    assert len(content) < 10_000  # paths, no pixels
    assert np.array_equal(pickle.loads(content)[pictures[0]], whole)


def test_damaged_shards_are_made_again(tmp_path: Path, pictures: list[Path]) -> None:
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    cache.prepare(pictures)
    (rows,) = cache.directory.glob("*.rgb")
    rows.write_bytes(rows.read_bytes()[:-1])
    (cache.directory / "foreign.json").write_text(json.dumps({"files": [["a", 1]]}))
    (cache.directory / "broken.json").write_text("{")
    again = ImageCache(tmp_path / "cache", 16, "crop")
    again.prepare(pictures)
    assert_holds(again, pictures)


def test_abandoned_temporaries_are_removed(tmp_path: Path, pictures: list[Path]) -> None:
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    cache.directory.mkdir(parents=True)
    old, new = cache.directory / "old.tmp", cache.directory / "new.tmp"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    cache.prepare(pictures[:1])
    assert not old.exists()
    assert new.exists()  # may belong to a process at work


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, DatasetError)]
)
def test_a_full_disk_leaves_a_valid_cache(
    tmp_path: Path,
    pictures: list[Path],
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[str],
    code: int,
    expected: type[Exception],
) -> None:
    real, calls = os.fsync, [0]

    def fail_later(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fail_later)
    cache = ImageCache(tmp_path / "cache", 16, "crop")
    with pytest.raises(expected, match="cache of decoded pictures"):
        cache.prepare(pictures)
    assert not list(cache.directory.glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", real)
    decoded.clear()
    again = ImageCache(tmp_path / "cache", 16, "crop")
    again.prepare(pictures)
    assert len(decoded) == 40 - 16  # the first shard was whole
    assert_holds(again, pictures)


def test_cache_folder_that_is_a_file(tmp_path: Path, pictures: list[Path]) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DatasetError, match="cannot be written") as caught:
        ImageCache(tmp_path / "cache", 16, "crop").prepare(pictures)
    assert "BITGEN_CACHE" in str(caught.value)


def test_interrupt_stops_decoding_soon(tmp_path: Path, pictures: list[Path]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    cache = ImageCache(tmp_path / "cache", 16, "crop")
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(pictures, interrupt, num_workers=1)
    assert not list(cache.directory.glob("*.rgb"))
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_a_waiting_process_takes_what_the_other_made(
    tmp_path: Path, pictures: list[Path], decoded: list[str]
) -> None:
    first, second = (ImageCache(tmp_path / "cache", 16, "crop") for _ in range(2))
    with ThreadPoolExecutor(2) as executor:
        results = executor.map(lambda cache: cache.prepare(pictures), (first, second))
        assert list(results) == [{}, {}]
    assert len(decoded) == 40
    assert_holds(first, pictures)
    assert_holds(second, pictures)


def test_without_locks_two_at_once_are_still_safe(
    tmp_path: Path, pictures: list[Path], small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_try_lock", lambda file: True)
    caches = [ImageCache(tmp_path / "cache", 16, "crop") for _ in range(4)]
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda cache: cache.prepare(pictures), caches))
    for cache in caches:
        assert_holds(cache, pictures)


PREPARE_AND_STALL = """
import sys, time
from pathlib import Path
from bitgen.dataset import images, shards
shards._SHARD_BYTES = 16 * 3 * 16 * 16
def stall(done, total):
    if done == 20:
        print("stalled", flush=True)
        time.sleep(60)
paths = sorted(Path(sys.argv[2]).iterdir())
images.ImageCache(Path(sys.argv[1]), 16, "crop").prepare(paths, stall)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_leaves_a_valid_cache_and_no_lock(
    tmp_path: Path, pictures: list[Path], decoded: list[str]
) -> None:
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE_AND_STALL, str(folder), str(pictures[0].parent)],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == b"stalled"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    cache = ImageCache(folder, 16, "crop")
    start = time.monotonic()
    cache.prepare(pictures)
    assert time.monotonic() - start < 20
    assert len(decoded) == 40 - 16
    assert_holds(cache, pictures)


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache_dir() == tmp_path / "a"
    monkeypatch.delenv("BITGEN_CACHE")
    assert default_cache_dir() == tmp_path / "b" / "bitgen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "bitgen"


def test_real_photographs(coco_dir: Path, tmp_path: Path) -> None:
    paths = sorted((coco_dir / "val2017").glob("*.jpg"))
    assert len(paths) == 499
    cache = ImageCache(tmp_path, 32, "crop")
    assert cache.prepare(paths) == {}
    pixels = np.stack([cache[path] for path in paths])
    assert 80 < pixels.mean() < 140
    assert (pixels.std(axis=(1, 2, 3)) > 5).all()
