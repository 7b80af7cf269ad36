"""Folders, hub ids, shards, and files that are not what they say."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

import omnilmm
from omnilmm.errors import CheckpointError
from omnilmm.models.checkpoint import Checkpoint, Shard, open_shard_file, resolve_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}


def write_index(folder: Path, single: str, weight_map: Any) -> None:
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_shards(folder: Path, kind: str) -> Path:
    """a and c in one shard, b in another."""
    save, single = (save_file, "model.safetensors") if kind == "safetensors" else (torch.save, "pytorch_model.bin")
    stem, ending = single.split(".")
    save({name: TENSORS[name] for name in "ac"}, folder / f"{stem}-1.{ending}")
    save({"b": TENSORS["b"]}, folder / f"{stem}-2.{ending}")
    write_index(folder, single, {"a": f"{stem}-1.{ending}", "b": f"{stem}-2.{ending}", "c": f"{stem}-1.{ending}"})
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: tensor.clone() for name, tensor in checkpoint.tensors(checkpoint.names)}


def assert_whole(folder: Path) -> None:
    stored = read(folder)
    assert set(stored) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)


# -- formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path: Path, kind: str) -> None:
    assert_whole(write_shards(tmp_path, kind))


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "b").mkdir()
    save_file(TENSORS, tmp_path / "s" / "model.safetensors")
    torch.save(TENSORS, tmp_path / "b" / "pytorch_model.bin")
    assert_whole(tmp_path / "s")
    assert_whole(tmp_path / "b")


def test_the_old_torch_format_that_cannot_be_mapped(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_whole(tmp_path)


def test_parameters_arrive_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "pytorch_model.bin")
    ((_, tensor),) = Checkpoint(tmp_path).tensors(["a"])
    assert not tensor.requires_grad


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_shards(tmp_path, "safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even read")
    assert_whole(tmp_path)


def test_only_the_shards_that_are_needed_are_touched(tmp_path: Path) -> None:
    write_shards(tmp_path, "safetensors")
    (tmp_path / "model-2.safetensors").unlink()
    assert [name for name, _ in Checkpoint(tmp_path).tensors(["a", "c"])] == ["a", "c"]
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_shard_is_open_at_a_time(tmp_path: Path, kind: str) -> None:
    open_now: list[str] = []
    history: list[str] = []

    @contextmanager
    def spying(path: Path) -> Iterator[Shard]:
        assert not open_now, "another shard is still open"
        open_now.append(path.name)
        history.append(path.name)
        with open_shard_file(path) as shard:
            yield shard
        open_now.remove(path.name)

    checkpoint = Checkpoint(write_shards(tmp_path, kind), open_shard=spying)
    assert history == []  # the index is enough to know the names
    assert len(dict(checkpoint.tensors(checkpoint.names))) == 3
    assert len(history) == len(set(history)) == 2


def test_a_pickled_shard_lets_go_when_it_is_closed(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with open_shard_file(tmp_path / "pytorch_model.bin") as shard:
        assert len(shard.names()) == 3
    assert len(shard.names()) == 0


# -- broken and hostile files -------------------------------------------------------------------------


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_a_payload_is_refused_unrun(tmp_path: Path, is_zip: bool) -> None:
    trace = tmp_path / "trace"
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": Payload(str(trace))}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        Checkpoint(tmp_path)
    assert not trace.exists()


def test_a_bare_pickle_is_refused_unrun(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(str(trace)), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"a": 3},
        {1: torch.ones(1)},
        {"state": {"a": torch.ones(1)}},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain mapping"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
def test_a_file_cut_short_is_refused(tmp_path: Path, kind: str, kept: float) -> None:
    path = write_shards(tmp_path, kind) / ("model-1.safetensors" if kind == "safetensors" else "pytorch_model-1.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=path.name):
        read(tmp_path)


def test_a_shard_and_its_index_must_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, "safetensors")
    write_index(tmp_path, "model.safetensors", {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match="holds the tensor c"):
        read(tmp_path)
    names = {"a": "model-1.safetensors", "c": "model-1.safetensors", "d": "model-1.safetensors"}
    write_index(tmp_path, "model.safetensors", names)
    with pytest.raises(CheckpointError, match="lacks the tensor d"):
        read(tmp_path)


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/etc/hostname", "x/y.safetensors", "..", ""])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, shard: str) -> None:
    write_index(tmp_path, "model.safetensors", {"a": shard})
    with pytest.raises(CheckpointError, match="points outside"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json"):
        Checkpoint(tmp_path)


def test_an_empty_folder_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint(tmp_path)


# -- where a checkpoint comes from --------------------------------------------------------------------


class Hub:
    """Stands in for the hub: notes what is asked for, and writes the files it has that match."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.files, self.asked = folder, files, []

    def snapshot_download(self, hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((hub_id, revision, allow_patterns))
        for file in self.files:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (self.folder / file).touch()
        return str(self.folder)


def test_a_local_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    assert hub.asked == []


def test_a_checkpoint_that_is_shipped_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (resolve_checkpoint("nano:3b") / "config.json").is_file()
    (tmp_path / "nano" / "7b").mkdir(parents=True)
    (tmp_path / "nano" / "9b").mkdir()
    (tmp_path / "nano" / "9b" / "model.safetensors").touch()
    monkeypatch.setattr(omnilmm, "__file__", str(tmp_path / "__init__.py"))
    assert resolve_checkpoint("nano:9b") == tmp_path / "nano" / "9b"
    for name in ("nano:7b", "nano:", "nano:../nano/9b"):
        with pytest.raises(CheckpointError, match="nano:9b"):
            resolve_checkpoint(name)


def test_safetensors_of_the_hub_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("config.json", "model-1.safetensors", "pytorch_model-1.bin", "modeling.py", "tokenizer.model")
    hub = Hub(tmp_path, *files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert resolve_checkpoint("openbmb/MiniCPM-V", revision="abc") == tmp_path
    got = sorted(path.name for path in tmp_path.iterdir())
    assert got == ["config.json", "model-1.safetensors", "tokenizer.model"]
    assert [(hub_id, revision) for hub_id, revision, _ in hub.asked] == [("openbmb/MiniCPM-V", "abc")]


def test_pickled_weights_of_the_hub_are_the_second_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, "config.json", "pytorch_model-1.bin", "training_args.bin", "modeling.py")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    resolve_checkpoint("openbmb/OmniLMM-12B")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model-1.bin"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), OSError("disk"), ConnectionError("refused")])
def test_a_hub_that_fails_is_reported_plainly(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="openbmb/MiniCPM-V") as refusal:
        resolve_checkpoint("openbmb/MiniCPM-V")
    assert str(error) not in refusal.value.message


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "", "-x", "a b"])
def test_what_cannot_be_a_hub_id_is_never_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(Path("unused"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        resolve_checkpoint(name)
    assert hub.asked == []
