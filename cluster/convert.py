"""A GGUF file of the Llama architecture as a checkpoint folder that this library, transformers and others load.

GGUF is how llama.cpp keeps models: one file with the weights, often quantised, the settings and the tokenizer. Three
things have to be undone on the way out: the quantisation, the order of the rows of the query and key projections
(llama.cpp turns neighbouring elements in rotary embeddings, everyone else an element of one half with its counterpart
in the other; convert_hf_to_gguf.py, LlamaModel.permute), and the tensors' names.

Needs the package `gguf`, which the extra "convert" installs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.weights import torch_dtype

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_CONTROL, _USER_DEFINED = 3, 4  # of llama.cpp's token types: control tokens, and words added to the vocabulary

_OUTER_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert_gguf(gguf: Path, folder: Path, *, dtype: str = "float32") -> Path:
    """Write the model in `gguf` to `folder`, which must not exist or be empty. It appears whole or not at all.

    The folder gets config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json
    with the chat template. Weights become `dtype`; float32 keeps every number exactly as the quantised file means it,
    bfloat16 takes half the room. The whole model is in memory at once.

    Returns:
        `folder`.

    Raises:
        CheckpointError: the file cannot be read, or holds something that would be lost: another architecture, scaled
            rotary positions, biases, experts, a tokenizer of another kind.
        ConfigError: the `gguf` package is missing, `folder` holds files, or `dtype` is unknown.
    """
    wanted = torch_dtype(dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("The folder for the converted checkpoint holds files already; choose another one.")
    source = _Source(_open(gguf))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that died
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", _model_config(source, dtype))
        _write_json(partial / "generation_config.json", _token_ids(source))
        _write_json(partial / "tokenizer_config.json", _tokenizer_config(source))
        _tokenizer(source).save(str(partial / "tokenizer.json"))
        weights = {name: tensor.to(wanted).contiguous() for name, tensor in _weights(source)}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- reading ------------------------------------------------------------------------------------------


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError('Converting needs the package gguf: pip install "omnilmm-serve[convert]".') from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path.name} cannot be read as a GGUF file.") from error


class _Source:
    """The settings of a GGUF file by their names, and its tensors."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.tensors: Mapping[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"The GGUF file holds a model of the architecture {architecture!r}, not 'llama'.")
        if self.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self.tensors:
            raise CheckpointError("The GGUF file asks for scaled rotary positions, which are not supported.")

    def get(self, key: str, default: Any = None) -> Any:
        """A setting as a plain value or list."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"The GGUF file lacks the setting {key}.")
        return value

    @property
    def num_heads(self) -> int:
        return int(self.need("llama.attention.head_count"))

    @property
    def num_kv_heads(self) -> int:
        return int(self.get("llama.attention.head_count_kv", self.num_heads))

    @property
    def head_dim(self) -> int:
        default = self.need("llama.embedding_length") // self.num_heads
        head_dim = int(self.get("llama.attention.key_length", default))
        if self.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError("The GGUF file turns only a part of each head, which is not supported.")
        return head_dim


# -- settings -----------------------------------------------------------------------------------------


def _model_config(source: _Source, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        **_token_ids(source),
        "head_dim": source.head_dim,
        "hidden_act": "silu",
        "hidden_size": source.need("llama.embedding_length"),
        "intermediate_size": source.need("llama.feed_forward_length"),
        "max_position_embeddings": source.need("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": source.num_heads,
        "num_hidden_layers": source.need("llama.block_count"),
        "num_key_value_heads": source.num_kv_heads,
        "rms_norm_eps": _shortest(source.need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(source.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "torch_dtype": dtype,
        "vocab_size": len(source.need("tokenizer.ggml.tokens")),
    }


def _shortest(number: float) -> float:
    """The number that was meant: the shortest that has the same float32, in which GGUF keeps settings (1e-05)."""
    digits = (f"{number:.{count}g}" for count in range(1, 18))
    bits = torch.tensor(number)
    return next(float(text) for text in digits if torch.tensor(float(text)) == bits)


def _token_ids(source: _Source) -> dict[str, int]:
    ids = {"bos": source.need("tokenizer.ggml.bos_token_id"), "eos": source.need("tokenizer.ggml.eos_token_id")}
    ids["pad"] = source.get("tokenizer.ggml.padding_token_id", ids["eos"])
    if max(ids.values()) >= len(source.need("tokenizer.ggml.tokens")):
        raise CheckpointError("The GGUF file names a token that is outside its vocabulary.")
    return {f"{role}_token_id": int(token_id) for role, token_id in ids.items()}


# -- weights ------------------------------------------------------------------------------------------


def _weights(source: _Source) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its usual name, dequantised to float32."""
    for name, stored in source.tensors.items():
        official = _official_name(name)
        tensor = _dequantised(stored)
        if name.endswith("attn_q.weight"):
            tensor = _halves_apart(tensor, source.num_heads)
        elif name.endswith("attn_k.weight"):
            tensor = _halves_apart(tensor, source.num_kv_heads)
        yield official, tensor


def _official_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    if name.startswith("blk.") and block.isdecimal() and rest in _LAYER_NAMES:
        return f"model.layers.{block}.{_LAYER_NAMES[rest]}"
    raise CheckpointError(f"The GGUF file holds the tensor {name}, which has no place in a plain Llama model.")


def _dequantised(stored: ReaderTensor) -> Tensor:
    from gguf import dequantize

    try:
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
    except NotImplementedError as error:
        kind = stored.tensor_type.name
        raise CheckpointError(f"The tensor {stored.name} is quantised as {kind}, which is not supported.") from error


def _halves_apart(weight: Tensor, num_heads: int) -> Tensor:
    """Rows (num_heads * head_dim, columns) with the pairs of each head taken apart: 0 2 4 ... 1 3 5 ..."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# -- tokenizer ----------------------------------------------------------------------------------------


def _tokenizer(source: _Source) -> Tokenizer:
    """Byte-level BPE with the file's own pieces, merges and control tokens."""
    kind = source.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"The GGUF file has a tokenizer of the kind {kind!r}; only byte-level BPE is supported.")
    rule = source.get("tokenizer.ggml.pre", "gpt-2")
    if rule not in _SPLITTERS:
        raise CheckpointError(f"The GGUF file splits text by the rule {rule!r}, not one of {', '.join(_SPLITTERS)}.")
    if source.get("tokenizer.ggml.add_space_prefix", False):
        raise CheckpointError("The GGUF file puts a space in front of every text, which byte-level BPE here does not.")
    pieces: Sequence[str] = source.need("tokenizer.ggml.tokens")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    kinds: Sequence[int] = source.need("tokenizer.ggml.token_type")
    if not len(vocabulary) == len(pieces) == len(kinds):
        raise CheckpointError("The GGUF file's vocabulary holds a token twice, or one without a type.")
    merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError("The GGUF file's merges do not fit its vocabulary.") from error
    tokenizer.pre_tokenizer = _SPLITTERS[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(pieces[i], special=True) for i, k in enumerate(kinds) if k == _CONTROL])
    added = [AddedToken(pieces[i], normalized=False) for i, k in enumerate(kinds) if k == _USER_DEFINED]
    tokenizer.add_tokens(added)
    if source.get("tokenizer.ggml.add_bos_token", False):
        bos_id = _token_ids(source)["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[bos_id]} $A", special_tokens=[(pieces[bos_id], bos_id)]
        )
    return tokenizer


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_SPLITTERS: Mapping[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
}
"""How text is cut before BPE, by llama.cpp's names (llama-vocab.cpp)."""


def _tokenizer_config(source: _Source) -> dict[str, Any]:
    pieces: Sequence[str] = source.need("tokenizer.ggml.tokens")
    ids = _token_ids(source)
    config: dict[str, Any] = {
        "add_bos_token": source.get("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": False,
        "bos_token": pieces[ids["bos_token_id"]],
        "chat_template": source.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": pieces[ids["eos_token_id"]],
        "model_max_length": source.need("llama.context_length"),
        "pad_token": pieces[ids["pad_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {key: value for key, value in config.items() if value is not None}
