"""A picture sheet: pictures in a grid, lines of text under each; and PNGs written whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from bitgen.errors import ImageError, InputError
from bitgen.files import write_whole

MARGIN = 16
LINE_HEIGHT = 18
PAPER = (255, 255, 255)
FIRST_INK = (24, 28, 34)
OTHER_INK = (92, 100, 112)
_FRAME = (216, 220, 226)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class SheetItem:
    """One picture and the lines under it; the first line is set darker than the others."""

    image: Path | Image.Image
    lines: Sequence[str] = field(default_factory=tuple)


def draw_sheet(
    items: Sequence[SheetItem], output: Path, columns: int = 4, picture_side: int = 224
) -> None:
    """Write a PNG with `items` in rows of `columns`; long lines are wrapped.

    Each picture is fitted whole into a square of `picture_side` pixels. The file appears whole or
    not at all; one that is there is replaced.

    Raises InputError for no items or columns < 1, ImageError for a picture that cannot be read,
    DiskFullError if the disk is full.
    """
    save_png(lay_out(items, columns, picture_side), Path(output), "picture sheet")


def lay_out(items: Sequence[SheetItem], columns: int, picture_side: int) -> Image.Image:
    """The sheet that `draw_sheet` writes; raises what it raises, the full disk aside."""
    if not items:
        raise InputError("A picture sheet needs at least one picture.")
    if columns < 1 or picture_side < 16:
        raise InputError(
            "A picture sheet needs at least one column and pictures of 16 pixels, got"
            f" {columns} columns of {picture_side} pixels."
        )
    columns = min(columns, len(items))
    font = ImageFont.load_default(size=14)
    texts = [_wrapped(item.lines, font, picture_side) for item in items]
    rows = [
        range(start, min(start + columns, len(items))) for start in range(0, len(items), columns)
    ]
    row_heights = [
        picture_side + 8 + LINE_HEIGHT * max(len(texts[index]) for index in row) + MARGIN
        for row in rows
    ]
    width = MARGIN + columns * (picture_side + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + sum(row_heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, row_heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (picture_side + MARGIN)
            _paste(sheet, draw, items[index].image, left, top, picture_side)
            for number, (line, ink) in enumerate(texts[index]):
                y = top + picture_side + 8 + number * LINE_HEIGHT
                draw.text((left, y), line, fill=ink, font=font)
        top += height
    return sheet


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: Path | Image.Image,
    left: int,
    top: int,
    side: int,
) -> None:
    picture = image if isinstance(image, Image.Image) else _read(image)
    picture = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
    corner = (left + (side - picture.width) // 2, top + (side - picture.height) // 2)
    sheet.paste(picture, corner)
    right, bottom = corner[0] + picture.width - 1, corner[1] + picture.height - 1
    draw.rectangle((*corner, right, bottom), outline=_FRAME)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read as a picture: {error}") from error


def _wrapped(
    lines: Sequence[str], font: Font, width: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """(text, colour) of each printed line, none wider than `width` pixels."""
    wrapped = []
    for number, line in enumerate(lines):
        ink = FIRST_INK if number == 0 else OTHER_INK
        wrapped += [(part, ink) for part in wrap_line(line, font, width)]
    return wrapped


def wrap_line(line: str, font: Font, width: int) -> list[str]:
    """Break a line between words, and within a word only where one alone is too wide."""
    parts: list[str] = []
    current = ""
    for word in line.split():
        candidate = f"{current} {word}" if current else word
        if font.getlength(candidate) <= width:
            current = candidate
            continue
        if current:
            parts.append(current)
        current = word
        while font.getlength(current) > width and len(current) > 1:
            cut = len(current) - 1
            while cut > 1 and font.getlength(current[:cut]) > width:
                cut -= 1
            parts.append(current[:cut])
            current = current[cut:]
    return [*parts, current]


def save_png(
    image: Image.Image, output: Path, what: str, info: PngInfo | None = None, optimize: bool = True
) -> None:
    """Write a PNG that appears whole or not at all; folders are made, a file there is replaced.

    Args:
        image: what to write.
        output: the file.
        what: its name in messages, such as "picture sheet".
        info: text chunks to write with it.
        optimize: take longer for a smaller file.

    Raises DiskFullError if the disk is full, InputError if it cannot be written for other reasons.
    """
    with write_whole(output, what) as file:
        image.save(file, format="PNG", optimize=optimize, pnginfo=info)
