"""Filling models from checkpoints, writing them back, and the encoder's fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.attention import DenseAttend
from omnilmm.models.checkpoint import Checkpoint, Shard, open_shard_file
from omnilmm.models.config import read_model_config
from omnilmm.models.layout import LANGUAGE_PARTS, Part, checkpoint_layout
from omnilmm.models.weights import (
    empty_language_model,
    encoder_fingerprint,
    fill,
    load_encoder,
    load_language_model,
    to_checkpoint,
    torch_dtype,
)

Change = Callable[[dict[str, Tensor]], object]
FIRST_LAYER = {"omnilmm-12b-tiny": "model.layers.0", "minicpm-v-tiny": "llm.model.layers.0"}


def stored(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: tensor.clone() for name, tensor in checkpoint.tensors(checkpoint.names)}


def rewrite(reference: Any, folder: Path, change: Change = lambda _: None, *, kind: str = "safetensors") -> Path:
    """The same checkpoint in one file of the given kind, after `change` to its tensors."""
    tensors = stored(reference.folder)
    change(tensors)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(reference.folder / name, folder / name)
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def name_in(reference: Any, part: Part) -> str:
    """A matrix of the given part."""
    layout = checkpoint_layout(reference.config)
    return next(name for name, slot in layout.items() if slot.part is part and len(slot.shape) == 2)


def replace(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.__setitem__(name, tensor)


def edit(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


def load_both(folder: Path, reference: Any, dtype: str = "float32") -> None:
    load_encoder(folder, reference.config, dtype=dtype)
    load_language_model(folder, reference.config, dtype=dtype)


# -- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_comes_back_as_it_was(reference: Any, dtype: str) -> None:
    encoder = load_encoder(reference.folder, reference.config, dtype=dtype)
    language_model = load_language_model(reference.folder, reference.config, dtype=dtype)
    written = dict(to_checkpoint(reference.config, encoder=encoder, language_model=language_model))
    original = stored(reference.folder)
    assert set(written) == set(original)
    for name, tensor in original.items():
        assert written[name].dtype == torch_dtype(dtype)
        assert torch.equal(written[name], tensor.to(torch_dtype(dtype))), name


def test_a_part_is_written_alone(reference: Any) -> None:
    layout = checkpoint_layout(reference.config)
    names = [name for name, _ in to_checkpoint(reference.config, encoder=reference.encoder)]
    assert names == [name for name, slot in layout.items() if slot.part is not Part.LANGUAGE]
    names = [name for name, _ in to_checkpoint(reference.config, language_model=reference.language_model)]
    assert names == [name for name, slot in layout.items() if slot.part is Part.LANGUAGE]


def test_models_arrive_frozen_and_complete(reference: Any) -> None:
    for model in (reference.encoder, reference.language_model):
        assert not model.training
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert tensor.device.type == "cpu", name
            assert tensor.dtype == torch.float32, name
            assert not tensor.requires_grad, name
            assert torch.isfinite(tensor).all(), name


@torch.inference_mode(False)
def test_what_was_loaded_can_be_trained(reference: Any) -> None:
    encoder = load_encoder(reference.folder, reference.config, dtype="float32").requires_grad_(True)
    model = load_language_model(reference.folder, reference.config, dtype="float32").requires_grad_(True)
    vectors = encoder(reference.pixels("coins_gray.png").clone())[0]
    embeds = torch.cat((vectors, model.embed(torch.arange(10, 20))))
    hidden = model(embeds, torch.arange(len(embeds)), DenseAttend(reference.config.language.num_layers))
    model.logits(hidden).square().mean().backward()
    without = [name for part in (encoder, model) for name, weight in part.named_parameters() if weight.grad is None]
    assert without == ["vision.pos_embed"]  # used through its resampled copy only


def test_progress_is_told_up_to_the_end(reference: Any) -> None:
    told: list[tuple[int, int]] = []
    model = load_language_model(
        reference.folder, reference.config, dtype="bfloat16", progress=lambda *step: told.append(step)
    )
    total = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_dtypes_go_by_name() -> None:
    assert torch_dtype("float16") is torch.float16
    with pytest.raises(ConfigError) as refusal:
        torch_dtype("int8")
    assert refusal.value.param == "dtype"


def test_each_pool_reads_its_own_shards_only(reference: Any, tmp_path: Path) -> None:
    layout = checkpoint_layout(reference.config)
    shards: dict[str, dict[str, Tensor]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    weight_map = {}
    for name, tensor in stored(reference.folder).items():
        weight_map[name] = "model-2.safetensors" if layout[name].part is Part.LANGUAGE else "model-1.safetensors"
        shards[weight_map[name]][name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened: list[str] = []

    @contextmanager
    def spying(path: Path) -> Iterator[Shard]:
        opened.append(path.name)
        with open_shard_file(path) as shard:
            yield shard

    fill(
        empty_language_model(reference.config),
        Checkpoint(tmp_path, open_shard=spying),
        reference.config,
        parts=LANGUAGE_PARTS,
        dtype="float32",
    )
    assert opened == ["model-2.safetensors"]
    (tmp_path / "model-2.safetensors").unlink()
    load_encoder(tmp_path, reference.config, dtype="float32")
    encoder_fingerprint(tmp_path, reference.config)


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", list(Part))
def test_a_missing_tensor_is_named(reference: Any, tmp_path: Path, part: Part) -> None:
    name = name_in(reference, part)
    rewrite(reference, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        load_both(tmp_path, reference)


@pytest.mark.parametrize("load", [load_encoder, load_language_model, encoder_fingerprint])
def test_a_spare_tensor_is_named_whoever_looks(reference: Any, tmp_path: Path, load: Any) -> None:
    rewrite(reference, tmp_path, replace("model.extra.weight", torch.ones(2)))
    settings = {} if load is encoder_fingerprint else {"dtype": "float32"}
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        load(tmp_path, reference.config, **settings)


def test_old_rotary_frequencies_are_passed_over(reference: Any, tmp_path: Path) -> None:
    name = f"{FIRST_LAYER[reference.name]}.self_attn.rotary_emb.inv_freq"
    load_both(rewrite(reference, tmp_path, replace(name, torch.ones(16))), reference)


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("shape", ["transposed", "one row more"])
def test_a_misshapen_tensor_is_named(reference: Any, tmp_path: Path, part: Part, shape: str) -> None:
    layout = checkpoint_layout(reference.config)
    name = next(n for n, slot in layout.items() if slot.part is part and len(set(slot.shape)) == len(slot.shape) == 2)
    rows, columns = layout[name].shape
    wrong = torch.ones(columns, rows) if shape == "transposed" else torch.ones(rows + 1, columns)
    rewrite(reference, tmp_path, replace(name, wrong))
    with pytest.raises(CheckpointError, match=f"The tensor {name} has shape"):
        load_both(tmp_path, reference)


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(reference: Any, tmp_path: Path, part: Part, value: float) -> None:
    name = name_in(reference, part)
    rewrite(reference, tmp_path, edit(name, value))
    with pytest.raises(CheckpointError, match=f"The tensor {name} holds numbers that are not finite"):
        load_both(tmp_path, reference)


def test_a_number_too_large_for_the_dtype_is_named(reference: Any, tmp_path: Path) -> None:
    name = name_in(reference, Part.LANGUAGE)
    rewrite(reference, tmp_path, edit(name, 1e6))
    load_both(tmp_path, reference)
    with pytest.raises(CheckpointError, match=rf"{name} .* not finite in torch\.float16"):
        load_both(tmp_path, reference, "float16")


def test_numbers_of_another_kind_are_refused(reference: Any, tmp_path: Path) -> None:
    name = name_in(reference, Part.VISION)
    shape = checkpoint_layout(reference.config)[name].shape
    rewrite(reference, tmp_path, replace(name, torch.ones(shape, dtype=torch.int8)))
    with pytest.raises(CheckpointError, match=f"{name} is stored as"):
        load_both(tmp_path, reference)


# -- tied text models ---------------------------------------------------------------------------------


def tied_checkpoint(folder: Path, head: Tensor | None) -> Path:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48}
    config = {"model_type": "minicpm", "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
    (folder / "config.json").write_text(json.dumps(sizes | config | ids | scales))
    generator = torch.Generator().manual_seed(6)
    layout = checkpoint_layout(read_model_config(folder))
    tensors = {
        name: torch.randn(slot.shape, generator=generator) for name, slot in layout.items() if not slot.is_optional
    }
    if head is not None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + head
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("head", [None, torch.zeros(40, 32)], ids=["left out", "a copy"])
def test_a_tied_model_answers_with_its_embedding(tmp_path: Path, head: Tensor | None) -> None:
    folder = tied_checkpoint(tmp_path, head)
    config = read_model_config(folder)
    model = load_language_model(folder, config, dtype="float32")
    hidden = model(model.embed(torch.arange(5)), torch.arange(5), DenseAttend(1))
    assert torch.equal(model.logits(hidden), hidden / 2 @ model.embedding.weight.T)
    assert "lm_head.weight" not in dict(to_checkpoint(config, language_model=model))


def test_a_head_that_contradicts_the_tie_is_refused(tmp_path: Path) -> None:
    head = torch.zeros(40, 32)
    head[3, 3] = 1.0
    folder = tied_checkpoint(tmp_path, head)
    with pytest.raises(CheckpointError, match="differs from the one it is tied to"):
        load_language_model(folder, read_model_config(folder), dtype="float32")


def test_a_text_model_has_no_encoder(tmp_path: Path) -> None:
    folder = tied_checkpoint(tmp_path, None)
    config = read_model_config(folder)
    with pytest.raises(CheckpointError, match="text-only"):
        load_encoder(folder, config, dtype="float32")
    with pytest.raises(CheckpointError, match="text-only"):
        encoder_fingerprint(folder, config)


# -- the fingerprint ----------------------------------------------------------------------------------


def test_the_fingerprint_is_the_same_for_any_file_format(reference: Any, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "b").mkdir()
    fingerprint = encoder_fingerprint(reference.folder, reference.config)
    assert len(bytes.fromhex(fingerprint)) == 32
    assert encoder_fingerprint(rewrite(reference, tmp_path / "s"), reference.config) == fingerprint
    assert encoder_fingerprint(rewrite(reference, tmp_path / "b", kind="bin"), reference.config) == fingerprint


def test_the_fingerprint_is_blind_to_the_language_model(reference: Any, tmp_path: Path) -> None:
    rewrite(reference, tmp_path, edit(name_in(reference, Part.LANGUAGE), 0.5))
    assert encoder_fingerprint(tmp_path, reference.config) == encoder_fingerprint(reference.folder, reference.config)


@pytest.mark.parametrize("part", [Part.VISION, Part.RESAMPLER])
def test_the_fingerprint_sees_one_number(reference: Any, tmp_path: Path, part: Part) -> None:
    rewrite(reference, tmp_path, edit(name_in(reference, part), 0.5))
    assert encoder_fingerprint(tmp_path, reference.config) != encoder_fingerprint(reference.folder, reference.config)


def test_the_fingerprint_sees_who_holds_which_numbers(reference: Any, tmp_path: Path) -> None:
    pair = next(name for name in checkpoint_layout(reference.config) if "blocks.0.norm1.weight" in name)
    other = pair.replace("norm1", "norm2")

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[pair], tensors[other] = tensors[other], tensors[pair]

    rewrite(reference, tmp_path, swap)
    assert encoder_fingerprint(tmp_path, reference.config) != encoder_fingerprint(reference.folder, reference.config)


def test_the_fingerprint_sees_dtype_and_config(reference: Any, tmp_path: Path) -> None:
    fingerprint = encoder_fingerprint(reference.folder, reference.config)
    name = name_in(reference, Part.VISION)
    rewrite(reference, tmp_path, lambda tensors: tensors.__setitem__(name, tensors[name].float()))
    assert encoder_fingerprint(tmp_path, reference.config) != fingerprint
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"image_size": 448', '"image_size": 224'))
    smaller = read_model_config(tmp_path)
    assert encoder_fingerprint(reference.folder, smaller) != fingerprint
