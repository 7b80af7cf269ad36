"""Rows of scenes: the picture, the questions and the facts belong together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omnilmm.errors import ConfigError
from omnilmm.image.transform import squash
from omnilmm.training.config import ScenesConfig
from omnilmm.training.scene_source import SIDES, SceneSource
from omnilmm.training.scenes import FACTS, GRID, Split, generator
from omnilmm.training.scenes_draw import Scenery, draw, facts
from omnilmm.training.scenes_make import make_scene
from omnilmm.training.sequences import SequenceMaker

SETTINGS = ScenesConfig(seed=4, conversations=3, ramp=20)


def source(maker: SequenceMaker, scenery: Scenery, settings: ScenesConfig = SETTINGS, tokens: int = 64) -> SceneSource:
    return SceneSource(settings, maker=maker, side=32, num_image_tokens=tokens, scenery=scenery)


def test_a_row_is_decided_by_its_number(maker: SequenceMaker, bare_scenery: Scenery) -> None:
    first, second = (source(maker, bare_scenery).row(7, 50) for _ in range(2))
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.pictures[0], second.pictures[0])
    other = source(maker, bare_scenery, replace(SETTINGS, seed=5)).row(7, 50)
    assert not np.array_equal(first.pictures[0], other.pictures[0])


def test_the_picture_and_the_facts_are_of_one_scene(maker: SequenceMaker, bare_scenery: Scenery) -> None:
    rows = source(maker, bare_scenery)
    for index in range(5):
        row, scene = rows.row(index, 50), make_scene(Split.TRAIN, 4, index)
        side = generator("side", 4, index).choice(SIDES)
        assert row.pictures[0].tobytes() == squash(draw(scene, bare_scenery, side=side), 32)
        assert row.facts is not None
        assert np.array_equal(row.facts[0], facts(scene, bare_scenery))


def test_scenes_grow_along_the_ramp(maker: SequenceMaker, bare_scenery: Scenery) -> None:
    rows = source(maker, bare_scenery)

    def things(step: int) -> list[int]:
        told = (rows.row(index, step).facts for index in range(20))
        return [int(table[0, :, :8].sum()) for table in told if table is not None]

    assert {*things(0)} == {1}
    assert max(things(10)) > 1
    assert max(things(20)) > 4


def test_by_sight_nothing_is_asked(maker: SequenceMaker, bare_scenery: Scenery) -> None:
    rows = source(maker, bare_scenery, replace(SETTINGS, sight=5))
    looking, asked = rows.row(3, 4), rows.row(3, 5)
    assert (len(looking), len(looking.target_ids), len(looking.pictures)) == (0, 0, 1)
    assert len(asked.target_ids) > 0


def test_by_sight_there_is_more_to_see(maker: SequenceMaker, bare_scenery: Scenery) -> None:
    rows = source(maker, bare_scenery, replace(SETTINGS, sight=5))

    def told(step: int) -> int:
        return sum(
            int(table[..., : -2 * GRID].sum()) for n in range(20) if (table := rows.row(n, step).facts) is not None
        )

    assert told(0) > 1.5 * told(50)


def test_without_a_vector_for_every_cell_there_are_no_facts(maker: SequenceMaker, bare_scenery: Scenery) -> None:
    assert source(maker, bare_scenery).num_facts == len(FACTS)
    few = source(maker, bare_scenery, tokens=16)
    assert few.num_facts == 0
    assert few.row(0, 50).facts is None
    assert source(maker, bare_scenery, replace(SETTINGS, grounding=0.0)).num_facts == 0
    with pytest.raises(ConfigError):
        source(maker, bare_scenery, replace(SETTINGS, sight=5), tokens=16)
