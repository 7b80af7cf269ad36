"""What a checkpoint's config.json says, as frozen records: one per part of the model, composed.

Field names in the JSON files are the official ones of OmniLMM-12B (`model_type` "omnilmm"), MiniCPM-V 1.0
("minicpmv") and of Llama-type text models ("llama", "mistral", "minicpm"). A setting that would change the
maths and that we do not implement is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from omnilmm.config import Family, ImagePolicy, InputHandling
from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.fields import Fields

RESAMPLER_HEAD_DIM = 128
"""Both families' resamplers cut the hidden size into heads of this width."""


class VisionStyle(StrEnum):
    """The two towers. They share everything but the three properties of VisionConfig that ask for the style."""

    EVA = "eva"  # EVA02-E/14+ as in timm's eva02_enormous_patch14_clip_224
    SIGLIP = "siglip"  # SigLIP so400m/14 as in timm's vit_so400m_patch14_siglip_384


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A ViT. Sides are in pixels; `num_blocks` counts the blocks that are stored and run."""

    style: VisionStyle
    width: int
    num_blocks: int
    num_heads: int
    mlp_width: int
    patch: int
    native_side: int  # the stored position table belongs to pictures of this side
    side: int  # pictures are this large when the model runs
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def native_grid(self) -> int:
        return self.native_side // self.patch

    @property
    def grid(self) -> int:
        return self.side // self.patch

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def has_class_token(self) -> bool:
        return self.style is VisionStyle.EVA

    @property
    def is_post_norm(self) -> bool:
        """Residual branches are normalised after they are computed: x + norm(f(x)) instead of x + f(norm(x))."""
        return self.style is VisionStyle.EVA

    @property
    def has_key_bias(self) -> bool:
        return self.style is VisionStyle.SIGLIP


@dataclass(frozen=True, slots=True)
class ResamplerConfig:
    """One cross-attention layer from `num_query` learned queries to the patches."""

    num_query: int
    hidden: int
    vision_width: int
    norm_eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        return self.hidden // RESAMPLER_HEAD_DIM

    @property
    def native_grid(self) -> int:
        """Side of the stored position table, which has one entry per query."""
        return math.isqrt(self.num_query)


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """A decoder of the Llama family. The last three fields are MiniCPM's and mean nothing where they are left out."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    max_context: int  # positions, prompt and answer together
    norm_eps: float
    rope_theta: float
    is_tied: bool = False  # the output matrix is the input embedding
    scale_emb: float = 1.0  # factor on text embeddings; picture vectors are not scaled
    scale_depth: float | None = None
    dim_model_base: int | None = None

    @property
    def residual_scale(self) -> float:
        """Factor on every residual branch."""
        return 1.0 if self.scale_depth is None else self.scale_depth / math.sqrt(self.num_layers)

    @property
    def logit_divisor(self) -> float:
        """The last hidden state is divided by this before the output matrix."""
        return 1.0 if self.dim_model_base is None else self.hidden / self.dim_model_base


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint. `vision` and `resampler` are None in a text-only model."""

    family: Family
    vision: VisionConfig | None
    resampler: ResamplerConfig | None
    language: LanguageConfig
    bos_id: int
    eos_ids: tuple[int, ...]

    @property
    def max_context(self) -> int:
        return self.language.max_context

    @property
    def num_image_tokens(self) -> int:
        """Token positions that one picture fills."""
        return 0 if self.resampler is None else self.resampler.num_query

    def image_policy(self, handling: InputHandling) -> ImagePolicy:
        """How a picture becomes this model's pixels.

        Raises:
            ConfigError: the model takes no pictures.
        """
        if self.vision is None:
            raise ConfigError("A text-only model takes no pictures.")
        mean, std = _NORMALISATION[self.vision.style]
        return ImagePolicy(side=self.vision.side, mean=mean, std=std, handling=handling)


_Channels = tuple[float, float, float]

# CLIP's own statistics for the tower trained by CLIP's recipe; one half everywhere for SigLIP (timm's
# OPENAI_CLIP_MEAN/STD and IMAGENET_INCEPTION_MEAN/STD).
_NORMALISATION: Mapping[VisionStyle, tuple[_Channels, _Channels]] = {
    VisionStyle.EVA: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    VisionStyle.SIGLIP: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

# Sizes of the official towers, under the keys of `vision_config_override`. Their config.json files only name them.
_FULL_TOWERS: Mapping[VisionStyle, Mapping[str, int]] = {
    VisionStyle.EVA: {
        "embed_dim": 1792,
        "depth": 64,
        "num_heads": 16,
        "mlp_hidden_dim": 15360,
        "patch_size": 14,
        "img_size": 224,
    },
    VisionStyle.SIGLIP: {
        "embed_dim": 1152,
        "depth": 27,
        "num_heads": 16,
        "mlp_hidden_dim": 4304,
        "patch_size": 14,
        "img_size": 384,
    },
}

_SIGLIP_NAME = "vit_so400m_patch14_siglip_384"

_FAMILIES: Mapping[str, Family] = {
    "omnilmm": Family.OMNILMM_12B,
    "minicpmv": Family.OMNILMM_3B,
    "llama": Family.TEXT,
    "mistral": Family.TEXT,
    "minicpm": Family.TEXT,
}

_SCALED_TYPES = frozenset({"minicpm", "minicpmv"})


def read_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` (and the end tokens of `generation_config.json`, where there is one) of a checkpoint.

    Raises:
        CheckpointError: a file is missing or is not JSON, a key is missing or has a value of the wrong kind, or a
            setting asks for something we do not implement. The message names the key.
    """
    fields = Fields("config.json", _read_json(folder / "config.json"))
    model_type = fields.text("model_type")
    family = _FAMILIES.get(model_type)
    if family is None:
        raise fields.refuse("model_type", f"is {model_type!r}, not one of {', '.join(_FAMILIES)}")
    _refuse_unsupported(fields)
    language = _language(fields, model_type)
    vision = _vision(fields, family)
    resampler = None if vision is None else _resampler(fields, family, vision, language.hidden)
    bos_id, *_ = _token_ids(fields, "bos_token_id", language.vocab_size)
    eos_fields = fields
    generation = folder / "generation_config.json"
    if generation.is_file():
        candidate = Fields(generation.name, _read_json(generation))
        eos_fields = candidate if candidate.has("eos_token_id") else fields
    return ModelConfig(
        family=family,
        vision=vision,
        resampler=resampler,
        language=language,
        bos_id=bos_id,
        eos_ids=_token_ids(eos_fields, "eos_token_id", language.vocab_size),
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"The checkpoint has no {path.name}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read as JSON.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} does not hold a JSON object.")
    return value


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse the settings that change the maths away from what is implemented here."""
    fields.must_be("hidden_act", "silu", default="silu")
    fields.must_be("attention_bias", False, default=False)
    fields.must_be("mlp_bias", False, default=False)
    fields.must_be("partial_rotary_factor", 1.0, default=1.0)
    fields.must_be("mm_use_im_start_end", True, default=True)
    fields.must_be("slice_mode", False, default=False)  # later MiniCPM-V models cut pictures into slices
    fields.must_be("quantization_config", None, default=None)
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.mapping(key)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise fields.refuse(key, f"asks for {kind!r} rotary scaling, which is not supported")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise fields.refuse(key, "asks for partial rotary positions, which are not supported")


def _language(fields: Fields, model_type: str) -> LanguageConfig:
    hidden, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", "does not divide num_attention_heads")
    if not fields.has("head_dim") and hidden % num_heads:
        raise fields.refuse("num_attention_heads", "does not divide hidden_size")
    max_positions = fields.count("max_position_embeddings")
    # transformers 5 moved the base frequency into rope_parameters; the official files have it at the top.
    rope = Fields(fields.file, fields.mapping("rope_parameters"))
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta", default=10000.0)
    is_scaled = model_type in _SCALED_TYPES
    return LanguageConfig(
        hidden=hidden,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_even(fields, fields.count("head_dim", default=hidden // num_heads)),
        mlp_width=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        # Up to the window a sliding-window model attends to everything, so no windowed attention is needed.
        max_context=min(max_positions, fields.count("sliding_window", default=max_positions)),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        # Where the key is left out, the class of the official model decides: MiniCPM's text model ties.
        is_tied=fields.flag("tie_word_embeddings", default=model_type == "minicpm"),
        scale_emb=fields.number("scale_emb") if is_scaled else 1.0,
        scale_depth=fields.number("scale_depth") if is_scaled else None,
        dim_model_base=fields.count("dim_model_base") if is_scaled else None,
    )


def _even(fields: Fields, head_dim: int) -> int:
    if head_dim % 2:
        raise fields.refuse("head_dim", "is odd, so rotary positions have no halves")
    return head_dim


def _vision(fields: Fields, family: Family) -> VisionConfig | None:
    if family is Family.TEXT:
        return None
    if family is Family.OMNILMM_12B:
        # `mm_vision_tower` is not looked at: the original builds this tower whatever the key says.
        style, drops_last = VisionStyle.EVA, True
    else:
        style, drops_last = VisionStyle.SIGLIP, fields.flag("drop_vision_last_layer", default=True)
        if not fields.text("vision_encoder").startswith(_SIGLIP_NAME):
            raise fields.refuse("vision_encoder", f"is not {_SIGLIP_NAME}, the only tower of this family")
    tower = Fields(f"{fields.file}: vision_config_override", fields.mapping("vision_config_override"))
    sizes = {key: tower.count(key, default=size) for key, size in _FULL_TOWERS[style].items()}
    side, patch = fields.count("image_size", default=448), sizes["patch_size"]
    if side % patch:
        raise fields.refuse("image_size", f"is not a multiple of the patch size {patch}")
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise tower.refuse("num_heads", "does not divide embed_dim")
    return VisionConfig(
        style=style,
        width=sizes["embed_dim"],
        num_blocks=sizes["depth"] - drops_last,
        num_heads=sizes["num_heads"],
        mlp_width=sizes["mlp_hidden_dim"],
        patch=patch,
        native_side=sizes["img_size"],
        side=side,
    )


def _resampler(fields: Fields, family: Family, vision: VisionConfig, hidden: int) -> ResamplerConfig:
    key = "num_query" if family is Family.OMNILMM_12B else "query_num"
    num_query = fields.count(key)
    if math.isqrt(num_query) ** 2 != num_query:
        raise fields.refuse(key, "is not a square number")
    if hidden % RESAMPLER_HEAD_DIM:
        raise fields.refuse("hidden_size", f"is not a multiple of {RESAMPLER_HEAD_DIM}, the resampler's head width")
    return ResamplerConfig(num_query=num_query, hidden=hidden, vision_width=vision.width)


def _token_ids(fields: Fields, key: str, vocab_size: int) -> tuple[int, ...]:
    ids = fields.ids(key)
    if any(token_id >= vocab_size for token_id in ids):
        raise fields.refuse(key, "is outside the vocabulary")
    return ids
