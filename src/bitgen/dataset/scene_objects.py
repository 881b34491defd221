"""The objects of the drawn scenes, and the canvas that pictures are drawn on.

Lengths are shares of the picture's side, x to the right, y down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

OBJECTS = ("ball", "box", "cone", "star", "ring", "mug", "bottle", "key", "umbrella", "heart")
COLOURS: Mapping[str, Colour] = {
    "red": (212, 34, 38),
    "orange": (246, 138, 16),
    "yellow": (252, 222, 40),
    "green": (36, 158, 62),
    "blue": (36, 76, 214),
    "purple": (142, 58, 182),
    "white": (246, 246, 244),
    "black": (28, 28, 32),
}
SIZES: Mapping[str, tuple[float, float]] = {
    "small": (0.30, 0.33),
    "medium": (0.39, 0.42),
    "large": (0.49, 0.52),
}
"""Longer side of an object as a share of the picture's side, smallest and largest."""


class Canvas:
    """A picture drawn larger than it will be, so that edges come out smooth."""

    def __init__(self, side: int, top: Colour, bottom: Colour) -> None:
        self.factor = 2 if side >= 128 else 3
        self.side = side * self.factor
        column = Image.new("RGB", (1, 2))
        column.putdata([top, bottom])
        self.image = column.resize((1, self.side), Image.Resampling.BILINEAR).resize(
            (self.side, self.side), Image.Resampling.NEAREST
        )
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def polygon(self, points: Sequence[Point], colour: Colour, alpha: int = 255) -> None:
        side = self.side
        self.draw.polygon([(x * side, y * side) for x, y in points], fill=(*colour, alpha))

    def line(self, points: Sequence[Point], colour: Colour, width: float, alpha: int = 255) -> None:
        side = self.side
        self.draw.line(
            [(x * side, y * side) for x, y in points],
            fill=(*colour, alpha),
            width=max(1, round(width * side)),
            joint="curve",
        )

    def rectangle(self, box: Box, colour: Colour, alpha: int = 255) -> None:
        self.draw.rectangle([value * self.side for value in box], fill=(*colour, alpha))

    def ellipse(self, x: float, y: float, half: Point, colour: Colour, alpha: int = 255) -> None:
        box = [
            (x - half[0]) * self.side,
            (y - half[1]) * self.side,
            (x + half[0]) * self.side,
            (y + half[1]) * self.side,
        ]
        self.draw.ellipse(box, fill=(*colour, alpha))

    def finish(self, brightness: float) -> Image.Image:
        small = self.image.reduce(self.factor)
        table = [min(255, round(value * brightness)) for value in range(256)]
        return small.point(table * 3)


def shade_of(colour: Colour, amount: float) -> Colour:
    """Towards white for amounts above 0, towards black below."""
    target = 255 if amount > 0 else 0
    red, green, blue = (round(value + (target - value) * abs(amount)) for value in colour)
    return (red, green, blue)


def varied(colour: Colour, rng: random.Random, amount: int = 10) -> Colour:
    step = rng.randint(-amount, amount)
    red, green, blue = (
        max(0, min(255, value + step + rng.randint(-amount // 2, amount // 2))) for value in colour
    )
    return (red, green, blue)


# Outlines in a unit square around (0, 0).


def _circle(x: float, y: float, radius: float, corners: int = 28) -> list[Point]:
    return [
        (
            x + radius * math.cos(2 * math.pi * step / corners),
            y + radius * math.sin(2 * math.pi * step / corners),
        )
        for step in range(corners + 1)
    ]


def _annulus(x: float, y: float, outer: float, inner: float) -> list[Point]:
    # One outline with a seam: the polygon fill leaves the inside free.
    return [*_circle(x, y, outer), *reversed(_circle(x, y, inner))]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


@dataclass(frozen=True)
class _Outline:
    """Parts that make the silhouette, and details on them; each with a shade of the colour."""

    parts: tuple[tuple[Sequence[Point], float], ...]
    details: tuple[tuple[Sequence[Point], float], ...] = ()


def _star_points() -> list[Point]:
    points = []
    for corner in range(10):
        radius = 0.54 if corner % 2 == 0 else 0.235
        angle = -math.pi / 2 + corner * math.pi / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _heart_points() -> list[Point]:
    points = []
    for step in range(36):
        angle = 2 * math.pi * step / 36
        x = 16 * math.sin(angle) ** 3
        y = -(
            13 * math.cos(angle)
            - 5 * math.cos(2 * angle)
            - 2 * math.cos(3 * angle)
            - math.cos(4 * angle)
        )
        points.append((x / 33, y / 33 - 0.07))
    return points


def _umbrella_canopy() -> list[Point]:
    arch = [
        (0.5 * math.cos(angle), 0.02 - 0.5 * math.sin(angle))
        for angle in (math.pi * step / 16 for step in range(17))
    ]
    scallops = [
        (-0.5 + step / 24, 0.02 - 0.07 * abs(math.sin(math.pi * step / 6))) for step in range(25)
    ]
    return [*arch, *scallops]


def _band(points: Sequence[Point], width: float) -> list[Point]:
    """A line of the given width as an outline."""
    left, right = [], []
    for index, (x, y) in enumerate(points):
        (x0, y0), (x1, y1) = points[max(0, index - 1)], points[min(len(points) - 1, index + 1)]
        length = math.hypot(x1 - x0, y1 - y0)
        normal = (-(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2)
        left.append((x + normal[0], y + normal[1]))
        right.append((x - normal[0], y - normal[1]))
    return [*left, *reversed(right)]


def _umbrella_handle() -> list[Point]:
    hook = [
        (0.1 - 0.1 * math.cos(angle), 0.4 + 0.1 * math.sin(angle))
        for angle in (math.pi * step / 8 for step in range(9))
    ]
    return _band([(0.0, -0.1), (0.0, 0.2), *hook], 0.075)


def _ellipse(x: float, y: float, half_x: float, half_y: float) -> list[Point]:
    return [(x + px * half_x, y + py * half_y) for px, py in _circle(0, 0, 1)]


_OUTLINES: Mapping[str, _Outline] = {
    "ball": _Outline(
        ((_circle(0, 0, 0.5), 0.0),),
        (
            (_band([(-0.44, 0.16), (-0.2, 0.29), (0.05, 0.31), (0.46, 0.14)], 0.09), -0.3),
            (_ellipse(-0.18, -0.22, 0.15, 0.11), 0.6),
        ),
    ),
    "box": _Outline(
        (
            ([(-0.5, -0.25), (-0.26, -0.5), (0.5, -0.5), (0.26, -0.25)], 0.4),
            ([(0.26, -0.25), (0.5, -0.5), (0.5, 0.25), (0.26, 0.5)], -0.35),
            (_rectangle(-0.5, -0.25, 0.26, 0.5), 0.0),
        ),
        ((_rectangle(-0.19, -0.25, -0.05, 0.1), -0.25),),
    ),
    "cone": _Outline(
        (
            ([(-0.08, -0.5), (0.08, -0.5), (0.3, 0.36), (-0.3, 0.36)], 0.0),
            (_rectangle(-0.44, 0.34, 0.44, 0.5), -0.25),
        ),
        (
            ([(-0.135, -0.28), (0.135, -0.28), (0.18, -0.11), (-0.18, -0.11)], 0.5),
            ([(-0.22, 0.06), (0.22, 0.06), (0.26, 0.2), (-0.26, 0.2)], 0.5),
        ),
    ),
    "star": _Outline(((_star_points(), 0.0),)),
    "ring": _Outline(((_annulus(0, 0, 0.5, 0.29), 0.0),)),
    "mug": _Outline(
        (
            (_annulus(0.23, 0.02, 0.27, 0.15), -0.2),
            (
                [
                    (-0.5, -0.44), (0.22, -0.44), (0.2, 0.4), (0.12, 0.48),
                    (-0.4, 0.48), (-0.48, 0.4),
                ],
                0.0,
            ),
        ),
        ((_ellipse(-0.14, -0.41, 0.34, 0.08), -0.45),),
    ),
    "bottle": _Outline(
        (
            (
                [
                    (-0.09, -0.4), (0.09, -0.4), (0.09, -0.2), (0.25, -0.04), (0.25, 0.44),
                    (0.2, 0.5), (-0.2, 0.5), (-0.25, 0.44), (-0.25, -0.04), (-0.09, -0.2),
                ],
                0.0,
            ),
            (_rectangle(-0.12, -0.5, 0.12, -0.36), -0.35),
        ),
        ((_rectangle(-0.25, 0.1, 0.25, 0.34), 0.5),),
    ),
    "key": _Outline(
        (
            (_annulus(-0.27, 0.0, 0.23, 0.1), 0.0),
            (_rectangle(-0.06, -0.065, 0.5, 0.065), 0.0),
            (_rectangle(0.39, 0.06, 0.5, 0.25), 0.0),
            (_rectangle(0.2, 0.06, 0.31, 0.21), 0.0),
        ),
    ),
    "umbrella": _Outline(
        ((_umbrella_handle(), -0.3), (_umbrella_canopy(), 0.0)),
        (
            (
                [(0.0, -0.48), (-0.12, -0.33), (-0.167, 0.02), (-0.08, -0.05), (0.0, -0.05),
                 (0.08, -0.05), (0.167, 0.02), (0.12, -0.33)],
                0.3,
            ),
        ),
    ),
    "heart": _Outline(((_heart_points(), 0.0),), ((_ellipse(-0.24, -0.24, 0.1, 0.08), 0.6),)),
}  # fmt: skip

# Degrees that an object may lean where it stands; a standing mug that leans looks like a mistake.
_LEAN = {
    "ball": 180, "ring": 180, "star": 20, "key": 35, "heart": 14, "umbrella": 12,
    "box": 0, "cone": 0, "mug": 0, "bottle": 0,
}  # fmt: skip


class Shape:
    """An object turned, mirrored and scaled, its box starting at (0, 0)."""

    def __init__(self, name: str, place: str, size: str, rng: random.Random) -> None:
        lean = _LEAN[name]
        if place in ("sky", "water"):
            lean = max(lean, 25)
        elif place == "rubble":
            lean = max(lean, 10)
        angle = math.radians(rng.uniform(-lean, lean))
        self._cosine, self._sine = math.cos(angle), math.sin(angle)
        self._mirror = rng.choice((-1, 1))
        self._scale = rng.uniform(*SIZES[size])
        outline = _OUTLINES[name]
        self._parts = [(self._turn(points), shade) for points, shade in outline.parts]
        self._details = [(self._turn(points), shade) for points, shade in outline.details]
        every = [point for points, _ in self._parts for point in points]
        self._left, self._top = min(x for x, _ in every), min(y for _, y in every)
        self.width = max(x for x, _ in every) - self._left
        self.height = max(y for _, y in every) - self._top

    def _turn(self, points: Sequence[Point]) -> list[Point]:
        turned = []
        for x, y in points:
            x *= self._mirror
            turned.append(
                (
                    self._scale * (x * self._cosine - y * self._sine),
                    self._scale * (x * self._sine + y * self._cosine),
                )
            )
        return turned

    def draw(
        self, canvas: Canvas, box: Box, colour_name: str, rng: random.Random, shadow: bool
    ) -> None:
        """Draw into `box`, which has this shape's width and height."""
        left, top, right, bottom = box
        if shadow:
            half = ((right - left) * 0.52, 0.022)
            canvas.ellipse((left + right) / 2, bottom - 0.004, half, (40, 36, 34), 105)
        dx, dy = left - self._left, top - self._top
        colour = varied(COLOURS[colour_name], rng, 8)
        # Dark around every colour but black, so that blue shows in water and white in clouds.
        edge = (236, 236, 236) if colour_name == "black" else shade_of(colour, -0.72)
        moved = [([(x + dx, y + dy) for x, y in points], shade) for points, shade in self._parts]
        for points, _ in moved:
            canvas.line([*points, points[0], points[1]], edge, 0.034)
        for points, shade in moved:
            canvas.polygon(points, _tone(colour, shade))
        for points, shade in self._details:
            canvas.polygon([(x + dx, y + dy) for x, y in points], _tone(colour, shade))


def _tone(colour: Colour, shade: float) -> Colour:
    """A shade that keeps the colour's name: black never turns grey, white never dark."""
    if sum(colour) < 150:
        return shade_of(colour, max(0.0, shade) * 0.45)
    return shade_of(colour, shade * (0.5 if sum(colour) > 690 else 0.75))
