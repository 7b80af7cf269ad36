"""Vectors in half the bytes: one byte a number and one scale a token, for whoever would rather keep more pictures.

    exact   the numbers as the encoder gave them
    int8    round(x / scale), scale = largest |x| of the token / 127
    fp8     x / scale as E4M3 (OCP 8-bit floating point, 2023: 4 bits of exponent, 3 of mantissa, no infinities),
            scale = largest |x| of the token / 448

    packed  scales, float32 (rows) | codes, uint8 (rows, columns)        64 x 4096: 256.25 KiB for 512 KiB of bfloat16

int8 is finer where a token's numbers are of one size; fp8 where a few are much larger than the rest, because its error
goes with each number and not with the largest. Which holds is a property of the weights, so nothing is packed on
trust: `try_pack` undoes what it did and refuses if a single token came out different (`is_close`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from omnilmm.messages import Embedding

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


class Encoding(StrEnum):
    """How the shared tier keeps numbers."""

    EXACT = "exact"
    INT8 = "int8"
    FP8 = "fp8"


MIN_COSINE: Final = 0.999
"""Between a token before and after. int8 of normally distributed numbers gives 0.9999, fp8 0.9996."""

MAX_CHANGED: Final = 0.5
"""Share of a token's numbers that may be off by more than a tenth. int8 of normally distributed numbers gives 0.08."""

_LARGEST: Final[Mapping[Encoding, float]] = {Encoding.INT8: 127.0, Encoding.FP8: 448.0}
_SCALE_BYTES: Final = 4


def packed_bytes(rows: int, columns: int) -> int:
    """Length of what `try_pack` makes of a (rows, columns) embedding."""
    return rows * (_SCALE_BYTES + columns)


def try_pack(embedding: Embedding, encoding: Encoding) -> bytes | None:
    """`embedding` in `encoding`, which is not EXACT; None if a number is not finite or a token not `is_close`."""
    before = _to_floats(embedding.data, embedding.dtype).reshape(embedding.shape)  # (rows, columns)
    largest: Floats = np.abs(before).max(axis=1, initial=0.0)  # (rows,)
    if not largest.max(initial=0.0) < np.finfo(np.float32).max / 2:  # nan too
        return None
    scales = largest / np.float32(_LARGEST[encoding])  # (rows,); 0 for a token of zeros, or of next to nothing
    divisors: Floats = np.where(scales > 0, scales, np.float32(1))
    codes = _TO_CODES[encoding](before / divisors[:, None])  # (rows, columns)
    packed = scales.astype("<f4").tobytes() + codes.tobytes()
    after = _to_floats(unpack(packed, encoding, embedding.dtype, embedding.shape), embedding.dtype)
    return packed if is_close(before, after.reshape(embedding.shape)) else None


def unpack(packed: bytes | memoryview, encoding: Encoding, dtype: str, shape: tuple[int, int]) -> bytes:
    """The numbers again, little-endian `dtype` in C order. `packed` is what `try_pack` made for these arguments.

    A token has at most 256 different numbers. They are rounded to `dtype` once each and then looked up, which is six
    times as fast as rounding every number.
    """
    rows, columns = shape
    scales = np.frombuffer(packed, "<f4", rows)  # (rows,)
    codes = np.frombuffer(packed, np.uint8, offset=rows * _SCALE_BYTES).reshape(rows, columns)
    numbers = _of_every_code(encoding)[None, :] * scales[:, None]  # (rows, 256) float32
    table = _from_floats(numbers, dtype)  # (rows, 256)
    places = np.arange(0, rows * 256, 256, dtype=np.intp)[:, None] + codes  # (rows, columns) into the flat table
    return table.ravel()[places].tobytes()


def is_close(before: Floats, after: Floats) -> bool:
    """Whether every row of two (rows, columns) arrays kept its direction, and most of its numbers their size.

    The cosine alone would not do: where one number is a thousand times the others, losing all the others hardly
    turns the row.
    """
    changed = (np.abs(after - before) > 0.1 * np.abs(before)).mean(axis=1)  # (rows,)
    return bool((changed <= MAX_CHANGED).all()) and min_cosine(before, after) >= MIN_COSINE


def min_cosine(before: Floats, after: Floats) -> float:
    """The least cosine between corresponding rows of two (rows, columns) arrays; two rows of zeros agree.

    In float32: of numbers beyond 1e18, or all below 1e-22, it says 0, which is the safe answer.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        products = np.einsum("rc,rc->r", before, after)
        lengths = np.sqrt(np.einsum("rc,rc->r", before, before)) * np.sqrt(np.einsum("rc,rc->r", after, after))
        cosines = np.divide(products, lengths, out=np.zeros_like(products), where=(lengths > 0) & (lengths < np.inf))
    zeros = ~before.any(axis=1) & ~after.any(axis=1)
    return float(np.where(zeros, 1.0, cosines).min(initial=1.0))


# -- codes --------------------------------------------------------------------------------------------


def _to_int8(scaled: Floats) -> Codes:
    return np.rint(scaled).clip(-127, 127).astype(np.int8).view(np.uint8)


def _to_e4m3(scaled: Floats) -> Codes:
    """Round to nearest, ties to even. |scaled| <= 448 but for float32 rounding.

    Normal numbers (from 2**-6 on): the float32 bits rounded to 3 of mantissa, with the exponent's bias brought from
    127 to 7. Below, multiples of 2**-9; the eighth is the first normal number, and its code too.
    """
    magnitude = np.abs(scaled).clip(max=448.0)
    bits = magnitude.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = np.rint(magnitude * 512).astype(np.uint32)
    codes = np.where(magnitude < 2.0**-6, subnormal, normal).astype(np.uint8)
    sign = np.signbit(scaled).astype(np.uint8) << np.uint8(7)
    return codes | sign


_TO_CODES: Final[Mapping[Encoding, Callable[[Floats], Codes]]] = {Encoding.INT8: _to_int8, Encoding.FP8: _to_e4m3}


def _of_every_code(encoding: Encoding) -> Floats:
    """What each of the 256 codes stands for, at scale 1."""
    codes = np.arange(256, dtype=np.uint8)
    if encoding is Encoding.INT8:
        return codes.view(np.int8).astype(np.float32)
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6)).astype(np.float32)
    return np.where(codes >> 7, -magnitude, magnitude)  # the two codes of NaN (127, 255) are never made


# -- the numbers of an Embedding ----------------------------------------------------------------------


def _to_floats(data: bytes, dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float32)


def _from_floats(numbers: Floats, dtype: str) -> NDArray[Any]:
    """Rounded to nearest, ties to even; little-endian."""
    if dtype == "bfloat16":  # which numpy does not know: the upper half of a float32
        bits = numbers.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return numbers.astype({"float32": "<f4", "float16": "<f2"}[dtype])
