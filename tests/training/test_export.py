"""What training writes, the ordinary loader reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import row_about, talk

from omnilmm.errors import ConfigError
from omnilmm.models.config import read_model_config
from omnilmm.prompt.template import load_template
from omnilmm.training.export import save_checkpoint
from omnilmm.training.learner import Learner, load_learner
from omnilmm.training.rows import collate
from omnilmm.training.sequences import SequenceMaker

TALK = talk("What is it?", "红色的。")


def save(learner: Learner, target: Path, source: Path, **settings: object) -> Path:
    kind = {"encoder": learner.encoder, "language": learner.language}
    return save_checkpoint(target, source, learner.config, **kind, **settings)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000], ids=["one file", "shards"])
def test_saved_and_loaded_it_is_the_same_model(
    shard_bytes: int, learner_of: Callable[..., Learner], maker: SequenceMaker, folder: Path, tmp_path: Path
) -> None:
    learner = learner_of()
    with torch.no_grad():
        for _, _, parameter in learner.learning():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if not learner.encoder.vision.config.has_key_bias:  # rows that are in no checkpoint
        width = learner.encoder.vision.config.width
        for block in learner.encoder.vision.blocks:
            block.attention.qkv.bias.data[width : 2 * width] = 0
    saved = save(learner, tmp_path / "new", folder, dtype="float32", shard_bytes=shard_bytes)
    again = load_learner(saved, read_model_config(saved), learn=())
    batch = collate([row_about(maker, 0, TALK)])
    assert again(batch).answers.item() == learner(batch).answers.item()
    assert len([*saved.glob("*.safetensors")]) == (1 if shard_bytes > 1 << 20 else len({*_index(saved).values()}))


def _index(folder: Path) -> dict[str, str]:
    path = folder / "model.safetensors.index.json"
    return json.loads(path.read_text())["weight_map"] if path.is_file() else {}


def test_settings_and_tokenizer_come_along(learner_of: Callable[..., Learner], folder: Path, tmp_path: Path) -> None:
    saved = save(learner_of(), tmp_path / "new", folder)
    names = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert names <= {path.name for path in saved.iterdir()}
    assert (saved / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()} == {torch.bfloat16}
    load_template(read_model_config(saved).family, saved)


def test_official_shards_are_not_copied(data: Path, tmp_path: Path) -> None:
    source = data / "omnilmm-12b-tiny"
    config = read_model_config(source)
    saved = save(load_learner(source, config, learn=()), tmp_path / "new", source)
    assert not [*saved.glob("*.bin")]
    assert not (saved / "pytorch_model.bin.index.json").exists()
    assert read_model_config(saved) == config


def test_a_checkpoint_is_replaced_when_the_new_one_is_complete(
    learner_of: Callable[..., Learner], folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new"
    save(learner_of(), target, folder)
    (target / "old.json").write_text("{}")
    save(learner_of(), target, folder)
    assert not (target / "old.json").exists()
    with pytest.raises(ConfigError):
        save(learner_of(), target, folder, dtype="int4")
    assert (target / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
