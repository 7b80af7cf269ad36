"""Whether a deployed encoder's vectors bear a lossy encoding: asked once at start, on pictures made up here.

`cache/codec` asks it again of every picture it stores. This first answer is for the operator, who learns at start and
not from the metrics of the first busy hour, and spares the attempts that would fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omnilmm.cache.encoding import Encoding, try_pack
from omnilmm.messages import Embedding, PixelIdentity, PreparedImage


def rehearsal_pictures(side: int) -> list[PreparedImage]:
    """Five squares of `side` pixels as unlike each other as can be drawn without a photograph: nothing at all, slow
    and fast changes, sharp edges, and noise."""
    across = np.arange(side)  # (side,)
    down = across[:, None]  # (side, 1)
    ramp = np.broadcast_to(across * 255 // max(side - 1, 1), (side, side))
    waves = 127.5 * (1 + np.sin(across / 7.0) * np.sin(down / 11.0))
    board = (across // 16 + down // 16) % 2 * 255
    noise = np.random.default_rng(20240501).integers(0, 256, (side, side, 3))
    white = np.full((side, side), 255)
    return [
        _picture(side, white, white, white),
        _picture(side, ramp, ramp.T, 255 - ramp),
        _picture(side, waves, waves.T, 255 - waves),
        _picture(side, board, board, board),
        _picture(side, *(noise[:, :, channel] for channel in range(3))),
    ]


def is_fit(encoding: Encoding, embeddings: Sequence[object]) -> bool:
    """Whether every one is an Embedding, and one that `encoding` keeps close enough."""
    if encoding is Encoding.EXACT:
        return True
    return all(isinstance(each, Embedding) and try_pack(each, encoding) is not None for each in embeddings)


def _picture(side: int, *channels: NDArray[Any]) -> PreparedImage:
    square = np.stack(channels, axis=-1).astype(np.uint8)  # (side, side, 3)
    return PreparedImage(PixelIdentity(bytes(32), side, side), side, square.tobytes())
