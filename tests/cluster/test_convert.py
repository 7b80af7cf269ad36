"""GGUF files to checkpoint folders, with transformers' own reader of such files as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaForCausalLM

from cluster.convert import convert_gguf
from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import read_model_config
from omnilmm.models.weights import load_language_model
from omnilmm.prompt.template import load_template
from omnilmm.prompt.tokens import load_tokenizer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 64, 4, 2, 16, 96, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "You are a helpful assistant.",
    "There are 2 cats and 13 dogs on the table.",
    "user assistant system",
    "图片",
]


@pytest.fixture(scope="module")
def library() -> Tokenizer:
    """A byte-level tokenizer that splits digits, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def pieces(library: Tokenizer) -> list[str]:
    vocabulary = library.get_vocab()
    return sorted(vocabulary, key=lambda piece: vocabulary[piece])


class Recipe:
    """A GGUF file to be written: change what a test wants otherwise, then `write`."""

    def __init__(self, library: Tokenizer, pieces: list[str]) -> None:
        self.settings: dict[str, Any] = {
            "llama.block_count": LAYERS,
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": MLP,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.rope.freq_base": 100000.0,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": HEAD_DIM,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": [3 if piece in SPECIALS else 1 for piece in pieces],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": CHATML,
        }
        self.architecture = "llama"
        self.quantisation = GGMLQuantizationType.F32
        draw = np.random.default_rng(3)
        shapes = {"token_embd": (len(pieces), HIDDEN), "output_norm": (HIDDEN,)}
        for layer in range(LAYERS):
            shapes |= {
                f"blk.{layer}.attn_norm": (HIDDEN,),
                f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
                f"blk.{layer}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
                f"blk.{layer}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
                f"blk.{layer}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
                f"blk.{layer}.ffn_norm": (HIDDEN,),
                f"blk.{layer}.ffn_gate": (MLP, HIDDEN),
                f"blk.{layer}.ffn_up": (MLP, HIDDEN),
                f"blk.{layer}.ffn_down": (HIDDEN, MLP),
            }
        self.tensors = {
            f"{name}.weight": draw.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
            for name, shape in shapes.items()
        }

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        for key, value in self.settings.items():
            self._add(writer, key, value)
        for name, tensor in self.tensors.items():
            kind = GGMLQuantizationType.F32 if tensor.ndim == 1 else self.quantisation
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    @staticmethod
    def _add(writer: GGUFWriter, key: str, value: Any) -> None:
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)


@pytest.fixture
def recipe(library: Tokenizer, pieces: list[str]) -> Recipe:
    return Recipe(library, pieces)


# -- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own output matrix"])
def test_every_weight_is_what_transformers_reads(tmp_path: Path, recipe: Recipe, kind: str, tied: bool) -> None:
    recipe.quantisation = GGMLQuantizationType[kind]
    if not tied:
        recipe.tensors["output.weight"] = -recipe.tensors["token_embd.weight"]
    source = recipe.write(tmp_path / "model.gguf")
    folder = convert_gguf(source, tmp_path / "checkpoint")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in stored.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_model_runs_as_transformers_runs_it(tmp_path: Path, recipe: Recipe) -> None:
    source = recipe.write(tmp_path / "model.gguf")
    folder = convert_gguf(source, tmp_path / "checkpoint")
    config = read_model_config(folder)
    assert (config.bos_id, config.eos_ids, config.max_context) == (1, (2,), 128)
    assert (config.language.rope_theta, config.language.norm_eps, config.language.is_tied) == (1e5, 1e-5, True)
    ours = load_language_model(folder, config, dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32).eval()
    ids = torch.arange(3, 43)
    with torch.inference_mode():
        hidden = ours(ours.embed(ids), torch.arange(40), DenseAttend(LAYERS))
        torch.testing.assert_close(ours.logits(hidden), theirs(ids[None]).logits[0], atol=2e-5, rtol=1e-5)


def test_half_the_room(tmp_path: Path, recipe: Recipe) -> None:
    source = recipe.write(tmp_path / "model.gguf")
    exact = load_file(convert_gguf(source, tmp_path / "exact") / "model.safetensors")
    short = load_file(convert_gguf(source, tmp_path / "short", dtype="bfloat16") / "model.safetensors")
    for name, tensor in short.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16())


# -- tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["smollm", "gpt-2"])
def test_the_tokenizer_is_the_one_that_went_in(tmp_path: Path, recipe: Recipe, library: Tokenizer, rule: str) -> None:
    recipe.settings["tokenizer.ggml.pre"] = rule
    folder = convert_gguf(recipe.write(tmp_path / "model.gguf"), tmp_path / "checkpoint")
    wanted = Tokenizer.from_str(library.to_str())
    if rule == "gpt-2":
        wanted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("<|im_start|>user\nThere are 1313 cats, aren't there?<|im_end|>\n", "  naïve 图 🙂\t½ \n\n x", ""):
        assert ours.encode_parsed(text) == wanted.encode(text).ids
        assert theirs.encode(text) == wanted.encode(text).ids
    assert ours.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert not ours.adds_bos


def test_a_begin_token_is_added_where_the_file_says_so(tmp_path: Path, recipe: Recipe) -> None:
    recipe.settings["tokenizer.ggml.add_bos_token"] = True
    folder = convert_gguf(recipe.write(tmp_path / "model.gguf"), tmp_path / "checkpoint")
    assert load_tokenizer(folder).adds_bos
    assert AutoTokenizer.from_pretrained(folder).encode("on")[0] == 1


def test_words_added_to_the_vocabulary_are_shown(tmp_path: Path, recipe: Recipe, pieces: list[str]) -> None:
    recipe.settings["tokenizer.ggml.tokens"] = [*pieces[:-1], "<tool>"]
    recipe.settings["tokenizer.ggml.merges"] = [
        merge for merge in recipe.settings["tokenizer.ggml.merges"] if merge.replace(" ", "") != pieces[-1]
    ]
    recipe.settings["tokenizer.ggml.token_type"][-1] = 4
    tokenizer = load_tokenizer(convert_gguf(recipe.write(tmp_path / "model.gguf"), tmp_path / "checkpoint"))
    assert tokenizer.encode_parsed("on<tool>on")[1] == len(pieces) - 1
    assert "<tool>" not in tokenizer.special_ids


def test_the_chat_template_travels(tmp_path: Path, recipe: Recipe) -> None:
    folder = convert_gguf(recipe.write(tmp_path / "model.gguf"), tmp_path / "checkpoint")
    assert load_template(read_model_config(folder).family, folder).eos_ids == (2,)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template([{"role": "user", "content": "on"}], tokenize=False) == (
        "<|im_start|>user\non<|im_end|>\n"
    )


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.rope.scaling.type", "yarn", "rotary"),
        ("llama.rope.dimension_count", 8, "part of each head"),
        ("tokenizer.ggml.model", "llama", "'llama'"),
        ("tokenizer.ggml.pre", "tekken", "'tekken'"),
        ("tokenizer.ggml.add_space_prefix", True, "space"),
        ("tokenizer.ggml.tokens", ["a", "b", "a"], "twice"),
        ("llama.embedding_length", None, "llama.embedding_length"),
        ("tokenizer.ggml.merges", ["on off"], "merges"),
        ("tokenizer.ggml.eos_token_id", 9999, "outside"),
        ("tokenizer.ggml.eos_token_id", None, "tokenizer.ggml.eos_token_id"),
    ],
)
def test_settings_we_cannot_follow(tmp_path: Path, recipe: Recipe, key: str, value: Any, named: str) -> None:
    recipe.settings[key] = value
    source = recipe.write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=named):
        convert_gguf(source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "blk.x.attn"])
def test_tensors_that_would_be_lost(tmp_path: Path, recipe: Recipe, name: str) -> None:
    recipe.tensors[name] = np.zeros(HIDDEN, dtype=np.float32)
    with pytest.raises(CheckpointError, match="not supported" if name.startswith("rope") else name):
        convert_gguf(recipe.write(tmp_path / "model.gguf"), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_another_architecture(tmp_path: Path, recipe: Recipe) -> None:
    recipe.architecture = "qwen2"
    with pytest.raises(CheckpointError, match="'qwen2'"):
        convert_gguf(recipe.write(tmp_path / "model.gguf"), tmp_path / "checkpoint")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4" + bytes(200))
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "checkpoint")


def test_a_folder_in_use_is_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    source = recipe.write(tmp_path / "model.gguf")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "mine").write_text("x")
    with pytest.raises(ConfigError, match="choose another"):
        convert_gguf(source, folder)
    (folder / "mine").unlink()
    assert convert_gguf(source, folder) == folder  # an empty one will do
