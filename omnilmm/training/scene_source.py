"""Rows from scenes: a picture made on the spot, with several conversations about it as one tree of tokens."""

from __future__ import annotations

import numpy as np

from omnilmm.cache.memory import MemoryTier
from omnilmm.errors import ConfigError
from omnilmm.image.transform import squash
from omnilmm.messages import Conversation, ImagePart, TextPart, Turn
from omnilmm.training.config import ScenesConfig
from omnilmm.training.rows import Row, make_row
from omnilmm.training.scenes import FACTS, GRID, Split, generator
from omnilmm.training.scenes_ask import Talk, ask
from omnilmm.training.scenes_draw import Scenery, draw, facts
from omnilmm.training.scenes_make import make_full_scene, make_scene
from omnilmm.training.sequences import Sequence, SequenceMaker

SIDES = (140, 168, 196, 224)
"""Longer sides, in pixels, that pictures are drawn with before they are brought to the tower's square."""

_SEQUENCE_CACHE_BYTES = 256 << 20


class SceneSource:
    """Scenes of the split TRAIN without end. Row n shows scene n and nothing else decides it but the step.

    While the encoder learns by sight alone, four rows in five are scenes full of things or letters. One row in four
    goes on to be one after that: only there does the encoder meet colours and shapes without a name.

    Args:
        maker: of the model that learns.
        side: its pictures' side in pixels.
        num_image_tokens: facts are told only where every cell of the grid has a vector of its own.
    """

    num_rows: int | None = None

    def __init__(
        self, settings: ScenesConfig, *, maker: SequenceMaker, side: int, num_image_tokens: int, scenery: Scenery
    ) -> None:
        self._settings, self._maker, self._side, self._scenery = settings, maker, side, scenery
        self.num_facts = len(FACTS) if settings.grounding and num_image_tokens == GRID**2 else 0
        if settings.sight and not self.num_facts:
            raise ConfigError(f"To learn by sight a model needs {GRID**2} vectors a picture.", param="scenes.sight")
        self._encoded: MemoryTier[tuple[Sequence, ...]] = MemoryTier(_SEQUENCE_CACHE_BYTES)

    def row(self, index: int, step: int) -> Row:
        settings = self._settings
        grown = step - settings.sight
        talks: tuple[Talk, ...] = ()
        if index % 5 if grown < 0 else settings.sight and index % 4 == 0:
            scene = make_full_scene(settings.seed, index)
        else:
            level = round(grown / settings.ramp, 2) if 0 <= grown < settings.ramp else 1.0
            scene = make_scene(Split.TRAIN, settings.seed, index, level=level)
            if grown >= 0:
                talks = ask(scene, Split.TRAIN, settings.seed, index, num=settings.conversations)
        picture = draw(scene, self._scenery, side=generator("side", settings.seed, index).choice(SIDES))
        square = np.frombuffer(squash(picture, self._side), np.uint8).reshape(self._side, self._side, 3)
        return make_row(
            [sequence for talk in talks for sequence in self._sequences(talk)],
            [square],
            facts=facts(scene, self._scenery)[None] if self.num_facts else None,
        )

    def _sequences(self, talk: Talk) -> tuple[Sequence, ...]:
        """The same words come again and again: a few ten thousand conversations are all there are."""
        key = "\0".join(f"{exchange.question}\0{exchange.answer}" for exchange in talk)
        known = self._encoded.get(key)
        if known is None:
            known = self._maker.sequences(conversation(talk))
            self._encoded.put(key, known, 40 * sum(len(sequence.ids) for sequence in known))
        return known


def conversation(talk: Talk) -> Conversation:
    """The talk with the picture in front of its first question."""
    turns: list[Turn] = []
    for number, exchange in enumerate(talk):
        picture = (ImagePart(b"", "picture"),) if number == 0 else ()
        turns.append(Turn("user", (*picture, TextPart(exchange.question))))
        turns.append(Turn("assistant", (TextPart(exchange.answer),)))
    return Conversation(tuple(turns))
