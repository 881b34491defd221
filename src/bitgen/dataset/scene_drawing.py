"""Scenes as pictures: six places drawn with chance, and objects put where they can be.

Lengths are shares of the picture's side, x to the right, y down. Every number comes from the
generator that is passed in, so a picture can be drawn again byte for byte.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bitgen.dataset.scene_objects import Box, Canvas, Colour, Point, Shape, shade_of, varied

PLACES = ("sky", "water", "floor", "stairs", "rubble", "shelves")


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene. `box` is (left, top, right, bottom) as shares of the side."""

    object: str
    colour: str
    size: str
    box: Box

    @property
    def position(self) -> Point:
        """Centre of the box."""
        left, top, right, bottom = self.box
        return ((left + right) / 2, (top + bottom) / 2)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. The first object is the main one."""

    place: str
    objects: tuple[SceneObject, ...]

    def relations(self) -> tuple[str, ...]:
        """Relations of the main object to the second one that hold, () for one object."""
        if len(self.objects) == 1:
            return ()
        (x, y), (other_x, other_y) = (item.position for item in self.objects)
        right, down = x - other_x, y - other_y
        found: list[str] = []
        if abs(right) > 0.24 and abs(right) > 1.25 * abs(down):
            found.append("right of" if right > 0 else "left of")
            if abs(down) < 0.2 and abs(right) < 0.55:
                found.append("next to")
        elif abs(down) > 0.24 and abs(down) > 1.25 * abs(right):
            found.append("below" if down > 0 else "above")
        return tuple(found)

    def to_dict(self, file_name: str) -> dict[str, Any]:
        """Ground truth as it stands in scenes_{train,val}.json."""
        return {
            "file_name": file_name,
            "place": self.place,
            "objects": [
                {
                    "object": item.object,
                    "colour": item.colour,
                    "size": item.size,
                    "position": [round(value, 3) for value in item.position],
                }
                for item in self.objects
            ],
            "relations": list(self.relations()),
        }


@dataclass(frozen=True)
class _Surface:
    """Where an object may be: on a line between left and right (y from `high` to `low`), or,
    when it floats, with its whole box between ceiling and `low`."""

    left: float
    right: float
    high: float
    low: float
    ceiling: float = 0.02
    floats: bool = False


def draw_scene(
    place: str, wanted: Sequence[tuple[str, str, str]], rng: random.Random, side: int
) -> tuple[Scene, Image.Image]:
    """Draw the place anew until the wanted (object, colour, size) stand in it clearly apart."""
    while True:
        shapes = [Shape(name, place, size, rng) for name, _, size in wanted]
        canvas, surfaces = _DRAW_PLACE[place](side, max(shape.height for shape in shapes), rng)
        for _ in range(40):
            boxes = [_place_on(rng.choice(surfaces), shape, rng) for shape in shapes]
            items = tuple(
                SceneObject(name, colour, size, box)
                for (name, colour, size), box in zip(wanted, boxes, strict=True)
                if box is not None
            )
            scene = Scene(place, items)
            if len(items) == len(wanted) and _stand_apart(scene):
                break
        else:
            continue
        for shape, item in zip(shapes, items, strict=True):
            shadow = place in ("floor", "stairs", "shelves")
            shape.draw(canvas, item.box, item.colour, rng, shadow)
        _draw_front(canvas, scene, rng)
        return scene, canvas.finish(rng.uniform(0.91, 1.06))


def _place_on(surface: _Surface, shape: Shape, rng: random.Random) -> Box | None:
    width, height = shape.width, shape.height
    if width > surface.right - surface.left:
        return None
    left = rng.uniform(surface.left, surface.right - width)
    if surface.floats:
        if height > surface.low - surface.ceiling:
            return None
        bottom = rng.uniform(surface.ceiling + height, surface.low)
    else:
        bottom = rng.uniform(surface.high, surface.low)
        if bottom - height < surface.ceiling:
            return None
    return (left, bottom - height, left + width, bottom)


def _stand_apart(scene: Scene) -> bool:
    if len(scene.objects) == 1:
        return True
    (left, top, right, bottom), (left2, top2, right2, bottom2) = (
        item.box for item in scene.objects
    )
    gap = 0.025
    apart = left > right2 + gap or left2 > right + gap or top > bottom2 + gap or top2 > bottom + gap
    return apart and bool(scene.relations())


def _sky(side: int, tallest: float, rng: random.Random) -> tuple[Canvas, list[_Surface]]:
    top = varied(rng.choice(((92, 160, 226), (120, 178, 232), (104, 172, 214))), rng, 12)
    bottom = varied(rng.choice(((206, 228, 246), (232, 236, 238), (246, 226, 208))), rng, 8)
    canvas = Canvas(side, top, bottom)
    if rng.random() < 0.35:
        x, y = rng.choice((0.08, 0.9)), rng.uniform(0.05, 0.16)
        canvas.ellipse(x, y, (0.12, 0.12), (255, 244, 200), 90)
        canvas.ellipse(x, y, (0.075, 0.075), (255, 240, 170))
    for _ in range(rng.randint(3, 6)):
        _cloud(canvas, rng.random(), rng.uniform(0.04, 0.9), rng.uniform(0.06, 0.12), rng)
    for _ in range(rng.randint(0, 4)):
        x, y, wing = rng.random(), rng.uniform(0.05, 0.7), rng.uniform(0.015, 0.03)
        bird = [(x - wing, y - wing * 0.7), (x, y), (x + wing, y - wing * 0.7)]
        canvas.line(bird, (70, 84, 104), 0.008)
    low = 0.97
    if rng.random() < 0.45:
        low = rng.uniform(0.86, 0.92)
        hills = [(0.0, 1.0)]
        phase, height = rng.uniform(0, 6), rng.uniform(0.02, 0.05)
        for step in range(13):
            x = step / 12
            hills.append((x, low + 0.04 + height * math.sin(phase + 6 * x)))
        canvas.polygon([*hills, (1.0, 1.0)], varied((126, 152, 118), rng, 12))
    return canvas, [_Surface(0.03, 0.97, 0, low, ceiling=0.03, floats=True)]


def _cloud(canvas: Canvas, x: float, y: float, size: float, rng: random.Random) -> None:
    puffs = [
        (rng.uniform(-1.3, 1.3) * size, rng.uniform(-0.25, 0.2) * size, rng.uniform(0.5, 0.9))
        for _ in range(5)
    ]
    for shift, colour in ((size * 0.18, (222, 230, 240)), (0.0, (255, 255, 255))):
        for dx, dy, share in puffs:
            half = (size * share, size * share * 0.62)
            canvas.ellipse(x + dx, y + dy + shift, half, colour, 235)


def _water(side: int, tallest: float, rng: random.Random) -> tuple[Canvas, list[_Surface]]:
    tint = rng.choice(((60, 168, 178), (72, 176, 190), (54, 156, 152), (84, 170, 200)))
    tint = varied(tint, rng, 12)
    canvas = Canvas(side, shade_of(tint, 0.25), shade_of(tint, -0.42))
    for _ in range(rng.randint(2, 4)):
        x, slant, width = rng.random(), rng.uniform(-0.3, 0.3), rng.uniform(0.04, 0.1)
        ray = [(x, 0.0), (x + width, 0.0), (x + slant + 2 * width, 0.95), (x + slant, 0.95)]
        canvas.polygon(ray, (230, 255, 250), 34)
    surface = rng.uniform(0.05, 0.11)
    phase, waves = rng.uniform(0, 6), rng.randint(3, 5)
    crest = [
        (step / 24, surface + 0.016 * math.sin(phase + waves * 2 * math.pi * step / 24))
        for step in range(25)
    ]
    canvas.polygon([(0.0, 0.0), *crest, (1.0, 0.0)], varied((226, 238, 242), rng, 8))
    canvas.line(crest, (250, 255, 255), 0.016)
    bed = rng.uniform(0.87, 0.93)
    sand = varied((188, 176, 132), rng, 12)
    phase = rng.uniform(0, 6)
    dunes = [(step / 12, bed + 0.018 * math.sin(phase + 0.7 * step)) for step in range(13)]
    canvas.polygon([(0.0, 1.0), *dunes, (1.0, 1.0)], sand)
    for _ in range(rng.randint(3, 7)):
        half = (rng.uniform(0.01, 0.03), rng.uniform(0.008, 0.014))
        canvas.ellipse(rng.random(), rng.uniform(bed + 0.03, 0.99), half, shade_of(sand, -0.25))
    for _ in range(rng.randint(1, 4)):
        _weed(canvas, rng.choice((rng.uniform(0.0, 0.16), rng.uniform(0.84, 1.0))), bed, rng)
    for _ in range(rng.randint(5, 12)):
        _bubble(canvas, rng.random(), rng.uniform(surface + 0.05, bed), rng)
    free = _Surface(0.03, 0.97, 0, bed, ceiling=surface + 0.05, floats=True)
    ground = _Surface(0.03, 0.97, bed + 0.02, 0.96, ceiling=surface + 0.05)
    return canvas, [free, free, ground]


def _weed(canvas: Canvas, x: float, bed: float, rng: random.Random) -> None:
    height, phase = rng.uniform(0.12, 0.32), rng.uniform(0, 6)
    blade = [
        (x + 0.018 * math.sin(phase + 0.9 * step), bed + 0.04 - height * step / 7)
        for step in range(8)
    ]
    canvas.line(blade, varied((38, 104, 82), rng, 10), 0.02)


def _bubble(canvas: Canvas, x: float, y: float, rng: random.Random) -> None:
    radius = rng.uniform(0.008, 0.02)
    canvas.ellipse(x, y, (radius, radius), (236, 252, 255), 220)
    inner = radius * 0.65
    canvas.ellipse(x, y, (inner, inner), (150, 214, 222), 200)


def _floor(side: int, tallest: float, rng: random.Random) -> tuple[Canvas, list[_Surface]]:
    wall = varied(
        rng.choice(((236, 226, 204), (214, 226, 216), (224, 220, 230), (238, 214, 200))), rng
    )
    canvas = Canvas(side, shade_of(wall, 0.2), shade_of(wall, -0.06))
    horizon = rng.uniform(0.44, 0.6)
    floor = varied(rng.choice(((188, 168, 142), (176, 176, 172), (164, 178, 170))), rng, 12)
    if rng.random() < 0.4:
        _window(canvas, rng.choice((rng.uniform(0.02, 0.2), rng.uniform(0.6, 0.78))), horizon, rng)
    canvas.rectangle((0, horizon, 1, 1), floor)
    lines = shade_of(floor, -0.22)
    vanishing, spread = rng.uniform(0.3, 0.7), rng.uniform(0.22, 0.34)
    for step in range(-8, 9):
        # Tiles: lines meet far above the horizon, so the floor looks flat and seen from above.
        end = vanishing + step * spread
        start = vanishing + step * spread * 0.45
        canvas.line([(start, horizon), (end, 1.0)], lines, 0.008)
    depth = horizon
    gap = rng.uniform(0.05, 0.08)
    while depth < 1:
        canvas.line([(0, depth), (1, depth)], lines, 0.008)
        depth, gap = depth + gap, gap * 1.45
    canvas.rectangle((0, horizon - 0.035, 1, horizon), shade_of(wall, 0.55))
    canvas.line([(0, horizon), (1, horizon)], shade_of(floor, -0.45), 0.01)
    return canvas, [_Surface(0.04, 0.96, horizon + 0.14, 0.95)]


def _window(canvas: Canvas, x: float, horizon: float, rng: random.Random) -> None:
    box = (x, 0.08, x + 0.2, horizon - 0.13)
    canvas.rectangle(box, (250, 248, 240))
    middle = x + 0.1
    pane = varied((196, 216, 224), rng, 6)
    canvas.rectangle((x + 0.015, 0.095, middle - 0.006, box[3] - 0.015), pane)
    canvas.rectangle((middle + 0.006, 0.095, x + 0.185, box[3] - 0.015), pane)


def _stairs(side: int, tallest: float, rng: random.Random) -> tuple[Canvas, list[_Surface]]:
    wall = varied(rng.choice(((206, 198, 186), (190, 200, 204), (214, 206, 188))), rng, 12)
    stone = varied(rng.choice(((150, 142, 132), (140, 146, 152), (162, 136, 112))), rng, 12)
    canvas = Canvas(side, shade_of(wall, 0.12), shade_of(wall, -0.08))
    if rng.random() < 0.5:
        return canvas, _stairs_from_the_side(canvas, stone, rng)
    return canvas, _stairs_from_the_front(canvas, stone, rng)


def _stairs_from_the_side(canvas: Canvas, stone: Colour, rng: random.Random) -> list[_Surface]:
    count = rng.choice((3, 4))
    rises_right = rng.random() < 0.5
    lowest = rng.uniform(0.88, 0.94)
    rise = rng.uniform(0.44, 0.54) / count
    run = 1 / count
    depth = 0.055
    darkest = shade_of(stone, -0.62)
    surfaces = []
    for step in range(count):
        left = step * run if rises_right else 1 - (step + 1) * run
        level = lowest - step * rise
        canvas.rectangle((left, level, left + run, 1), shade_of(stone, -0.2 - 0.1 * (step % 2)))
        canvas.rectangle((left, level, left + run, level + depth), shade_of(stone, 0.42))
        for y in (level, level + depth):
            canvas.line([(left, y), (left + run, y)], darkest, 0.01)
        edge = left if rises_right else left + run
        canvas.line([(edge, level), (edge, level + rise + depth)], darkest, 0.014)
        # The lower edge of the tread bounds an object; upwards it may hide the next step.
        if rises_right:
            near = (left + 0.01, min(0.98, left + 0.5))
        else:
            near = (max(0.02, left + run - 0.5), left + run - 0.01)
        surfaces.append(_Surface(*near, level + 0.025, level + depth - 0.01))
    return surfaces


def _stairs_from_the_front(canvas: Canvas, stone: Colour, rng: random.Random) -> list[_Surface]:
    top, narrow = rng.uniform(0.2, 0.34), rng.uniform(0.1, 0.2)
    count = rng.choice((4, 5))
    lean = rng.uniform(-0.06, 0.06)
    surfaces = []
    height = (1.02 - top) / count
    for step in range(count):
        share = step / count
        inset = narrow * (1 - share)
        left, right = inset + lean * (1 - share), 1 - inset + lean * (1 - share)
        upper = top + step * height
        tread = upper + height * 0.42
        slant = narrow / count * 0.5
        canvas.polygon(
            [(left, upper), (right, upper), (right + slant, tread), (left - slant, tread)],
            shade_of(stone, 0.4),
        )
        canvas.rectangle(
            (left - slant, tread, right + slant, upper + height), shade_of(stone, -0.22)
        )
        canvas.line([(left - slant, tread), (right + slant, tread)], shade_of(stone, -0.5), 0.01)
        surfaces.append(_Surface(max(0.02, left), min(0.98, right), upper + 0.03, tread - 0.005))
    rail = shade_of(stone, -0.55)
    for edge, foot in ((narrow + lean, 0.0), (1 - narrow + lean, 1.0)):
        canvas.line([(edge, top - 0.16), (foot, 0.8)], rail, 0.018)
        for post in (0.0, 0.35, 0.7):
            x = edge + (foot - edge) * post
            y = top - 0.16 + (0.96 - top) * post
            canvas.line([(x, y), (x, y + 0.2)], rail, 0.012)
    return surfaces


def _rubble(side: int, tallest: float, rng: random.Random) -> tuple[Canvas, list[_Surface]]:
    haze = varied(rng.choice(((216, 206, 190), (204, 208, 210), (222, 212, 182))), rng, 10)
    canvas = Canvas(side, shade_of(haze, 0.1), shade_of(haze, -0.12))
    if rng.random() < 0.5:
        _broken_wall(canvas, shade_of(haze, -0.2), rng)
    crest = rng.uniform(0.5, 0.6)
    peak = rng.uniform(0.3, 0.7)
    base = rng.choice(((140, 136, 130), (150, 138, 122), (128, 130, 134)))
    for row in range(6):
        share = row / 5
        y = crest + (1.0 - crest) * share
        for column in range(8):
            x = (column + rng.uniform(-0.25, 0.25) + 0.5 * (row % 2)) / 7.5
            drop = 0.28 * (1 - share) * abs(x - peak)
            radius = rng.uniform(0.075, 0.11)
            _stone(canvas, x, y + drop + rng.uniform(-0.02, 0.02), radius, base, rng)
    return canvas, [_Surface(0.06, 0.94, crest + 0.2, 0.92)]


def _broken_wall(canvas: Canvas, colour: Colour, rng: random.Random) -> None:
    left = rng.choice((0.0, 0.62))
    points = [(left, 0.8)]
    height = rng.uniform(0.15, 0.3)
    for step in range(6):
        points.append((left + 0.38 * step / 5, height + rng.uniform(-0.07, 0.07)))
    canvas.polygon([*points, (left + 0.38, 0.8)], colour)


def _stone(
    canvas: Canvas, x: float, y: float, radius: float, base: Colour, rng: random.Random
) -> None:
    turn, corners = rng.uniform(0, 6), rng.randint(5, 7)
    points = []
    for corner in range(corners):
        angle = turn + 2 * math.pi * corner / corners
        length = radius * rng.uniform(0.78, 1.15)
        points.append((x + length * math.cos(angle), y + 0.78 * length * math.sin(angle)))
    colour = shade_of(varied(base, rng, 6), rng.uniform(-0.22, 0.22))
    canvas.polygon(points, colour)
    upper = [(px, py - radius * 0.05) for px, py in points if py < y]
    if len(upper) >= 2:
        canvas.polygon([*upper, (x, y)], shade_of(colour, 0.22))
    canvas.line([*points, points[0]], shade_of(colour, -0.5), 0.008)


def _shelves(side: int, tallest: float, rng: random.Random) -> tuple[Canvas, list[_Surface]]:
    wood = varied(rng.choice(((168, 122, 78), (186, 146, 98), (150, 112, 84))), rng, 12)
    back = shade_of(wood, rng.uniform(0.42, 0.58))
    canvas = Canvas(side, shade_of(back, -0.08), shade_of(back, 0.06))
    for x in [step / 5 + rng.uniform(-0.02, 0.02) for step in range(1, 5)]:
        canvas.line([(x, 0), (x, 1)], shade_of(back, -0.12), 0.006)
    needed = tallest + 0.06
    if needed < 0.34 and rng.random() < 0.5:
        boards = [0.33, 0.65, 0.965]
    elif rng.random() < 0.5:
        boards = [0.5 + rng.uniform(-0.02, 0.02), 0.965]
    else:
        boards = [rng.choice((0.36, 0.6)), 0.965]
    surfaces = []
    upper = 0.03
    for board in boards:
        canvas.rectangle((0, upper, 1, upper + 0.05), shade_of(back, -0.3), 110)
        canvas.rectangle((0, board, 1, board + 0.035), shade_of(wood, 0.1))
        canvas.rectangle((0, board + 0.035, 1, board + 0.05), shade_of(wood, -0.35))
        surfaces.append(_Surface(0.08, 0.92, board + 0.004, board + 0.012, ceiling=upper + 0.015))
        upper = board + 0.04
    canvas.rectangle((0, 0, 1, 0.028), wood)
    for x in (0.0, 0.955):
        canvas.rectangle((x, 0, x + 0.045, 1), shade_of(wood, -0.15))
        canvas.line([(x + 0.045, 0), (x + 0.045, 1)], shade_of(wood, -0.5), 0.008)
    return canvas, surfaces


_DRAW_PLACE: Mapping[str, Callable[[int, float, random.Random], tuple[Canvas, list[_Surface]]]] = {
    "sky": _sky,
    "water": _water,
    "floor": _floor,
    "stairs": _stairs,
    "rubble": _rubble,
    "shelves": _shelves,
}


def _draw_front(canvas: Canvas, scene: Scene, rng: random.Random) -> None:
    """What is nearer than the objects: stones at their feet, bubbles and water before them."""
    if scene.place == "rubble":
        for item in scene.objects:
            left, _, right, bottom = item.box
            for _ in range(3):
                x = rng.uniform(left, right)
                _stone(canvas, x, bottom + 0.03, rng.uniform(0.03, 0.045), (144, 138, 130), rng)
    elif scene.place == "water":
        canvas.rectangle((0, 0, 1, 1), (60, 160, 170), 22)
        for item in scene.objects:
            for _ in range(2):
                x = rng.uniform(item.box[0], item.box[2])
                _bubble(canvas, x, item.box[1] - rng.uniform(0.0, 0.06), rng)
