"""Captured batches of the image encoder on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from omnilmm.config import EncoderConfig, InputHandling
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.encoder.graphs import EncodeGraphs
from omnilmm.errors import OmniError
from omnilmm.messages import Embedding, PixelIdentity, PreparedImage
from omnilmm.models.config import read_model_config
from omnilmm.models.vision import ImageEncoder
from omnilmm.models.weights import load_encoder

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["omnilmm-12b-tiny", "minicpm-v-tiny"])
def folder(request, data):
    return data / request.param


def load(folder, device: str) -> ImageEncoder:
    return load_encoder(folder, read_model_config(folder), dtype="float32", device=device)


@pytest.mark.parametrize("num_pictures", [1, 2, 3, 8, 13, 16])
def test_a_replayed_batch_is_the_batch(folder, num_pictures):
    tower = load(folder, "cuda")
    side = read_model_config(folder).image_policy(InputHandling.SAFE).side
    graphs = EncodeGraphs(tower, max_batch=16, side=side)
    pixels = torch.randn(num_pictures, 3, side, side, device="cuda")
    for _ in range(2):
        assert_close(graphs.run(pixels), tower(pixels), atol=1e-4, rtol=1e-4)


def vectors(embedding: Embedding | OmniError) -> torch.Tensor:
    assert isinstance(embedding, Embedding)
    return torch.frombuffer(bytearray(embedding.data), dtype=torch.float32).view(embedding.shape)


@pytest.mark.parametrize("cuda_graphs", [None, False])
def test_vectors_are_those_of_the_cpu(folder, cuda_graphs):
    policy = read_model_config(folder).image_policy(InputHandling.SAFE)
    squares = [bytes([value, 255 - value, 7]) * policy.side**2 for value in (0, 90, 200)]
    pictures = [PreparedImage(PixelIdentity(b"", policy.side, policy.side), policy.side, square) for square in squares]
    there = VisionEncoder(load(folder, "cuda"), policy, EncoderConfig(cuda_graphs=cuda_graphs))
    assert (there._graphs is None) is (cuda_graphs is False)
    here = VisionEncoder(load(folder, "cpu"), policy)
    for one, other in zip(there.encode(pictures), here.encode(pictures), strict=True):
        # Convolutions take TF32 by default: 10 bits of mantissa, in the first layer only.
        assert_close(vectors(one), vectors(other), atol=2e-2, rtol=2e-2)
