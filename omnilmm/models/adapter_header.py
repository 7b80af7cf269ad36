"""The header of an adapter's safetensors file, held against what a model asks for before any number is read.

A header may lie: declare more bytes than there are, the same bytes twice, or another shape than it has numbers for.
What is accepted tells of every byte of the file once, and of nothing else.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from typing import Any, Final

from omnilmm.errors import CheckpointError

WEIGHTS_FILE: Final = "adapter_model.safetensors"
MAX_HEADER_BYTES: Final = 4 * 1024**2
MIN_BYTES: Final = 8  # those that tell the header's length

_PEFT_PREFIX: Final = "base_model.model."
_DTYPES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}  # bytes a number


def check_header(data: bytes | mmap.mmap, shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, str]:
    """The name in the file of every tensor in `shapes`, once the header tells of these alone and of every byte.

    The format: 8 bytes with the header's length, little-endian; the header, JSON; the numbers.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < MIN_BYTES or size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} is cut short, or its header is too large.")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} has a header that is not JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} has a header that is not a JSON object.")
    header.pop("__metadata__", None)
    stored = {_plain_name(name): name for name in header}
    for name in sorted(shapes.keys() - stored.keys())[:1]:
        raise CheckpointError(f"The adapter lacks {name}.")
    if len(stored) > len(shapes):
        raise CheckpointError("The adapter has tensors that its target_modules and the model do not ask for.")
    if len(stored) < len(header):
        raise CheckpointError("The adapter holds a tensor twice.")
    ranges = sorted(_range_of(name, header[stored[name]], shape) for name, shape in shapes.items())
    ends = [0, *(end for _, end in ranges)]
    if [begin for begin, _ in ranges] != ends[:-1] or 8 + size + ends[-1] != len(data):
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} is not as long as its header says.")
    return stored


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


def _plain_name(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX).removeprefix("llm.")


def _range_of(name: str, entry: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """The bytes a header's entry claims, which must be as many as its shape and dtype ask for."""
    match entry:
        case {"dtype": str(dtype), "shape": [int(rows), int(columns)], "data_offsets": [int(begin), int(end)]}:
            if dtype not in _DTYPES:
                raise CheckpointError(f"The adapter's tensor {name} is stored in a dtype that is not supported.")
            if (rows, columns) != shape:
                raise CheckpointError(f"The adapter's tensor {name} has another shape than the model asks for.")
            if begin >= 0 and end - begin == rows * columns * _DTYPES[dtype]:
                return begin, end
    raise CheckpointError(f"The adapter's tensor {name} is not described as it should be.")
