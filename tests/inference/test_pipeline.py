"""Pictures decoded ahead: in order, a bounded number, whatever is wrong with single ones."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitgen.config import BitGenConfig
from bitgen.errors import ImageError
from bitgen.inference.pipeline import decoded_ahead, picture_pixels

CONFIG = BitGenConfig(image_size=16)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for number in range(12):
        paths.append(tmp_path / f"{number:02}.png")
        # The first ones take longest, so that they do not end in order by themselves.
        side = 400 if number < 3 else 20
        Image.new("RGB", (side, side), (number, 0, 0)).save(paths[-1])
    return paths


def test_order_and_pixels_are_those_of_the_files(files: list[Path]) -> None:
    found = list(decoded_ahead(files, CONFIG, ahead=5))
    assert [picture for picture, _ in found] == files
    for number, (_, pixels) in enumerate(found):
        assert isinstance(pixels, np.ndarray)
        assert (pixels.shape, pixels.dtype) == ((3, 16, 16), np.uint8)
        assert (pixels[0] == number).all()


def test_files_open_pictures_and_bad_files_keep_their_places(
    files: list[Path], tmp_path: Path
) -> None:
    bad, missing = tmp_path / "bad.png", tmp_path / "missing.png"
    bad.write_text("no picture")
    with Image.open(files[1]) as picture:
        given = [bad, picture, str(files[0]), missing, picture]
        found = list(decoded_ahead(given, CONFIG, ahead=2))
        assert [one for one, _ in found] == given
        kinds = [isinstance(pixels, ImageError) for _, pixels in found]
        assert kinds == [True, False, False, True, False]
        np.testing.assert_array_equal(found[1][1], picture_pixels(picture, CONFIG))
        np.testing.assert_array_equal(found[1][1], found[4][1])


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_memory_stays_the_same_for_endless_pictures(files: list[Path], ahead: int) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        for path in itertools.cycle(files):
            taken += 1
            yield path

    decoded = decoded_ahead(endless(), CONFIG, ahead)
    for number in range(1, 40):
        next(decoded)
        assert number <= taken <= number + ahead
    decoded.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_an_end_in_between_stops_the_threads(files: list[Path]) -> None:
    decoded = decoded_ahead(files, CONFIG, ahead=8)
    with pytest.raises(KeyboardInterrupt):
        for _ in decoded:
            decoded.throw(KeyboardInterrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_no_pictures() -> None:
    assert list(decoded_ahead([], CONFIG, ahead=3)) == []
