"""Every stored tensor's place in our parameters, as a table that is read both ways.

The official checkpoints keep q, k, v and gate, up apart; we keep them as rows of one matrix. So each official name
owns a run of rows of one of our parameters. Loading copies into those rows, writing a checkpoint copies out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from omnilmm.config import Family
from omnilmm.models.config import LanguageConfig, ModelConfig, ResamplerConfig, VisionConfig


class Part(StrEnum):
    """The halves of a checkpoint by what they do; vision and resampler are loaded together."""

    VISION = "vision"
    RESAMPLER = "resampler"
    LANGUAGE = "language"


ENCODER_PARTS = frozenset({Part.VISION, Part.RESAMPLER})
LANGUAGE_PARTS = frozenset({Part.LANGUAGE})


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where the tensor stored as `name` lives: rows `offset` to `offset + shape[0]` of `parameter`.

    `parameter` is a name within ImageEncoder for the parts vision and resampler, within LanguageModel for language.
    An optional tensor may be left out of a checkpoint and is left out of those we write: its rows belong to another
    name too, and where both are stored they must agree.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    parameter: str
    offset: int = 0
    is_optional: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.offset, self.offset + self.shape[0])


_PREFIXES: Mapping[Family, Mapping[Part, str]] = {
    Family.OMNILMM_12B: {Part.VISION: "model.vision_tower.", Part.RESAMPLER: "model.resampler.", Part.LANGUAGE: ""},
    Family.OMNILMM_3B: {Part.VISION: "vpm.", Part.RESAMPLER: "resampler.", Part.LANGUAGE: "llm."},
    Family.TEXT: {Part.LANGUAGE: ""},
}

IGNORED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)
"""Stored names that carry nothing: rotary frequencies, which transformers wrote out before 4.32 and everyone derives
from the config."""

_Row = tuple[str, tuple[int, ...], str, int]  # official name, shape, our parameter, offset


def checkpoint_layout(config: ModelConfig) -> Mapping[str, TensorSlot]:
    """Official name -> slot for every tensor a checkpoint of this model holds, vision first."""
    tables: list[tuple[Part, Iterator[_Row]]] = []
    if config.vision is not None and config.resampler is not None:
        tables.append((Part.VISION, _vision_rows(config.vision)))
        tables.append((Part.RESAMPLER, _resampler_rows(config.resampler)))
    tables.append((Part.LANGUAGE, _language_rows(config.language)))
    slots: dict[str, TensorSlot] = {}
    for part, rows in tables:
        prefix = _PREFIXES[config.family][part]
        for official, shape, parameter, offset in rows:
            is_optional = official == "lm_head.weight" and config.language.is_tied
            slots[prefix + official] = TensorSlot(prefix + official, shape, part, parameter, offset, is_optional)
    return slots


def is_ignored(name: str) -> bool:
    """Whether a stored tensor may be passed over."""
    return name.endswith(IGNORED_SUFFIXES)


def _norm(official: str, ours: str, width: int) -> Iterator[_Row]:
    yield f"{official}.weight", (width,), f"{ours}.weight", 0
    yield f"{official}.bias", (width,), f"{ours}.bias", 0


def _linear(official: str, ours: str, rows: int, columns: int) -> Iterator[_Row]:
    yield f"{official}.weight", (rows, columns), f"{ours}.weight", 0
    yield f"{official}.bias", (rows,), f"{ours}.bias", 0


def _vision_rows(config: VisionConfig) -> Iterator[_Row]:
    width, prefix = config.width, int(config.has_class_token)
    patch = (width, 3, config.patch, config.patch)
    if config.has_class_token:
        yield "cls_token", (1, 1, width), "vision.class_token", 0
    yield "pos_embed", (1, prefix + config.native_grid**2, width), "vision.pos_embed", 0
    yield "patch_embed.proj.weight", patch, "vision.patch_embed.weight", 0
    yield "patch_embed.proj.bias", (width,), "vision.patch_embed.bias", 0
    for index in range(config.num_blocks):
        official, ours = f"blocks.{index}", f"vision.blocks.{index}"
        yield from _norm(f"{official}.norm1", f"{ours}.norm1", width)
        yield f"{official}.attn.qkv.weight", (3 * width, width), f"{ours}.attention.qkv.weight", 0
        if config.has_key_bias:
            yield f"{official}.attn.qkv.bias", (3 * width,), f"{ours}.attention.qkv.bias", 0
        else:  # the rows between belong to no stored tensor and stay zero
            yield f"{official}.attn.q_bias", (width,), f"{ours}.attention.qkv.bias", 0
            yield f"{official}.attn.v_bias", (width,), f"{ours}.attention.qkv.bias", 2 * width
        yield from _linear(f"{official}.attn.proj", f"{ours}.attention.out", width, width)
        yield from _norm(f"{official}.norm2", f"{ours}.norm2", width)
        yield from _linear(f"{official}.mlp.fc1", f"{ours}.mlp.fc1", config.mlp_width, width)
        yield from _linear(f"{official}.mlp.fc2", f"{ours}.mlp.fc2", width, config.mlp_width)
    yield from _norm("norm", "vision.norm", width)


def _resampler_rows(config: ResamplerConfig) -> Iterator[_Row]:
    hidden = config.hidden
    yield "query", (config.num_query, hidden), "resampler.query", 0
    yield "pos_embed", (config.num_query, hidden), "resampler.pos_embed", 0
    yield "kv_proj.weight", (hidden, config.vision_width), "resampler.kv_proj.weight", 0
    yield from _norm("ln_q", "resampler.norm_q", hidden)
    yield from _norm("ln_kv", "resampler.norm_kv", hidden)
    yield "attn.in_proj_weight", (3 * hidden, hidden), "resampler.in_proj.weight", 0
    yield "attn.in_proj_bias", (3 * hidden,), "resampler.in_proj.bias", 0
    yield from _linear("attn.out_proj", "resampler.out", hidden, hidden)
    yield from _norm("ln_post", "resampler.norm_post", hidden)
    yield "proj", (hidden, hidden), "resampler.proj", 0


def _language_rows(config: LanguageConfig) -> Iterator[_Row]:
    hidden, mlp, vocab = config.hidden, config.mlp_width, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (vocab, hidden), "embedding.weight", 0
    for index in range(config.num_layers):
        official, ours = f"model.layers.{index}", f"layers.{index}"
        yield f"{official}.input_layernorm.weight", (hidden,), f"{ours}.attention_norm.weight", 0
        yield f"{official}.self_attn.q_proj.weight", (q, hidden), f"{ours}.attention.qkv.weight", 0
        yield f"{official}.self_attn.k_proj.weight", (kv, hidden), f"{ours}.attention.qkv.weight", q
        yield f"{official}.self_attn.v_proj.weight", (kv, hidden), f"{ours}.attention.qkv.weight", q + kv
        yield f"{official}.self_attn.o_proj.weight", (hidden, q), f"{ours}.attention.out.weight", 0
        yield f"{official}.post_attention_layernorm.weight", (hidden,), f"{ours}.mlp_norm.weight", 0
        yield f"{official}.mlp.gate_proj.weight", (mlp, hidden), f"{ours}.mlp.gate_up.weight", 0
        yield f"{official}.mlp.up_proj.weight", (mlp, hidden), f"{ours}.mlp.gate_up.weight", mlp
        yield f"{official}.mlp.down_proj.weight", (hidden, mlp), f"{ours}.mlp.down.weight", 0
    yield "model.norm.weight", (hidden,), "norm.weight", 0
    yield "lm_head.weight", (vocab, hidden), "embedding.weight" if config.is_tied else "head.weight", 0
