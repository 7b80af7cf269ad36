"""One byte a number, against torch's own conversions as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilmm.cache.encoding import MIN_COSINE, Encoding, is_close, min_cosine, packed_bytes, try_pack, unpack
from omnilmm.messages import Embedding

LOSSY = (Encoding.INT8, Encoding.FP8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def record(vectors: torch.Tensor) -> Embedding:
    rows, columns = vectors.shape
    data = vectors.contiguous().view(torch.uint8).numpy().tobytes()
    return Embedding(str(vectors.dtype).removeprefix("torch."), (rows, columns), data)


def tensor(embedding: Embedding) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(embedding.data), dtype=DTYPES[embedding.dtype])
    return flat.reshape(embedding.shape)


def there_and_back(vectors: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    embedding = record(vectors)
    packed = try_pack(embedding, encoding)
    assert packed is not None
    assert len(packed) == packed_bytes(*embedding.shape)
    return tensor(Embedding(embedding.dtype, embedding.shape, unpack(packed, encoding, *_kind(embedding))))


def _kind(embedding: Embedding) -> tuple[str, tuple[int, int]]:
    return embedding.dtype, embedding.shape


def normal(rows: int, columns: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def by_torch(vectors: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """The definition, in torch's arithmetic."""
    wide = vectors.float()
    largest = {Encoding.INT8: 127.0, Encoding.FP8: 448.0}[encoding]
    scales = wide.abs().amax(dim=1, keepdim=True) / largest
    scaled = wide / scales.where(scales > 0, torch.ones(()))
    codes = scaled.round() if encoding is Encoding.INT8 else scaled.to(torch.float8_e4m3fn).float()
    return (codes * scales).to(vectors.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", LOSSY)
def test_it_rounds_as_torch_does(encoding: Encoding, dtype: str) -> None:
    vectors = normal(64, 512, dtype)
    assert torch.equal(there_and_back(vectors, encoding), by_torch(vectors, encoding))


@pytest.mark.parametrize("encoding", LOSSY)
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, allow_subnormal=False, width=32), min_size=16, max_size=16),
    st.sampled_from(sorted(DTYPES)),
)
def test_whatever_is_taken_is_rounded_as_torch_does_and_close(
    encoding: Encoding, numbers: list[float], dtype: str
) -> None:
    vectors = torch.tensor(numbers).reshape(2, 8).to(DTYPES[dtype])
    embedding = record(vectors)
    packed = try_pack(embedding, encoding)
    if packed is None:
        return
    after = tensor(Embedding(dtype, (2, 8), unpack(packed, encoding, dtype, (2, 8))))
    assert torch.equal(after, by_torch(vectors, encoding))
    assert is_close(vectors.float().numpy(), after.float().numpy())


def test_every_code_of_e4m3_stands_for_what_it_should() -> None:
    """A token made of all 254 finite values comes back bit for bit: its scale is 1."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].reshape(1, 254)
    assert torch.equal(there_and_back(values, Encoding.FP8), values)


@pytest.mark.parametrize("encoding", LOSSY)
def test_each_token_has_a_scale_of_its_own(encoding: Encoding) -> None:
    vectors = normal(3, 256) * torch.tensor([[1e-6], [1.0], [1e6]])
    after = there_and_back(vectors, encoding)
    assert min_cosine(vectors.numpy(), after.numpy()) > MIN_COSINE


@pytest.mark.parametrize("encoding", LOSSY)
def test_a_token_of_zeros_stays_one(encoding: Encoding) -> None:
    vectors = normal(3, 64)
    vectors[1] = 0.0
    after = there_and_back(vectors, encoding)
    assert torch.equal(after[1], torch.zeros(64))


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.finfo(torch.float32).max])
def test_numbers_that_cannot_be_scaled_are_refused(encoding: Encoding, bad: float) -> None:
    vectors = normal(3, 64)
    vectors[2, 5] = bad
    assert try_pack(record(vectors), encoding) is None


def test_one_huge_number_in_one_token_is_refused_by_int8_and_taken_by_fp8() -> None:
    """The outlier channels some encoders have: int8 spends all its steps on the one, fp8 none of its mantissa."""
    vectors = normal(64, 4096)
    vectors[17, 99] = 60.0
    assert try_pack(record(vectors), Encoding.INT8) is None
    assert there_and_back(vectors, Encoding.FP8) is not None


def test_a_number_so_huge_that_it_hides_the_loss_of_all_others_is_refused() -> None:
    vectors = normal(64, 4096)
    vectors[17, 99] = 1e5
    lost = torch.where(vectors == 1e5, vectors, torch.zeros(()))
    assert min_cosine(vectors[17:18].numpy(), lost[17:18].numpy()) > MIN_COSINE  # the cosine sees nothing
    assert not is_close(vectors.numpy(), torch.where(torch.arange(64)[:, None] == 17, lost, vectors).numpy())
    assert try_pack(record(vectors), Encoding.INT8) is None


def test_the_gate_looks_at_the_worst_token() -> None:
    before = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    after = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    assert min_cosine(before, after) == pytest.approx(0.5**0.5)
    assert min_cosine(before, before) == pytest.approx(1.0)
    assert min_cosine(before, 0 * before) == 0.0
    assert min_cosine(0 * before, 0 * before) == 1.0
