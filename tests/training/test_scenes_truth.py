"""Where things lie, how they are told apart, and what may be said of them."""

from __future__ import annotations

import pytest

from omnilmm.training.scenes import Thing
from omnilmm.training.scenes_truth import cell_of, is_only, place_names, place_of, relation, truth, way_to_name


def thing(x: float, y: float) -> Thing:
    return Thing("circle", "red", "small", x, y, 0.06, 0.0)


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [(0.1, 0.1, "top left"), (0.5, 0.5, "centre"), (0.9, 0.5, "right"), (0.5, 0.9, "bottom"), (0.35, 0.5, None)],
)
def test_places(x: float, y: float, place: str | None) -> None:
    assert place_of(thing(x, y)) == place


def test_relations() -> None:
    assert relation(thing(0.1, 0.5), thing(0.5, 0.5), ("left", "right")) == "left"
    assert relation(thing(0.5, 0.9), thing(0.5, 0.5), ("above", "below")) == "below"
    assert relation(thing(0.5, 0.5), thing(0.55, 0.1), ("left", "right")) is None


def named(shape: str, colour: str) -> Thing:
    return Thing(shape, colour, "large", 0.1, 0.1, 0.06, 0.0)


def test_a_thing_is_named_by_as_little_as_tells_it_apart() -> None:
    circle, square = named("circle", "red"), named("square", "red")
    other = named("square", "blue")
    assert way_to_name(circle, [circle, square, other]) == "shape"
    assert way_to_name(square, [circle, square, other]) == "both"
    assert way_to_name(square, [square, named("square", "red")]) == ""
    assert is_only(other, [circle, square, other], "colour")
    assert not is_only(square, [circle, square, other], "colour")


def test_what_may_be_said_of_a_thing() -> None:
    assert truth(thing(0.1, 0.1)) == {"shape circle", "colour red", "size small", "place top", "place left"}
    assert truth(thing(0.35, 0.5)) == {"shape circle", "colour red", "size small"}, "it lies on a border"
    assert place_names("top left") == {"place top", "place left"}
    assert place_names(None) == frozenset()


def test_cells_are_counted_from_the_left_and_from_the_top() -> None:
    for value, cell in ((0.0, 1), (0.124, 1), (0.126, 2), (0.99, 8), (1.0, 8)):
        assert cell_of(thing(value, 0.5), ("left", "right")) == cell
        assert cell_of(thing(0.5, value), ("above", "below")) == cell
