"""Scenes are decided by their number alone, keep to their split, and fit their frame."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from omnilmm.training.scenes import COLOURS, GRID, PAINT, SHAPES, Scene, Split, is_held_out
from omnilmm.training.scenes_make import (
    MAX_COUNT,
    TONE_APART,
    WORDS,
    is_word_held_out,
    make_full_scene,
    make_scene,
)

SCENES = {split: [make_scene(split, 5, index) for index in range(400)] for split in Split}


def test_a_scene_is_decided_by_its_number() -> None:
    assert make_scene(Split.TEST, 1, 2) == make_scene(Split.TEST, 1, 2)
    others = [make_scene(Split.TEST, 1, 3), make_scene(Split.TEST, 2, 2), make_scene(Split.TRAIN, 1, 2)]
    assert make_scene(Split.TEST, 1, 2) not in others


def test_every_shape_and_every_colour_has_one_pair_that_is_held_out() -> None:
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if is_held_out(colour, shape)]
    assert len(pairs) == len(SHAPES)
    assert {shape for _, shape in pairs} == {*SHAPES}
    assert {colour for colour, _ in pairs} == {*COLOURS}


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
def test_held_out_pairs_are_not_met(split: Split) -> None:
    assert not any(is_held_out(thing.colour, thing.shape) for scene in SCENES[split] for thing in scene.things)


def test_unseen_combinations_have_one_in_every_scene() -> None:
    for scene in SCENES[Split.COMBINATIONS]:
        assert any(is_held_out(thing.colour, thing.shape) for thing in scene.things)


def test_words_of_an_exam_were_never_read_in_training() -> None:
    def words(split: Split) -> set[str]:
        return {s.writing.text for s in SCENES[split] if s.writing is not None and not s.writing.is_number}

    real = {*WORDS.split()}
    assert words(Split.TRAIN) - real  # any letters
    assert not any(is_word_held_out(word) for word in words(Split.TRAIN) & real)
    assert words(Split.TEST)
    assert words(Split.TEST) <= {word for word in real if is_word_held_out(word)}
    assert 15 <= sum(map(is_word_held_out, real)) <= 40
    assert max(map(len, real)) <= 5


def rim(scene: Scene) -> float:
    return min(scene.width, 1.0)


@pytest.mark.parametrize("split", Split)
def test_things_lie_inside_and_apart(split: Split) -> None:
    for scene in SCENES[split]:
        assert len(scene.things) <= MAX_COUNT
        for index, thing in enumerate(scene.things):
            radius = thing.radius * rim(scene)
            assert radius / scene.width <= thing.x <= 1 - radius / scene.width
            assert radius <= thing.y <= 1 - radius
            for other in scene.things[:index]:
                distance = math.hypot((thing.x - other.x) * scene.width, thing.y - other.y)
                assert distance > (thing.radius + other.radius) * rim(scene)
                assert (int(thing.x * GRID), int(thing.y * GRID)) != (int(other.x * GRID), int(other.y * GRID))


def test_all_counts_textures_and_kinds_occur() -> None:
    scenes = SCENES[Split.TRAIN]
    assert {len(scene.things) for scene in scenes} == {*range(MAX_COUNT + 1)}
    assert {scene.texture for scene in scenes} == {"plain", "gradient", "grain", "stripes", "photo"}
    seen = Counter(thing.kind for scene in scenes for thing in scene.things)
    assert len(seen) == len(SHAPES) * len(COLOURS) - len(SHAPES)
    assert sum(scene.writing is not None and scene.writing.is_number for scene in scenes) > 20


def test_the_lowest_level_is_one_thing_on_plain_ground() -> None:
    for index in range(30):
        scene = make_scene(Split.TRAIN, 0, index, level=0.0)
        assert (len(scene.things), scene.writing, scene.texture) == (1, None, "plain")


def test_full_scenes_show_much_and_no_pair_that_is_held_out() -> None:
    scenes = [make_full_scene(3, index) for index in range(200)]
    assert scenes[7] == make_full_scene(3, 7)
    assert all(len(scene.things) >= 3 or len(scene.writings) >= 2 for scene in scenes)
    things = [thing for scene in scenes for thing in scene.things]
    named = [thing for thing in things if thing.shape in SHAPES and thing.colour in COLOURS]
    assert not any(is_held_out(thing.colour, thing.shape) for thing in named)
    assert any(scene.things for scene in scenes)
    assert any(scene.writings for scene in scenes)


def test_full_scenes_show_colours_and_shapes_without_a_name() -> None:
    things = [thing for index in range(200) for thing in make_full_scene(3, index).things]
    toned = [thing for thing in things if thing.colour not in COLOURS]
    blobs = [thing for thing in things if thing.shape not in SHAPES]
    assert 0.25 < len(toned) / len(things) < 0.45
    assert 0.25 < len(blobs) / len(things) < 0.45
    assert all(thing.shape in SHAPES for thing in toned)
    assert all(thing.colour in COLOURS for thing in blobs)
    for thing in toned:
        hidden = next(colour for colour in COLOURS if is_held_out(colour, thing.shape))
        assert math.dist(thing.paint, PAINT[hidden]) >= TONE_APART
    assert 0.2 < sum(thing.shape.startswith("frame") for thing in blobs) / len(blobs) < 0.4


def is_clear_of_borders(scene: Scene) -> bool:
    places = [place for thing in scene.things for place in (thing.x, thing.y)]
    return all(0.09 < place * GRID % 1 < 0.91 for place in places)


@pytest.mark.parametrize("split", Split)
def test_no_writing_stands_on_a_border_between_cells(split: Split) -> None:
    assert all(0.09 < writing.y * GRID % 1 < 0.91 for scene in SCENES[split] for writing in scene.writings)


def test_exams_ask_about_nothing_on_a_border_between_cells_but_it_is_seen_in_training() -> None:
    assert all(is_clear_of_borders(scene) for split in (Split.TEST, Split.COMBINATIONS) for scene in SCENES[split])
    share = sum(map(is_clear_of_borders, SCENES[Split.TRAIN])) / len(SCENES[Split.TRAIN])
    assert 0.5 < share < 0.8
