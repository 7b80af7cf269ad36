"""From a checkpoint to a model and back, and the fingerprint that names an encoder.

A model is built without memory (torch's meta device), given memory once in its final dtype, and filled tensor by
tensor. What a part lacks, what nobody owns, what has another shape and what is not finite is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.checkpoint import Checkpoint
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.layout import ENCODER_PARTS, LANGUAGE_PARTS, Part, TensorSlot, checkpoint_layout, is_ignored
from omnilmm.models.vision import ImageEncoder

Progress = Callable[[int, int], None]
"""Told (bytes filled so far, bytes in all) after every tensor, in the model's dtype."""

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_Model = TypeVar("_Model", ImageEncoder, LanguageModel)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: it is called something else.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}.", param="dtype")
    return _DTYPES[name]


# -- loading ------------------------------------------------------------------------------------------


def load_encoder(
    folder: Path, config: ModelConfig, *, dtype: str, device: str = "cpu", progress: Progress | None = None
) -> ImageEncoder:
    """The vision tower and resampler, frozen and in evaluation mode; no tensor of the language model is read.

    Raises:
        CheckpointError: the weights are not those of `config`, or it is a text-only model.
        ConfigError: `dtype` is unknown.
    """
    model = empty_encoder(config)
    return fill(model, Checkpoint(folder), config, parts=ENCODER_PARTS, dtype=dtype, device=device, progress=progress)


def load_language_model(
    folder: Path, config: ModelConfig, *, dtype: str, device: str = "cpu", progress: Progress | None = None
) -> LanguageModel:
    """The language model, frozen and in evaluation mode; no tensor of the encoder is read.

    Raises:
        CheckpointError: the weights are not those of `config`.
        ConfigError: `dtype` is unknown.
    """
    model = empty_language_model(config)
    return fill(model, Checkpoint(folder), config, parts=LANGUAGE_PARTS, dtype=dtype, device=device, progress=progress)


def empty_encoder(config: ModelConfig) -> ImageEncoder:
    """An encoder on the meta device: every shape, no memory.

    Raises:
        CheckpointError: it is a text-only model.
    """
    if config.vision is None or config.resampler is None:
        raise CheckpointError("The checkpoint is a text-only model: it has no image encoder.")
    with torch.device("meta"):
        return ImageEncoder(config.vision, config.resampler)


def empty_language_model(config: ModelConfig) -> LanguageModel:
    """A language model on the meta device: every shape, no memory."""
    with torch.device("meta"):
        return LanguageModel(config.language)


@torch.no_grad()
def fill(
    model: _Model,
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    parts: Collection[Part],
    dtype: str,
    device: str = "cpu",
    progress: Progress | None = None,
) -> _Model:
    """Give an empty model its memory and the tensors of `parts`, then make its derived tables.

    Peak memory is the model plus one shard.
    """
    slots = _wanted(checkpoint, config, parts)
    model = model.to(torch_dtype(dtype)).to_empty(device=device)
    model.requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    _zero_unowned(parameters, slots.values())
    itemsize = torch_dtype(dtype).itemsize
    total, done = sum(math.prod(slot.shape) for slot in slots.values()) * itemsize, 0
    filled: set[tuple[str, int]] = set()
    for name, tensor in checkpoint.tensors(slots):
        slot = slots[name]
        place = (slot.parameter, slot.offset)
        _put(tensor, slot, parameters[slot.parameter][slot.rows], is_second=place in filled)
        filled.add(place)
        done += tensor.numel() * itemsize
        if progress is not None:
            progress(done, total)
    model.derive_tables()
    return model


def _wanted(checkpoint: Checkpoint, config: ModelConfig, parts: Collection[Part]) -> dict[str, TensorSlot]:
    """The slots of `parts` that are stored, once nothing is missing from them and nothing spare lies about."""
    layout = checkpoint_layout(config)
    stored = checkpoint.names
    for name in sorted(stored):
        if name not in layout and not is_ignored(name):
            raise CheckpointError(f"The checkpoint holds the tensor {name}, which no part of this model owns.")
    wanted = {name: slot for name, slot in layout.items() if slot.part in parts}
    for name, slot in wanted.items():
        if name not in stored and not slot.is_optional:
            raise CheckpointError(f"The checkpoint lacks the tensor {name}.")
    return {name: slot for name, slot in wanted.items() if name in stored}


def _zero_unowned(parameters: Mapping[str, Tensor], slots: Iterable[TensorSlot]) -> None:
    """Clear the parameters that have rows no stored tensor will fill: the key bias of EVA."""
    owned: dict[str, set[tuple[int, int]]] = {}
    for slot in slots:
        owned.setdefault(slot.parameter, set()).add((slot.rows.start, slot.rows.stop))
    for name, parameter in parameters.items():
        if sum(stop - start for start, stop in owned[name]) < parameter.shape[0]:
            parameter.zero_()


def _put(tensor: Tensor, slot: TensorSlot, target: Tensor, *, is_second: bool) -> None:
    if tuple(tensor.shape) != slot.shape:
        raise CheckpointError(f"The tensor {slot.name} has shape {tuple(tensor.shape)}, not {slot.shape}.")
    if tensor.dtype not in _DTYPES.values():
        raise CheckpointError(f"The tensor {slot.name} is stored as {tensor.dtype}, which is not supported.")
    if is_second:
        if not torch.equal(target, tensor.to(target)):
            raise CheckpointError(f"The tensor {slot.name} differs from the one it is tied to.")
        return
    target.copy_(tensor)
    low, high = target.aminmax()  # NaN spreads into both; unlike isfinite over all of it, this takes no memory
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"The tensor {slot.name} holds numbers that are not finite in {target.dtype}.")


# -- writing ------------------------------------------------------------------------------------------


def to_checkpoint(
    config: ModelConfig, *, encoder: ImageEncoder | None = None, language_model: LanguageModel | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The official names and tensors of the given parts: the way back from our fused parameters.

    The tensors are views of the model's own parameters, in its dtype; clone what must outlive the next change.
    """
    models: list[tuple[Collection[Part], nn.Module]] = []
    if encoder is not None:
        models.append((ENCODER_PARTS, encoder))
    if language_model is not None:
        models.append((LANGUAGE_PARTS, language_model))
    slots = checkpoint_layout(config).values()
    for parts, model in models:
        parameters = dict(model.named_parameters())
        for slot in slots:
            if slot.part in parts and not slot.is_optional:
                yield slot.name, parameters[slot.parameter].detach()[slot.rows]


# -- naming -------------------------------------------------------------------------------------------


def encoder_fingerprint(folder: Path, config: ModelConfig) -> str:
    """Hex SHA-256 over everything of the checkpoint that decides a picture's vectors.

    It covers the encoder's config and the name, dtype, shape and bytes of every vision and resampler tensor, in the
    order of their names: the same for either file format and any sharding, and blind to the language model. The dtype
    the model runs in is not part of it.

    Raises:
        CheckpointError: as in `load_encoder`.
    """
    if config.vision is None or config.resampler is None:
        raise CheckpointError("The checkpoint is a text-only model: it has no image encoder.")
    checkpoint = Checkpoint(folder)
    slots = _wanted(checkpoint, config, ENCODER_PARTS)
    digests = {name: _tensor_digest(name, tensor) for name, tensor in checkpoint.tensors(slots)}
    settings = {"family": config.family, "vision": asdict(config.vision), "resampler": asdict(config.resampler)}
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(digests):
        whole.update(digests[name])
    return whole.hexdigest()


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
    digest = hashlib.sha256(header.encode() + b"\0")
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()
