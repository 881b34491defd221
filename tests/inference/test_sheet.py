from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from bitgen.errors import DiskFullError, ImageError, InputError
from bitgen.inference.sheet import SheetItem, draw_sheet, wrap_line

FONT = ImageFont.load_default(size=14)
RED, BLUE = (200, 20, 30), (20, 40, 200)


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int]) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def area(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((abs(pixels.astype(int) - colour).sum(-1) < 6).sum())


def test_pictures_and_text_are_on_the_sheet(tmp_path: Path) -> None:
    wide = picture(tmp_path / "wide.png", RED, (40, 20))
    tall = picture(tmp_path / "tall.png", BLUE, (20, 80))
    output = tmp_path / "out" / "sheet.png"
    items = [SheetItem(wide, ["A red field."]), SheetItem(tall, [])]
    draw_sheet(items, output, columns=2, picture_side=100)
    with Image.open(output) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # Fitted whole: 100 x 50 and 25 x 100, less a frame one pixel wide.
    assert area(pixels, RED) == 98 * 48
    assert area(pixels, BLUE) == 23 * 98
    left, right = pixels[120:, :124], pixels[120:, 124:]
    assert (left.min(-1) < 128).any() and (right == 255).all()
    assert [path.name for path in output.parent.iterdir()] == ["sheet.png"]


def test_columns_decide_the_shape(tmp_path: Path) -> None:
    item = SheetItem(picture(tmp_path / "a.png", RED, (8, 8)), ["a", "b"])
    sizes = {}
    for columns in (1, 3, 9):
        draw_sheet([item] * 5, tmp_path / "sheet.png", columns=columns, picture_side=50)
        with Image.open(tmp_path / "sheet.png") as sheet:
            sizes[columns] = sheet.size
            assert area(np.asarray(sheet.convert("RGB")), RED) == 5 * 48 * 48
    assert sizes[1][0] < sizes[3][0] < sizes[9][0]
    assert sizes[1][1] > sizes[3][1] > sizes[9][1]


@given(st.text(max_size=80), st.integers(min_value=20, max_value=300))
def test_wrapping_keeps_every_character_and_the_width(line: str, width: int) -> None:
    parts = wrap_line(line, FONT, width)
    assert "".join("".join(parts).split()) == "".join(line.split())
    assert all(FONT.getlength(part) <= width or len(part) == 1 for part in parts)


def test_wrapping_breaks_between_words() -> None:
    assert wrap_line("one two three", FONT, int(FONT.getlength("one two ")) + 2) == [
        "one two",
        "three",
    ]
    assert wrap_line("", FONT, 100) == [""]


def test_bad_input(tmp_path: Path) -> None:
    output = tmp_path / "sheet.png"
    item = SheetItem(picture(tmp_path / "a.png", RED, (8, 8)), [])
    with pytest.raises(InputError, match="at least one picture"):
        draw_sheet([], output)
    with pytest.raises(InputError, match="column"):
        draw_sheet([item], output, columns=0)
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:40])
    for path in (broken, tmp_path / "absent.png"):
        with pytest.raises(ImageError, match=path.name):
            draw_sheet([item, SheetItem(path, [])], output)
    assert not output.exists()


def test_full_disk_leaves_the_old_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = SheetItem(picture(tmp_path / "a.png", RED, (8, 8)), [])
    output = tmp_path / "sheet.png"
    draw_sheet([item], output)
    before = output.read_bytes()

    def full(self: Image.Image, *args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DiskFullError):
        draw_sheet([item, item], output)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "sheet.png"]
