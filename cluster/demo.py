"""A tiny checkpoint with random weights, made on the spot, so that everything can be started without a download.

It has the files, tensor names and settings of the official checkpoint of either family, only smaller; its answers are
nonsense made of real words. Nothing here is known to the serving code: it loads a demonstration like any checkpoint.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from cluster.demo_tokenizer import tokenizer_files, train_tokenizer
from cluster.demo_weights import model_config, model_weights
from omnilmm.config import Family
from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.checkpoint import resolve_checkpoint

RECIPE = 1
"""Raised whenever the same seed would give other files: what an older recipe made is made anew."""

DEMO_NAME = "omnilmm-demo"
"""What the API calls the model when nothing else was asked for."""

NANO_NAME = "omnilmm-nano"

MARKER = "demo.json"
SHARD_BYTES = 1 << 20


def demo_checkpoint(family: Family = Family.OMNILMM_12B) -> Path:
    """The demonstration in this user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`), made at the first call.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return write_demo_checkpoint(cache / "omnilmm" / f"demo-{family.value}", family)
    except OSError as error:
        raise ConfigError("The cache folder cannot be written; name another in XDG_CACHE_HOME.") from error


def nano_checkpoint(family: Family = Family.OMNILMM_3B) -> Path | None:
    """The trained checkpoint of this family that is shipped with the package; None where there is none."""
    try:
        return resolve_checkpoint("nano:3b" if family is Family.OMNILMM_3B else "nano:12b")
    except CheckpointError:
        return None


def builtin_checkpoint() -> tuple[str, Path]:
    """What is served where no model is named, and its name: the trained one if it is shipped, else random weights.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    nano = nano_checkpoint()
    return (DEMO_NAME, demo_checkpoint()) if nano is None else (NANO_NAME, nano)


def write_demo_checkpoint(folder: Path, family: Family, *, seed: int = 0) -> Path:
    """Make the checkpoint in `folder`, unless it is there already. The same seed gives the same files.

    It is made beside `folder` and renamed when complete, so it is there whole or not at all. Several processes may
    ask at the same time: one makes it, the others wait. What an older recipe or another seed left is replaced.

    Returns:
        `folder`, about 3 MB.

    Raises:
        ConfigError: there is no demonstration of this family, or `folder` holds something we did not make.
    """
    if family not in (Family.OMNILMM_12B, Family.OMNILMM_3B):
        raise ConfigError("A demonstration checkpoint exists only for the two picture families.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        if is_demo_checkpoint(folder, family, seed=seed):
            return folder
        if folder.exists() and _read_marker(folder) is None and any(folder.iterdir()):
            raise ConfigError("The folder for the demonstration checkpoint holds other files; choose another one.")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that died at this point
        partial.mkdir()
        _write_files(partial, family, seed)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def is_demo_checkpoint(folder: Path, family: Family, *, seed: int = 0) -> bool:
    """Whether `folder` holds this very checkpoint, with every file as long as it was written."""
    marker = _read_marker(folder)
    if marker is None:
        return False
    sizes = {name: path.stat().st_size for name in marker["files"] if (path := folder / name).is_file()}
    return marker == _marker(family, seed, sizes)


def demo_picture() -> bytes:
    """A PNG file of 320 x 240 pixels: an orange circle on the left and a blue square on the right, on white."""
    smooth = 4  # drawn so much larger, for edges without stairs
    picture = Image.new("RGB", (320 * smooth, 240 * smooth), (250, 250, 250))
    pen = ImageDraw.Draw(picture)
    pen.ellipse([smooth * edge for edge in (42, 82, 118, 158)], fill=(244, 138, 18))
    pen.rectangle([smooth * edge for edge in (206, 86, 274, 154)], fill=(36, 84, 216))
    file = io.BytesIO()
    picture.resize((320, 240), Image.Resampling.LANCZOS).save(file, format="PNG")
    return file.getvalue()


def _write_files(folder: Path, family: Family, seed: int) -> None:
    tokenizer = train_tokenizer(family)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    settings = tokenizer_files(family, tokenizer.num_pieces)
    vocab_size = tokenizer.num_pieces + len(settings.get("added_tokens.json", ()))
    settings["config.json"] = model_config(family, vocab_size)
    settings["generation_config.json"] = {"bos_token_id": 1, "eos_token_id": 2}
    for name, content in settings.items():
        _write_json(folder / name, content)
    _write_shards(folder, family, model_weights(family, vocab_size, tokenizer.word_ids, seed))
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    _write_json(folder / MARKER, _marker(family, seed, sizes))


def _write_shards(folder: Path, family: Family, weights: dict[str, torch.Tensor]) -> None:
    """Cut the tensors, in their order, into files of about SHARD_BYTES, and write the index beside them."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    is_12b = family is Family.OMNILMM_12B
    pattern = "pytorch_model-{:05d}-of-{:05d}.bin" if is_12b else "model-{:05d}-of-{:05d}.safetensors"
    index_name = "pytorch_model.bin.index.json" if is_12b else "model.safetensors.index.json"
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = pattern.format(number, len(shards))
        if is_12b:
            torch.save(shard, folder / file_name)
        else:
            save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum(tensor.nbytes for tensor in weights.values())
    _write_json(folder / index_name, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _marker(family: Family, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    return {"recipe": RECIPE, "family": family.value, "seed": seed, "files": sizes}


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """What a finished demonstration says about itself, None for any other folder."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and {"recipe", "family", "seed", "files"} == marker.keys() else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's advisory lock. It is the process's own and goes with it, whatever happens."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
