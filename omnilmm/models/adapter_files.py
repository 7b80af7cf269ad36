"""Low-rank adapters (Hu et al. 2021) on disk, in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

A file is held against the model it is for before any memory is taken for its numbers: its size, then every name, dtype,
shape and offset of its header. What is left over, missing, of another size or not finite is refused by name. Pickled
adapters (`adapter_model.bin`) are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from omnilmm.errors import CheckpointError
from omnilmm.models.config import ModelConfig
from omnilmm.models.layout import Part, TensorSlot, checkpoint_layout

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLED_FILE: Final = "adapter_model.bin"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""What an adapter may be called: it stands behind the colon of ``base:adapter``."""

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_PEFT_PREFIX: Final = "base_model.model."
_MAX_CONFIG_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 4 * 1024**2
_DTYPES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}  # bytes a number

# What peft can do besides, with the values that mean "not used". Anything else would change the maths.
_UNUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter that was read and checked.

    Attributes:
        digest: hex SHA-256 of its two files; two adapters of one digest are the same.
        rank: r of all its pairs.
        pairs: by the official name of the projection, down (r, in) and up (r, out), the scale being part of `up`.
    """

    digest: str
    rank: int
    pairs: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class AdapterCatalog:
    """Where adapters lie: each in a sub-folder of `folder` that has its name, or at one of `paths`, which come first.

    Names of clients are compared with names on disk and with a pattern; links are not followed.
    """

    folder: Path | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """Every adapter there is now, in order. Reads the folder."""
        found = set(self.paths)
        if self.folder is not None and self.folder.is_dir():
            found.update(entry.name for entry in self.folder.iterdir() if self.find(entry.name) is not None)
        return tuple(sorted(found))

    def find(self, name: str) -> Path | None:
        """The folder of an adapter, or None if there is none of that name."""
        if not NAME.fullmatch(name):
            return None
        if name in self.paths:
            return self.paths[name]
        folder = None if self.folder is None else self.folder / name
        return folder if folder is not None and folder.is_dir() and not folder.is_symlink() else None


def projection_slots(config: ModelConfig) -> Mapping[str, TensorSlot]:
    """The language model's projections by official module name (without ``llm.``), in the layout's order."""
    return {
        slot.name.removesuffix(".weight").removeprefix("llm."): slot
        for slot in checkpoint_layout(config).values()
        if slot.part is Part.LANGUAGE and slot.name.removesuffix(".weight").rpartition(".")[2] in PROJECTIONS
    }


def read_adapter(folder: Path, config: ModelConfig, *, max_rank: int, dtype: torch.dtype) -> AdapterWeights:
    """The adapter in `folder`, which must fit the language model of `config`. Its numbers come in `dtype`, on the CPU.

    Raises:
        CheckpointError: what is wrong with it, by file, setting or tensor.
    """
    settings = _read_file(folder / CONFIG_FILE, _MAX_CONFIG_BYTES)
    rank, scale, kinds = _read_settings(settings, max_rank)
    slots = {name: slot for name, slot in projection_slots(config).items() if name.rpartition(".")[2] in kinds}
    shapes = dict(_shapes(slots, rank))
    most = 8 + _MAX_HEADER_BYTES + sum(4 * math.prod(shape) for shape in shapes.values())
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLED_FILE).exists():
        raise CheckpointError(f"The adapter's {PICKLED_FILE} is a pickle and is not read: save it as safetensors.")
    data = _read_file(folder / WEIGHTS_FILE, most)
    stored = _check_header(data, shapes)
    digest = hashlib.sha256(settings + data).hexdigest()
    tensors = _load(data)
    pairs = {}
    for name in slots:
        down, up = (tensors[stored[f"{name}.lora_{half}.weight"]].float() for half in "AB")
        pairs[name] = (_fit(down, name, dtype), _fit(up.t() * scale, name, dtype))
    return AdapterWeights(digest, rank, pairs)


def _shapes(slots: Mapping[str, TensorSlot], rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every tensor that the adapter must hold, by its name behind peft's prefix."""
    for name, slot in slots.items():
        yield f"{name}.lora_A.weight", (rank, slot.shape[1])
        yield f"{name}.lora_B.weight", (slot.shape[0], rank)


def _read_file(path: Path, max_bytes: int) -> bytes:
    """All of a regular file, opened once: nothing can take its place between a check and the reading."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"The adapter's {path.name} is missing, a link, or cannot be opened.") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"The adapter's {path.name} is not a file.")
        if status.st_size > max_bytes:
            raise CheckpointError(f"The adapter's {path.name} has more than the {max_bytes} bytes it may have.")
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise CheckpointError(f"The adapter's {path.name} cannot be read.") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"The adapter's {path.name} has more than the {max_bytes} bytes it may have.")
    return data


def _read_settings(data: bytes, max_rank: int) -> tuple[int, float, frozenset[str]]:
    """Rank, scale and kinds of projections."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The adapter's {CONFIG_FILE} is not JSON.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"The adapter's {CONFIG_FILE} does not hold a JSON object.")
    for key, allowed in _UNUSED.items():
        if key in values and values[key] not in allowed:
            raise CheckpointError(f"The adapter's {CONFIG_FILE}: {key} has a value that is not supported.")
    rank, alpha, targets = values.get("r"), values.get("lora_alpha", 8), values.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= max_rank:
        raise CheckpointError(f"The adapter's {CONFIG_FILE}: r must be from 1 to {max_rank}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e6:
        raise CheckpointError(f"The adapter's {CONFIG_FILE}: lora_alpha must be a number of sensible size.")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"The adapter's {CONFIG_FILE}: target_modules must be a list of names.")
    kinds = frozenset(target.rpartition(".")[2] for target in targets)
    if not kinds <= {*PROJECTIONS}:
        raise CheckpointError(
            f"The adapter's {CONFIG_FILE}: target_modules may only name {', '.join(PROJECTIONS)}, those of the"
            " language model."
        )
    scale = alpha / (math.sqrt(rank) if values.get("use_rslora") is True else rank)
    return rank, scale, kinds


def _check_header(data: bytes, shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, str]:
    """The name in the file of every tensor in `shapes`, once the header tells of these alone and of every byte.

    The format: 8 bytes with the header's length, little-endian; the header, JSON; the numbers.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} is cut short, or its header is too large.")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} has a header that is not JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} has a header that is not a JSON object.")
    header.pop("__metadata__", None)
    stored = {_plain_name(name): name for name in header}
    for name in sorted(stored.keys() ^ shapes.keys())[:1]:
        verb = "lacks" if name in shapes else "has the unknown tensor"
        raise CheckpointError(f"The adapter {verb} {name[:200]}.")
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


def _load(data: bytes) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"The adapter's {WEIGHTS_FILE} is not a whole safetensors file.") from error
    return tensors


def _fit(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    fit = tensor.to(dtype).contiguous()
    if not fit.isfinite().all():
        raise CheckpointError(f"The adapter's tensors of {name} hold numbers that are not finite in {dtype}.")
    return fit
