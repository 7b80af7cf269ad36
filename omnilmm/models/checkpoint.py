"""Checkpoints on disk: folders and hub ids, shards and their index, one shard open at a time.

Only tensors are ever read. Pickled shards go through torch's restricted loader, which refuses anything else; code
that comes with a checkpoint is neither downloaded nor run.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor

import omnilmm
from omnilmm.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NANO = "nano:"
_TEXT_PATTERNS = ("*.json", "tokenizer.model")
_SAFETENSORS_PATTERN, _BIN_PATTERN = "model*.safetensors", "pytorch_model*.bin"


class Shard(Protocol):
    """One open file of tensors."""

    def names(self) -> Collection[str]: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor, on the CPU, backed by the file where possible."""
        ...


OpenShard = Callable[[Path], AbstractContextManager[Shard]]


def resolve_checkpoint(path_or_hub_id: str, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: an existing local one, one that comes with this package, or the hub's, downloaded
    into the hub client's cache.

    Only JSON files, the tokenizer and weights are fetched; `.bin` weights only where there are no safetensors. Without
    a network the copy already in the cache is used.

    Args:
        path_or_hub_id: a folder, ``nano:3b`` or ``nano:12b``, or a name like ``openbmb/MiniCPM-V``.
        revision: branch, tag or commit on the hub; naming a commit pins the weights.

    Raises:
        CheckpointError: it is none of these, or the hub does not give it.
    """
    folder = Path(path_or_hub_id).expanduser()
    if path_or_hub_id and folder.is_dir():
        return folder
    if path_or_hub_id.startswith(_NANO):
        return _shipped(path_or_hub_id)
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise CheckpointError(f"There is no checkpoint folder {path_or_hub_id!r}, and it cannot be a hub id.")
    downloaded = _download(path_or_hub_id, revision, (*_TEXT_PATTERNS, _SAFETENSORS_PATTERN))
    if not any(downloaded.glob(_SAFETENSORS_PATTERN)):
        downloaded = _download(path_or_hub_id, revision, (*_TEXT_PATTERNS, _BIN_PATTERN))
    return downloaded


def _shipped(name: str) -> Path:
    """The folder of a small trained checkpoint that is part of the package; `name` is "nano:" and a folder in it."""
    root = Path(omnilmm.__file__).parent / "nano"
    shipped = [folder for folder in root.glob("*") if (folder / "model.safetensors").is_file()]
    found = next((folder for folder in shipped if name == _NANO + folder.name), None)
    if found is None:
        names = sorted(_NANO + folder.name for folder in shipped)
        raise CheckpointError(f"The small checkpoints that come with this package are {', '.join(names)}.")
    return found


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is not a local folder, and the model hub does not give a checkpoint of that name: "
            "check the spelling, the revision, your access to it, and the network."
        ) from error


class Checkpoint:
    """The stored tensors of one folder, by shard. Opening one reads names only.

    safetensors are preferred where both formats are present.

    Args:
        folder: holds ``model.safetensors`` or ``pytorch_model.bin``, or shards of either with their index.
        open_shard: how a shard file is opened.

    Raises:
        CheckpointError: there are no weights, or the index or the only file cannot be read.
    """

    def __init__(self, folder: Path, *, open_shard: OpenShard | None = None) -> None:
        self._open = open_shard if open_shard is not None else open_shard_file
        self._shard_of = self._find(folder)

    @property
    def names(self) -> Collection[str]:
        """Everything that is stored."""
        return self._shard_of.keys()

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, shard by shard; no two shards are open at once.

        A tensor is good until the next one is asked for.

        Raises:
            CheckpointError: a shard is missing or broken, or holds other names than the index says.
        """
        for path in sorted({self._shard_of[name] for name in names}):
            expected = {name for name, shard in self._shard_of.items() if shard == path}
            with self._open(path) as shard:
                _check_names(path, set(shard.names()), expected)
                for name in sorted(expected.intersection(names)):
                    yield name, shard.tensor(name)

    def _find(self, folder: Path) -> Mapping[str, Path]:
        for single in ("model.safetensors", "pytorch_model.bin"):
            index, path = folder / f"{single}.index.json", folder / single
            if index.is_file():
                return _read_index(index)
            if path.is_file():
                with self._open(path) as shard:
                    return dict.fromkeys(shard.names(), path)
        raise CheckpointError("The checkpoint folder has no weights (model.safetensors or pytorch_model.bin).")


def _check_names(path: Path, stored: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - stored):
        raise CheckpointError(f"{path.name} lacks the tensor {missing[0]}, which the index promises there.")
    if spare := sorted(stored - expected):
        raise CheckpointError(f"{path.name} holds the tensor {spare[0]}, which the index does not promise there.")


def _read_index(index: Path) -> Mapping[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name} cannot be read as an index of weights.") from error
    for shard in shards.values():
        if not shard or Path(shard).name != shard or shard.startswith("."):
            raise CheckpointError(f"{index.name} points outside the checkpoint's folder.")
    return {name: index.parent / shard for name, shard in shards.items()}


# -- the two file formats -----------------------------------------------------------------------------


@contextmanager
def open_shard_file(path: Path) -> Iterator[Shard]:
    """Open one file of weights by its ending.

    Raises:
        CheckpointError: it is missing, cut short, of another format, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"The checkpoint's {path.name} is missing.")
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as shard:
            yield shard
    else:
        pickled = _PickledShard(path)
        try:
            yield pickled
        finally:
            pickled.close()


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Shard]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is not a whole safetensors file.") from error
    with file:
        yield _SafetensorsShard(file)


class _SafetensorsFile(Protocol):
    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


class _SafetensorsShard:
    def __init__(self, file: _SafetensorsFile) -> None:
        self._file = file

    def names(self) -> Collection[str]:
        return self._file.keys()

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _PickledShard:
    """A torch.save file, mapped into memory where its (zip) format allows it."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except UnpicklingError as error:
            raise CheckpointError(f"{path.name} holds more than tensors (or is damaged) and is refused.") from error
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path.name} is not a whole file of weights.") from error
        if not isinstance(state, dict) or not all(_is_entry(name, value) for name, value in state.items()):
            raise CheckpointError(f"{path.name} is not a plain mapping of names to tensors.")
        self._state: dict[str, Tensor] = state

    def names(self) -> Collection[str]:
        return self._state.keys()

    def tensor(self, name: str) -> Tensor:
        return self._state[name].detach()

    def close(self) -> None:
        """Let go of the tensors, even while someone still holds the shard."""
        self._state.clear()


def _is_entry(name: object, value: object) -> bool:
    """A name and a tensor with numbers of its own: neither sparse nor without memory."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
    )
