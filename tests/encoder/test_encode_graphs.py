"""Batches that stay in place, computed as they are instead of captured."""

from __future__ import annotations

import pytest
import torch

from omnilmm.config import EncoderConfig, ImagePolicy
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.encoder.graphs import EncodeGraphs
from omnilmm.errors import ConfigError, OmniError
from omnilmm.messages import PixelIdentity, PreparedImage
from omnilmm.models.config import ResamplerConfig, VisionConfig, VisionStyle
from omnilmm.models.vision import ImageEncoder

SIDE = 28


@pytest.fixture(scope="module")
def tower() -> ImageEncoder:
    vision = VisionConfig(VisionStyle.EVA, 16, 2, 2, 24, 14, 28, SIDE)
    encoder = ImageEncoder(vision, ResamplerConfig(4, 128, 16))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    encoder.derive_tables()
    return encoder.requires_grad_(False).eval()


def make_graphs(tower: ImageEncoder, max_batch: int, sizes: list[int] | None = None) -> EncodeGraphs:
    def record(compute):
        def step():
            vectors = compute()
            if sizes is not None:
                sizes.append(len(vectors))
            return vectors

        return step

    return EncodeGraphs(tower, max_batch=max_batch, side=SIDE, record=record)


@pytest.mark.parametrize("num_pictures", [1, 2, 3, 5, 8, 11, 16])
def test_a_padded_batch_is_the_batch(tower, num_pictures):
    sizes: list[int] = []
    graphs = make_graphs(tower, 16, sizes)
    pixels = torch.randn(num_pictures, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(num_pictures))
    with torch.inference_mode():
        graphs.run(torch.full((16, 3, SIDE, SIDE), torch.nan))  # what padding finds there
        vectors = graphs.run(pixels)
        torch.testing.assert_close(vectors, tower(pixels), atol=1e-5, rtol=0)
    assert sizes[-1] == next(size for size in (1, 2, 4, 8, 16) if size >= num_pictures)


def test_no_larger_size_than_batches_get(tower):
    assert [make_graphs(tower, 6).can_run(n) for n in (1, 8, 9)] == [True, True, False]
    assert [make_graphs(tower, 100).can_run(n) for n in (16, 17)] == [True, False]


def picture(value: int) -> PreparedImage:
    return PreparedImage(PixelIdentity(bytes([value]) * 32, SIDE, SIDE), SIDE, bytes([value]) * (3 * SIDE * SIDE))


def test_an_encoder_takes_small_batches_through_them_and_large_ones_as_ever(tower):
    policy = ImagePolicy(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pictures = [picture(value) for value in (10, 70, 130, 190, 250)]
    plain = VisionEncoder(tower, policy)
    encoder = VisionEncoder(tower, policy)
    sizes: list[int] = []
    encoder._graphs = make_graphs(tower, 4, sizes)
    for chosen in (pictures[:3], pictures):
        for one, other in zip(encoder.encode(chosen), plain.encode(chosen), strict=True):
            assert not isinstance(one, OmniError)
            assert not isinstance(other, OmniError)
            left, right = (torch.frombuffer(bytearray(e.data), dtype=torch.float32) for e in (one, other))
            torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    assert sizes == [4]


def test_on_cpu_there_are_none_and_asking_for_them_is_refused(tower):
    policy = ImagePolicy(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert VisionEncoder(tower, policy, EncoderConfig(cuda_graphs=False))._graphs is None
    assert VisionEncoder(tower, policy)._graphs is None
    with pytest.raises(ConfigError, match="cuda_graphs is made for CUDA"):
        VisionEncoder(tower, policy, EncoderConfig(cuda_graphs=True))
