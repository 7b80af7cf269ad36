"""Synthetic scenes: what is in a picture, decided before anything is drawn, so that every question has a known answer.

A scene is a function of (split, seed, index). Scenes of the split TRAIN never hold certain pairs of colour and shape;
every scene of COMBINATIONS holds one, and TEST is like TRAIN with other numbers. Words that are read in TRAIN are never
read in the other two.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
PAINT: Mapping[str, RGB] = {
    "red": (214, 36, 36),
    "orange": (244, 138, 18),
    "yellow": (246, 222, 40),
    "green": (36, 158, 60),
    "blue": (36, 84, 216),
    "purple": (142, 48, 172),
    "black": (22, 22, 22),
    "white": (246, 246, 246),
}
COLOURS = tuple(PAINT)
SIZES = ("small", "large")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GRID = 8
BORDER = 0.1
"""No centre of a thing is nearer to the border of its cell, in cells, so that it is plain in which one it lies."""
ROWS = tuple(f"row {number}" for number in range(GRID))
COLUMNS = tuple(f"column {number}" for number in range(GRID))
FACTS = (*SHAPES, *COLOURS, *SIZES, *CHARACTERS, *ROWS, *COLUMNS)
"""What can be told of a cell of the GRID x GRID grid, in the order of `facts`: what it shows, and where it lies."""


class Split(StrEnum):
    TRAIN = "train"
    TEST = "test"
    COMBINATIONS = "combinations"


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. `x`, `y` are the centre as shares of width and height, from the top left.

    In scenes that are only looked at, a colour may be any other, as "#8a4b21", and a shape any polygon, as "blob 17",
    or its outline, as "frame 17": all without a name.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    turn: float  # degrees, anticlockwise

    @property
    def kind(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def paint(self) -> RGB:
        if self.colour in PAINT:
            return PAINT[self.colour]
        red, green, blue = bytes.fromhex(self.colour[1:])
        return red, green, blue


@dataclass(frozen=True, slots=True)
class Writing:
    """A number or a word; `x`, `y` its centre, `height` of the letters as a share of the picture's shorter side.
    `font` is any number: the fonts at hand are counted round."""

    text: str
    x: float
    y: float
    height: float
    font: int

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


@dataclass(frozen=True, slots=True)
class Scene:
    """`texture` names the background (`scenes_draw`), `noise` seeds everything random in drawing it. Scenes that are
    asked about have one writing at most."""

    things: tuple[Thing, ...]
    writings: tuple[Writing, ...]
    texture: str
    noise: int
    width: float = 1.0  # relative to the height

    @property
    def writing(self) -> Writing | None:
        return self.writings[0] if self.writings else None


def is_held_out(colour: str, shape: str) -> bool:
    """Whether this pair is never seen in training: one colour for every shape, one shape for every colour."""
    return (3 * SHAPES.index(shape) + COLOURS.index(colour)) % len(COLOURS) == 0


def generator(*key: object) -> random.Random:
    """Random numbers that belong to `key` alone, the same in every process."""
    return random.Random("/".join(map(str, key)))  # noqa: S311  nothing here is secret
