"""Pictures show what the scene says, where it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from omnilmm.training.grounding import UNTOLD
from omnilmm.training.scenes import (
    COLOURS,
    COLUMNS,
    FACTS,
    GRID,
    PAINT,
    ROWS,
    SHAPES,
    Scene,
    Split,
    Thing,
    Writing,
)
from omnilmm.training.scenes_draw import Scenery, draw, facts, load_scenery
from omnilmm.training.scenes_make import make_scene


def scene_with(*things: Thing, writing: Writing | None = None, texture: str = "plain", width: float = 1.0) -> Scene:
    return Scene(things, () if writing is None else (writing,), texture, noise=7, width=width)


def thing(shape: str, colour: str = "red", x: float = 0.3, y: float = 0.6) -> Thing:
    return Thing(shape, colour, "large", x, y, 0.14, 5.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1.0, 4 / 3, 0.75])
def test_a_thing_has_its_colour_at_its_place(shape: str, width: float, bare_scenery: Scenery) -> None:
    image = draw(scene_with(thing(shape), width=width), bare_scenery, side=300)
    assert max(image.size) == 300
    assert image.width / image.height == pytest.approx(width, rel=0.01)
    x, y = 0.3 * image.width, 0.6 * image.height
    offset = 0.14 * min(image.size) * 0.8 if shape == "ring" else 0
    assert math.dist(image.getpixel((round(x + offset), round(y))), PAINT["red"]) < 60
    pixels = np.asarray(image, float)
    painted = np.linalg.norm(pixels - np.array(PAINT["red"]), axis=-1) < 60
    rows, columns = np.nonzero(painted)
    assert np.hypot(columns - x, rows - y).max() < 0.14 * min(image.size) * 1.3
    assert painted.mean() > 0.01


def test_a_ring_is_hollow(bare_scenery: Scenery) -> None:
    image = draw(scene_with(thing("ring")), bare_scenery, side=300)
    assert math.dist(image.getpixel((90, 180)), PAINT["red"]) > 95


def test_shapes_look_different(bare_scenery: Scenery) -> None:
    pictures = [np.asarray(draw(scene_with(thing(shape)), bare_scenery, side=200), float) for shape in SHAPES]
    for index, first in enumerate(pictures):
        for second in pictures[:index]:
            assert np.abs(first - second).mean() > 0.15


@pytest.mark.parametrize("split", Split)
def test_everything_stands_out_from_its_ground(split: Split, bare_scenery: Scenery) -> None:
    for index in range(25):
        scene = make_scene(split, 2, index)
        empty = replace(scene, things=(), writings=())
        assert draw(scene, bare_scenery, side=120).size == draw(empty, bare_scenery, side=120).size
        pixels = np.asarray(draw(scene, bare_scenery, side=224), float)
        corner = np.median(pixels[:6, :6].reshape(-1, 3), axis=0)
        if scene.texture == "plain" and not any(t.x < 0.15 and t.y < 0.15 for t in scene.things):
            assert all(math.dist(corner, PAINT[t.colour]) > 50 for t in scene.things)


def test_the_same_scene_gives_the_same_picture(bare_scenery: Scenery) -> None:
    for index in range(8):
        scene = make_scene(Split.TRAIN, 0, index)
        first, second = (draw(scene, bare_scenery, side=96) for _ in range(2))
        assert first.tobytes() == second.tobytes()


def test_fonts_and_photographs_of_this_machine_are_used() -> None:
    scenery = load_scenery()
    assert scenery.fonts[0] is None
    text = Writing("R2D", 0.5, 0.5, 0.25, 0)
    drawn = {
        draw(scene_with(writing=replace(text, font=font)), scenery, side=160).tobytes()
        for font in range(len(scenery.fonts))
    }
    assert len(drawn) == len(scenery.fonts)
    photo = Scenery(photographs=(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8),))
    plain, pictured = (np.asarray(draw(scene_with(texture="photo"), s, side=96), float) for s in (Scenery(), photo))
    assert pictured.std() > 3 * plain.std()


def test_long_writing_is_made_to_fit(bare_scenery: Scenery) -> None:
    wide = scene_with(writing=Writing("WWWWW", 0.4, 0.5, 0.27, 0))
    pixels = np.asarray(draw(wide, bare_scenery, side=200), float)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    inked = np.linalg.norm(pixels - ground, axis=-1) > 60
    assert inked.mean() > 0.02
    assert not inked[:, 0].any()
    assert not inked[:, -1].any()


NUM_SHOWN = len(FACTS) - len(ROWS) - len(COLUMNS)  # the facts of what is to be seen come first


def test_facts_tell_what_has_its_centre_in_a_cell(bare_scenery: Scenery) -> None:
    scene = scene_with(thing("star", "blue", 0.3, 0.6), thing("heart", "black", 0.9, 0.1))
    table = facts(scene, bare_scenery).reshape(GRID, GRID, len(FACTS))
    shown = table[..., :NUM_SHOWN] == 1
    assert {FACTS[i] for i in np.flatnonzero(shown[4, 2])} == {"star", "blue", "large"}
    assert {FACTS[i] for i in np.flatnonzero(shown[0, 7])} == {"heart", "black", "large"}
    assert shown.sum() == 6


def test_what_has_no_name_is_shown_and_not_told(bare_scenery: Scenery) -> None:
    scene = scene_with(thing("star", "#28a0c8", 0.3, 0.6), thing("blob 9", "black", 0.9, 0.2))
    table = facts(scene, bare_scenery).reshape(GRID, GRID, len(FACTS))
    of_star, of_blob = (dict(zip(FACTS, table[cell].tolist(), strict=True)) for cell in ((4, 2), (1, 7)))
    assert of_star["star"] == of_blob["black"] == of_blob["large"] == 1
    assert {of_star[shape] for shape in SHAPES} == {of_blob[colour] for colour in COLOURS} == {0, 1}
    assert {of_star[colour] for colour in COLOURS} == {of_blob[shape] for shape in SHAPES} == {UNTOLD}
    image = draw(scene, bare_scenery, side=200)
    assert math.dist(image.getpixel((60, 120)), (0x28, 0xA0, 0xC8)) < 60
    assert math.dist(image.getpixel((180, 40)), PAINT["black"]) < 60


@pytest.mark.parametrize("kind", ["blob", "frame"])
def test_outlines_without_a_name_are_of_many_kinds_and_as_large_as_the_others(kind: str, bare_scenery: Scenery) -> None:
    inks = set()
    for number in range(24):
        image = draw(scene_with(thing(f"{kind} {number}", "red", 0.5, 0.5)), bare_scenery, side=100)
        red = np.linalg.norm(np.asarray(image, float) - PAINT["red"], axis=-1) < 60
        rows, columns = np.nonzero(red)
        assert 30 <= len(rows) <= 900
        assert max(np.ptp(rows), np.ptp(columns)) <= 2 * 1.2 * 14
        assert abs(rows.mean() - 50) < 8
        assert abs(columns.mean() - 50) < 8
        inks.add(len(rows))
    assert len(inks) > 12


def test_facts_tell_of_every_cell_where_it_lies(bare_scenery: Scenery) -> None:
    table = facts(scene_with(), bare_scenery).reshape(GRID, GRID, len(FACTS))
    for row in range(GRID):
        for column in range(GRID):
            told = [FACTS[i] for i in np.flatnonzero(table[row, column])]
            assert told == [f"row {row}", f"column {column}"]


def test_letters_are_told_from_left_to_right(bare_scenery: Scenery) -> None:
    scene = scene_with(writing=Writing("472", 0.5, 0.5, 0.25, 0))
    table = facts(scene, bare_scenery).reshape(GRID, GRID, len(FACTS))
    rows, columns, kinds = np.nonzero(table[..., :NUM_SHOWN])
    assert {*rows.tolist()} == {4}
    assert [FACTS[kind] for kind in kinds[np.argsort(columns)]] == ["4", "7", "2"]


def test_narrow_letters_have_cells_of_their_own(bare_scenery: Scenery) -> None:
    for x in (0.4, 0.43, 0.5, 0.58):
        table = facts(scene_with(writing=Writing("ILIJI", x, 0.5, 0.2, 0)), bare_scenery)
        columns = np.nonzero(table.reshape(GRID, GRID, len(FACTS))[..., :NUM_SHOWN])[1]
        assert len({*columns.tolist()}) == 5
