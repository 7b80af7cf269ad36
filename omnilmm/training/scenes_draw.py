"""From a scene to a picture, and to what lies in each cell of its grid.

Fonts and photographs come from packages that are installed anyway with the extra ``train`` (DejaVu and others with
matplotlib, pictures with scikit-image or scikit-learn); nothing is fetched. The same scene gives the same picture
wherever the same packages are installed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnilmm.config import ImageLimits, InputHandling
from omnilmm.image.transform import decode
from omnilmm.training.grounding import UNTOLD
from omnilmm.training.scenes import (
    BORDER,
    COLOURS,
    COLUMNS,
    FACTS,
    GRID,
    RGB,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    Writing,
    generator,
)

_GROUNDS: Sequence[RGB] = (
    (232, 226, 214),
    (205, 216, 226),
    (196, 205, 188),
    (214, 196, 204),
    (176, 180, 186),
    (140, 132, 122),
    (96, 104, 116),
    (62, 66, 60),
    (70, 58, 72),
    (252, 252, 252),
    (128, 148, 152),
)
_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneralBol.ttf",
)
_FONT_FOLDERS = ("/usr/share/fonts/truetype/dejavu",)
_PHOTOGRAPHS = (
    *("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png"),
    *("gravel.png", "grass.png", "brick.png", "china.jpg", "flower.jpg"),
)


@dataclass(frozen=True, slots=True)
class Scenery:
    """What drawing needs besides the scene: font files (None is Pillow's own) and photographs, (H, W, 3) uint8."""

    fonts: tuple[Path | None, ...] = (None,)
    photographs: tuple[np.ndarray, ...] = ()


def load_scenery() -> Scenery:
    """All fonts and photographs that are installed here."""
    folders = [Path(folder) for folder in _FONT_FOLDERS]
    if (root := _package_folder("matplotlib")) is not None:
        folders.insert(0, root / "mpl-data" / "fonts" / "ttf")
    fonts = [next((path for f in folders if (path := f / name).is_file()), None) for name in _FONTS]
    homes = [
        root / inside
        for package, inside in (("skimage", "data"), ("sklearn", "datasets/images"))
        if (root := _package_folder(package)) is not None
    ]
    photographs = [path for name in _PHOTOGRAPHS for home in homes if (path := home / name).is_file()]
    return Scenery(
        fonts=(None, *(font for font in fonts if font is not None)),
        photographs=tuple(
            np.asarray(decode(path.read_bytes(), InputHandling.SAFE, ImageLimits())) for path in photographs
        ),
    )


def _package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def draw(scene: Scene, scenery: Scenery, *, side: int) -> Image.Image:
    """The scene as an RGB picture whose longer side is `side` pixels."""
    width = side if scene.width >= 1 else round(side * scene.width)
    height = round(side / scene.width) if scene.width >= 1 else side
    rng = np.random.default_rng(scene.noise)
    image, mean = _ground(scene, scenery, rng, (width, height))
    pen = ImageDraw.Draw(image)
    rims = scene.texture in ("photo", "stripes") or rng.random() < 0.25
    for thing in scene.things:
        _draw_thing(pen, thing, (width, height), rng, has_rim=rims)
    rim = round(min(width, height) / 90) if scene.texture in ("photo", "stripes") else 0
    for writing in scene.writings:
        _write(pen, writing, scenery, mean, rim=rim)
    return image


# -- the ground -----------------------------------------------------------------------------------------


def _ground(
    scene: Scene, scenery: Scenery, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[Image.Image, np.ndarray]:
    """A background of `size` (width, height) on which everything shown stands out, and its mean colour. It is made at
    half the size: it took most of the time that drawing takes."""
    texture, width, height = scene.texture, (size[0] + 1) // 2, (size[1] + 1) // 2
    base = _ground_colour(rng, {thing.paint for thing in scene.things})
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = base
    if texture == "photo" and scenery.photographs:
        photograph = scenery.photographs[int(rng.integers(len(scenery.photographs)))]
        pixels *= 0.55
        pixels += np.float32(0.45) * _part(photograph, width, height, rng)
    elif texture == "gradient":
        other = np.clip(base + rng.uniform(-38, 38, 3), 0, 255)
        along = rng.uniform(0, 2 * math.pi)
        xs, ys = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
        share = np.clip(0.5 + 0.35 * (math.cos(along) * xs + math.sin(along) * ys), 0, 1).astype(np.float32)
        pixels += share[..., None] * (other - base).astype(np.float32)
    elif texture == "stripes":
        step = int(rng.integers(4, 15)) * max(1, height // 112)
        bands = (np.add.outer(np.arange(height) * int(rng.integers(0, 2)), np.arange(width)) // step) % 2
        pixels += (bands * rng.uniform(10, 24)).astype(np.float32)[..., None]
    if texture == "grain" or rng.random() < 0.2:
        coarse = rng.normal(0, rng.uniform(4, 16), (56, 56)).astype(np.float32)
        pixels += np.asarray(Image.fromarray(coarse).resize((width, height)))[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
    return image.resize(size, Image.Resampling.BILINEAR), pixels.reshape(-1, 3)[::7].mean(0)


def _ground_colour(rng: np.random.Generator, shown: set[RGB]) -> np.ndarray:
    """One of the quiet colours, far from all that is shown on it."""
    order = rng.permutation(len(_GROUNDS))
    distances = [min((math.dist(_GROUNDS[i], paint) for paint in shown), default=255.0) for i in order]
    chosen = next((i for i, distance in zip(order, distances, strict=True) if distance > 95), None)
    base = _GROUNDS[order[int(np.argmax(distances))] if chosen is None else chosen]
    return np.clip(np.array(base, np.float64) + rng.uniform(-8, 8, 3), 0, 255)


def _part(photograph: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of it, (height, width, 3) uint8."""
    rows, columns = photograph.shape[:2]
    share = rng.uniform(0.4, 1.0)
    part_h, part_w = int(rows * share), int(columns * share)
    top, left = int(rng.integers(rows - part_h + 1)), int(rng.integers(columns - part_w + 1))
    part = Image.fromarray(photograph[top : top + part_h, left : left + part_w])
    return np.asarray(part.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))


# -- things ---------------------------------------------------------------------------------------------


def _draw_thing(
    pen: ImageDraw.ImageDraw, thing: Thing, size: tuple[int, int], rng: np.random.Generator, *, has_rim: bool
) -> None:
    width, height = size
    x, y, radius = thing.x * width, thing.y * height, thing.radius * min(width, height)
    paint = thing.paint
    red, green, blue = np.clip(np.array(paint) + rng.integers(-14, 15, 3), 0, 255).tolist()
    fill = (red, green, blue)
    rim_width = max(1, round(min(width, height) / 150)) if has_rim else 0
    rim: RGB = (250, 250, 250) if sum(paint) < 330 else (16, 16, 16)
    if thing.shape == "ring":
        band = max(2, round(radius * 0.42))
        if rim_width:
            pen.ellipse(_box(x, y, radius + rim_width), outline=rim, width=band + 2 * rim_width)
        pen.ellipse(_box(x, y, radius), outline=fill, width=band)
    elif thing.shape == "circle":
        pen.ellipse(_box(x, y, radius), fill=fill, outline=rim if rim_width else None, width=rim_width)
    else:
        corners = _turned(_outline(thing.shape), thing.turn)
        points = [(x + radius * px, y + radius * py) for px, py in corners]
        closed = [*points, *points[:2]]  # beyond its beginning, for a joint there too
        if thing.shape.startswith("frame"):
            band = max(2, round(radius * 0.36))
            if rim_width:
                pen.line(closed, fill=rim, width=band + 2 * rim_width, joint="curve")
            pen.line(closed, fill=fill, width=band, joint="curve")
            return
        pen.polygon(points, fill=fill)
        if rim_width:
            pen.line(closed[:-1], fill=rim, width=rim_width, joint="curve")


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around the origin, (N, 2), y downwards."""
    match shape:
        case "square":
            points = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
        case "triangle":
            points = [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)]
        case "diamond":
            points = [(0.0, -1.1), (0.78, 0.0), (0.0, 1.1), (-0.78, 0.0)]
        case "cross":
            arm = 0.34
            points = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
            points += [(-px, -py) for px, py in points]
        case "star":
            angles = [math.pi * (index / 5 - 0.5) for index in range(10)]
            radii = [1.12, 0.46] * 5
            points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
        case "heart":
            ts = [2 * math.pi * index / 40 for index in range(40)]
            points = [
                (
                    math.sin(t) ** 3,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.08,
                )
                for t in ts
            ]
        case _:  # without a name
            points = _nameless_outline(shape)
    return np.array(points)


def _nameless_outline(shape: str) -> list[tuple[float, float]]:
    """As thin, and with as many corners, as those with a name are, but none of them."""
    rng = generator("outline", shape)
    if shape.startswith("frame"):
        return _around([rng.uniform(0.7, 1.0) for _ in range(rng.randint(3, 5))], rng)
    match rng.randrange(6):
        case 0 if rng.random() < 0.6:
            return _around([rng.uniform(0.5, 1.1) for _ in range(rng.randint(5, 8))], rng)
        case 0 | 1:  # four corners, but neither a square nor a diamond
            return _around([1.1, *(rng.uniform(0.35, 0.75) for _ in range(3))], rng)
        case 2 | 3:
            return _around([1.1, rng.uniform(0.3, 0.55)] * rng.choice((3, 4, 6, 7)), rng)
        case _:  # arms from the middle, for four of them aslant
            num, width = rng.choice((3, 4, 4, 4, 5, 6)), rng.uniform(0.2, 0.34)
            inner = width / math.sin(math.pi / num)
            points = []
            for index in range(num):
                along = 2 * math.pi * (index + 0.5) / num
                for distance, aside in ((1.0, -width), (1.0, width)):
                    points.append(_polar(math.hypot(distance, aside), along + math.atan2(aside, distance)))
                points.append(_polar(inner, along + math.pi / num))
            return points


def _around(lengths: list[float], rng: random.Random) -> list[tuple[float, float]]:
    """Corners at these distances, at equal angles, the first anywhere."""
    begin = rng.uniform(0, 2 * math.pi)
    return [_polar(length, begin + 2 * math.pi * index / len(lengths)) for index, length in enumerate(lengths)]


def _polar(length: float, angle: float) -> tuple[float, float]:
    return length * math.cos(angle), length * math.sin(angle)


def _turned(points: np.ndarray, degrees: float) -> list[tuple[float, float]]:
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return [(float(px), float(py)) for px, py in points @ turn]


# -- writing --------------------------------------------------------------------------------------------


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PITCH = 1.04 / GRID
"""Least distance between the middles of neighbouring characters, as a share of the picture's width."""


def _write(pen: ImageDraw.ImageDraw, writing: Writing, scenery: Scenery, ground: np.ndarray, *, rim: int) -> None:
    """Dark on a light ground or the other way round; `rim` is the width of the contour in pixels."""
    dark, light = (20, 20, 20), (245, 245, 245)
    ink, contour = (dark, light) if float(ground.mean()) > 128 else (light, dark)
    font, columns = _set(writing, pen.im.size, scenery)
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    baseline = writing.y * pen.im.size[1] - (top + bottom) / 2
    for character, x in zip(writing.text, columns, strict=True):
        pen.text((x, baseline), character, fill=ink, font=font, anchor="ms", stroke_width=rim, stroke_fill=contour)


def _set(writing: Writing, size: tuple[int, int], scenery: Scenery) -> tuple[_Font, list[float]]:
    """The font, no larger than fits a picture of this size, and the middle of every character in pixels. Narrow ones
    are set apart, so that every character has a cell of its own, and none is centred on a border between two."""
    path = scenery.fonts[writing.font % len(scenery.fonts)]
    room = 2 * min(writing.x, 1 - writing.x) * size[0] * 0.96
    height = writing.height * min(size)
    while True:
        font = ImageFont.load_default(height) if path is None else ImageFont.truetype(str(path), height)
        widths = [font.getlength(character) for character in writing.text]
        gaps = [max((a + b) / 2, PITCH * size[0]) for a, b in pairwise(widths)]
        length = widths[0] / 2 + sum(gaps) + widths[-1] / 2
        if length <= room or height < 4:
            first = writing.x * size[0] - length / 2 + widths[0] / 2
            return font, [_inside_cell(x / size[0]) * size[0] for x in accumulate(gaps, initial=first)]
        height *= 0.9


def _inside_cell(x: float) -> float:
    """The next place from here that is not too near to the border of its cell."""
    cell = math.floor(x * GRID)
    return min(max(x, (cell + BORDER) / GRID), (cell + 1 - BORDER) / GRID)


# -- what lies where ------------------------------------------------------------------------------------


def facts(scene: Scene, scenery: Scenery) -> np.ndarray:
    """(GRID * GRID, len(FACTS)) uint8, row-major: what has its centre in each cell, and the cell's own row and
    column. Which colour or shape it is where that has no name is UNTOLD."""
    table = np.zeros((GRID, GRID, len(FACTS)), np.uint8)
    for number, (row_fact, column_fact) in enumerate(zip(ROWS, COLUMNS, strict=True)):
        table[number, :, FACTS.index(row_fact)] = table[:, number, FACTS.index(column_fact)] = 1
    for thing in scene.things:
        row, column = int(thing.y * GRID), int(thing.x * GRID)
        for fact, names in ((thing.shape, SHAPES), (thing.colour, COLOURS), (thing.size, SIZES)):
            if fact in names:
                table[row, column, FACTS.index(fact)] = 1
            else:
                table[row, column, [FACTS.index(name) for name in names]] = UNTOLD
    size = (round(256 * scene.width), 256)
    for writing in scene.writings:
        for character, x in zip(writing.text, _set(writing, size, scenery)[1], strict=True):
            column = min(max(int(x / size[0] * GRID), 0), GRID - 1)
            table[int(writing.y * GRID), column, FACTS.index(character)] = 1
    return table.reshape(GRID * GRID, len(FACTS))
