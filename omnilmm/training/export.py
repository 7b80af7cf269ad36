"""Checkpoints in the official layout: config.json, tokenizer files, safetensors shards with their index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.vision import ImageEncoder
from omnilmm.models.weights import to_checkpoint, torch_dtype

SHARD_BYTES = 5 << 30
_NOT_COPIED = ("*.safetensors", "*.bin", "*.index.json", "*.partial", ".*")


def save_checkpoint(
    folder: Path,
    source: Path,
    config: ModelConfig,
    *,
    encoder: ImageEncoder,
    language: LanguageModel,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the models to `folder`, with the settings and tokenizer files of `source`. What was there is replaced, once
    the new checkpoint is complete.

    Raises:
        ConfigError: `dtype` is unknown.
    """
    kind = torch_dtype(dtype)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    settings = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"torch_dtype": dtype}
    write_json(partial / "config.json", settings)
    tensors = to_checkpoint(config, encoder=encoder, language_model=language)
    write_shards(partial, ((name, tensor.to("cpu", kind)) for name, tensor in tensors), shard_bytes=shard_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Tensors in their order as one `model.safetensors`, or as several shards of about `shard_bytes` and an index."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors:
        if held and held + tensor.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor.contiguous().clone()  # a view of a fused matrix would drag the whole along
        held += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def num_parameters(*models: torch.nn.Module) -> int:
    return sum(parameter.numel() for model in models for parameter in model.parameters())
