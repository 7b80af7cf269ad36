from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from omnilmm.cache.encoding import Encoding
from omnilmm.cache.gate import is_fit, rehearsal_pictures
from omnilmm.errors import OmniError
from omnilmm.messages import Embedding

EVEN = Embedding("float32", (2, 64), struct.pack("<128f", *(math.sin(i) for i in range(128))))
SPIKED = Embedding("float32", (2, 64), struct.pack("<128f", *(1e4 if i == 5 else math.sin(i) for i in range(128))))


@pytest.mark.parametrize("side", [1, 2, 70, 448])
def test_the_pictures_fit_the_tower_and_differ(side: int) -> None:
    pictures = rehearsal_pictures(side)
    assert all(len(picture.square) == 3 * side * side and picture.side == side for picture in pictures)
    if side > 16:
        assert len({picture.square for picture in pictures}) == len(pictures) == 5
        spread = [np.frombuffer(picture.square, np.uint8).std() for picture in pictures]
        assert spread[0] == 0
        assert min(spread[1:]) > 20
    assert rehearsal_pictures(side) == pictures  # the same at every start


def test_one_picture_that_does_not_fit_is_one_too_many() -> None:
    assert is_fit(Encoding.INT8, [EVEN, EVEN])
    assert not is_fit(Encoding.INT8, [EVEN, SPIKED])
    assert is_fit(Encoding.FP8, [EVEN, SPIKED])
    assert is_fit(Encoding.EXACT, [EVEN, SPIKED])


def test_an_encoder_that_fails_on_one_fits_nothing_lossy() -> None:
    assert not is_fit(Encoding.FP8, [EVEN, OmniError("not finite")])
