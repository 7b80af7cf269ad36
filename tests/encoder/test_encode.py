"""The vision pool's core over a small tower: each picture's vectors are its own, and a bad one harms nobody else."""

import pytest
import torch

from omnilmm.config import ImagePolicy
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.errors import OmniError
from omnilmm.messages import PixelIdentity, PreparedImage

SIDE = 4
POLICY = ImagePolicy(SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
POISON = 200


class SmallTower(torch.nn.Module):
    """Two queries of width 3: the mean of each channel, and its double. Not a number for a picture of POISON."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, pixels):
        means = pixels.mean(dim=(2, 3))  # (B, 3)
        means = means.masked_fill(means == POISON / 255, float("nan"))
        return means[:, None, :] * self.scale[:, None]  # (B, 2, 3)


def picture(value):
    return PreparedImage(PixelIdentity(bytes([value]) * 32, SIDE, SIDE), SIDE, bytes([value]) * (3 * SIDE * SIDE))


@pytest.fixture
def encoder():
    return VisionEncoder(SmallTower(), POLICY)


def test_vectors_come_in_the_order_of_the_pictures_and_in_the_models_dtype(encoder):
    first, second = encoder.encode([picture(51), picture(102)])
    assert (first.dtype, first.shape) == ("float32", (2, 3))
    values = torch.frombuffer(bytearray(second.data), dtype=torch.float32).view(2, 3)
    assert values[:, 0].tolist() == pytest.approx([0.4, 0.8])
    assert first.data != second.data


def test_a_picture_that_makes_no_numbers_fails_alone(encoder):
    alone = [encoder.encode([picture(value)])[0] for value in (51, 102)]
    before, failed, after = encoder.encode([picture(51), picture(POISON), picture(102)])
    assert isinstance(failed, OmniError)
    assert [before, after] == alone
