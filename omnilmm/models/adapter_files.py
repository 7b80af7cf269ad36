"""Low-rank adapters (Hu et al. 2021) on disk, in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

A file is held against the model it is for before any memory is taken for its numbers: its size, then every name, dtype,
shape and offset of its header. What is left over, missing, of another size or not finite is refused by name. Pickled
adapters (`adapter_model.bin`) are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from omnilmm.errors import CheckpointError
from omnilmm.models.adapter_header import MAX_HEADER_BYTES, MIN_BYTES, WEIGHTS_FILE, check_header
from omnilmm.models.config import ModelConfig
from omnilmm.models.layout import Part, TensorSlot, checkpoint_layout

CONFIG_FILE: Final = "adapter_config.json"
PICKLED_FILE: Final = "adapter_model.bin"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""What an adapter may be called: it stands behind the colon of ``base:adapter``."""

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_CONFIG_BYTES: Final = 64 * 1024

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
class AdapterFacts:
    """What is known of an adapter whose numbers are not in memory. `digest` as of AdapterWeights; `num_bytes` are those
    of its weights' file."""

    digest: str
    rank: int
    num_bytes: int


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
    with _opened(folder) as place:
        asked = _asked_of(place, config, max_rank)
        data = _read_file(place, WEIGHTS_FILE, asked.max_bytes)
    stored = check_header(data, asked.shapes)
    tensors = _load(data)
    digest = hashlib.sha256(asked.settings + data).hexdigest()
    return AdapterWeights(digest, asked.rank, dict(_pairs(asked, lambda name: tensors[stored[name]], dtype)))


def check_adapter(folder: Path, config: ModelConfig, *, max_rank: int, dtype: torch.dtype) -> AdapterFacts:
    """What `read_adapter` would say of an adapter, with one pair of its tensors in memory at a time.

    The folder must be the caller's own: nobody else may write to its files meanwhile.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    with _opened(folder) as place:
        asked = _asked_of(place, config, max_rank)
        descriptor, size = _open_file(place, WEIGHTS_FILE, asked.max_bytes)
    with os.fdopen(descriptor, "rb") as file:
        if size < MIN_BYTES:
            raise CheckpointError(f"The adapter's {WEIGHTS_FILE} is cut short, or its header is too large.")
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            stored = check_header(data, asked.shapes)
            digest = hashlib.sha256(asked.settings)
            digest.update(data)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
        for _ in _pairs(asked, lambda name: tensors.get_tensor(stored[name]), dtype):
            pass
    return AdapterFacts(digest.hexdigest(), asked.rank, size)


def max_weights_bytes(config: ModelConfig, max_rank: int) -> int:
    """The most that an adapter's tensors may take on disk, header and all."""
    return _max_bytes(dict(_shapes(projection_slots(config), max_rank)))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an adapter's settings ask its tensors to be. `settings` are the bytes they stand in."""

    settings: bytes
    rank: int
    scale: float
    modules: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def max_bytes(self) -> int:
        return _max_bytes(self.shapes)


def _asked_of(place: int, config: ModelConfig, max_rank: int) -> _Asked:
    """From the folder's settings, which is as far as one can come without its tensors."""
    settings = _read_file(place, CONFIG_FILE, MAX_CONFIG_BYTES)
    rank, scale, kinds = _read_settings(settings, max_rank)
    slots = {name: slot for name, slot in projection_slots(config).items() if name.rpartition(".")[2] in kinds}
    if not _exists(place, WEIGHTS_FILE) and _exists(place, PICKLED_FILE):
        raise CheckpointError(f"The adapter's {PICKLED_FILE} is a pickle and is not read: save it as safetensors.")
    return _Asked(settings, rank, scale, tuple(slots), dict(_shapes(slots, rank)))


def _pairs(
    asked: _Asked, tensor: Callable[[str], Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each module's down (r, in) and up (r, out), scaled and in `dtype`."""
    for name in asked.modules:
        down, up = (tensor(f"{name}.lora_{half}.weight").float() for half in "AB")
        yield name, (_fit(down, name, dtype), _fit(up.t() * asked.scale, name, dtype))


def _shapes(slots: Mapping[str, TensorSlot], rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every tensor that the adapter must hold, by its name behind peft's prefix."""
    for name, slot in slots.items():
        yield f"{name}.lora_A.weight", (rank, slot.shape[1])
        yield f"{name}.lora_B.weight", (slot.shape[0], rank)


def _max_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    return 8 + MAX_HEADER_BYTES + sum(4 * math.prod(shape) for shape in shapes.values())


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder as a descriptor: its files are of one adapter, even if another takes its place meanwhile."""
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError("The adapter's folder is missing, or cannot be opened.") from error
    try:
        yield place
    finally:
        os.close(place)


def _exists(place: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=place, follow_symlinks=False)
    except OSError:
        return False
    return True


def _open_file(place: int, name: str, max_bytes: int) -> tuple[int, int]:
    """A descriptor of a regular file, and its size. Opened once: nothing takes its place between check and reading."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    except OSError as error:
        raise CheckpointError(f"The adapter's {name} is missing, a link, or cannot be opened.") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return descriptor, status.st_size
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"The adapter's {name} is not a file.")
    raise CheckpointError(f"The adapter's {name} has more than the {max_bytes} bytes it may have.")


def _read_file(place: int, name: str, max_bytes: int) -> bytes:
    """All of a regular file."""
    descriptor, _ = _open_file(place, name, max_bytes)
    with os.fdopen(descriptor, "rb") as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise CheckpointError(f"The adapter's {name} cannot be read.") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"The adapter's {name} has more than the {max_bytes} bytes it may have.")
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
