"""What is so in a scene: where its things lie, by what each can be told from the others, what may be said of it."""

from __future__ import annotations

from collections.abc import Sequence

from omnilmm.training.scenes import GRID, Thing
from omnilmm.training.scenes_words import PLACES, RELATIONS

_EDGE = 0.05
"""No place is asked for that lies so close to the border of another one."""
_APART = 0.12
"""Nothing is called left of something unless it is this much further left."""


def place_of(thing: Thing) -> str | None:
    """The part of the picture its centre lies in; None close to a border."""
    cells = []
    for value in (thing.y, thing.x):
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < _EDGE:
            return None
        cells.append(int(value * 3))
    return PLACES[3 * cells[0] + cells[1]]


def relation(first: Thing, second: Thing, axis: tuple[str, str]) -> str | None:
    """On which side of the second the first lies; None where that is not plain."""
    assert {*axis} <= {*RELATIONS}
    distance = first.x - second.x if axis[0] == "left" else first.y - second.y
    return None if abs(distance) < _APART else axis[distance > 0]


def cell_of(thing: Thing, axis: tuple[str, str]) -> int:
    """In which of the GRID columns (from the left) or rows (from the top) its centre lies, from 1."""
    return min(int((thing.x if axis[0] == "left" else thing.y) * GRID), GRID - 1) + 1


def cell_names(*cells: int) -> frozenset[str]:
    """What names these cells or the next to them: a centre may lie on a border."""
    return frozenset(f"number {near}" for cell in cells for near in (cell - 1, cell, cell + 1))


def is_only(thing: Thing, things: Sequence[Thing], attribute: str) -> bool:
    """Whether no other of the things has its `attribute`; "both" are colour and shape."""
    if attribute == "both":
        return sum(other.kind == thing.kind for other in things) == 1
    return sum(getattr(other, attribute) == getattr(thing, attribute) for other in things) == 1


def way_to_name(thing: Thing, things: Sequence[Thing]) -> str:
    """The shortest way to name it among the things: by "shape", by "both" colour and shape, or not at all ("")."""
    return next((way for way in ("shape", "both") if is_only(thing, things, way)), "")


def place_names(place: str | None) -> frozenset[str]:
    """What names a place; nothing does where there is none."""
    return frozenset(f"place {word}" for word in (place or "").split())


def kind_names(thing: Thing) -> frozenset[str]:
    """What names it by its colour and shape."""
    return frozenset({f"shape {thing.shape}", f"colour {thing.colour}"})


def truth(thing: Thing) -> frozenset[str]:
    """Everything that may be said of it, but for the cell it lies in."""
    return place_names(place_of(thing)) | kind_names(thing) | {f"size {thing.size}"}
