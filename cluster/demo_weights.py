"""Settings and random weights of the demonstration checkpoints, under the tensor names of the official ones.

`vision_config_override` is the only key of `config.json` that is not official: the sizes of the small vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from omnilmm.config import Family

HIDDEN = 256  # a multiple of 128, the width of one head of the resampler
INTERMEDIATE = 64
LAYERS = 2
HEADS = 8
KV_HEADS_12B = 2
GRID = 8  # the resampler's queries form a square of 8 x 8
VISION_WIDTH = 48
VISION_DEPTH = 3  # counts the last block, which neither family stores
NATIVE_SIDE = 140  # pixels; the position table made for this size is enlarged to IMAGE_SIDE
IMAGE_SIDE = 448
PATCH = 14
MLP_RATIO_12B = 15360 / 1792
MLP_RATIO_3B = 3.7362
DIM_MODEL_BASE = 64  # HIDDEN / 64 divides the logits of the 3B family
SCALE_EMB = 12
EOS_ID = 2

Shapes = dict[str, tuple[int, ...]]


def model_config(family: Family, vocab_size: int) -> dict[str, Any]:
    """The content of `config.json`."""
    config = {
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_size": IMAGE_SIDE,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "mm_use_im_start_end": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vision_config_override": {
            "depth": VISION_DEPTH,
            "embed_dim": VISION_WIDTH,
            "img_size": NATIVE_SIDE,
            "mlp_hidden_dim": _mlp_width(family),
            "mlp_ratio": MLP_RATIO_12B if family is Family.OMNILMM_12B else MLP_RATIO_3B,
            "num_heads": 4,
            "patch_size": PATCH,
        },
        "vocab_size": vocab_size,
    }
    if family is Family.OMNILMM_12B:
        return config | {
            "architectures": ["OmniLMMForCausalLM"],
            "max_position_embeddings": 32768,
            "mm_vision_tower": "eva02_enormous_patch14_clip_224.laion2b_plus",
            "model_type": family.value,
            "num_key_value_heads": KV_HEADS_12B,
            "num_query": GRID * GRID,
            "pad_token_id": EOS_ID,
            "sliding_window": 4096,
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }
    return config | {
        "architectures": ["MiniCPMV"],
        "attention_bias": False,
        "dim_model_base": DIM_MODEL_BASE,
        "drop_vision_last_layer": True,
        "max_position_embeddings": 4096,
        "model_type": family.value,
        "num_key_value_heads": HEADS,
        "pretraining_tp": 1,
        "query_num": GRID * GRID,
        "rope_scaling": None,
        "scale_depth": 1.4,
        "scale_emb": SCALE_EMB,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
    }


def model_weights(family: Family, vocab_size: int, word_ids: Sequence[int], seed: int) -> dict[str, torch.Tensor]:
    """Every stored tensor, bfloat16, by its official name; the same for the same seed.

    Only `word_ids` and the end token get rows in the output matrix that are not zero, so an answer never shows a
    fragment, a reserved token or a picture token: some word's logit is always above 0.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _shapes(family, vocab_size).items():
        if name.endswith("resampler.pos_embed"):
            tensor = _sincos_table()
        else:
            mean, std = _spread(family, name, shape)
            tensor = mean + std * torch.randn(shape, generator=generator)
        if name.endswith("lm_head.weight"):
            spoken = torch.zeros(vocab_size, 1)
            spoken[[EOS_ID, *word_ids]] = 1
            tensor = tensor * spoken
        weights[name] = tensor.to(torch.bfloat16)
    return weights


def _shapes(family: Family, vocab_size: int) -> Shapes:
    if family is Family.OMNILMM_12B:
        return {
            **_decoder_shapes("", vocab_size, kv_heads=KV_HEADS_12B),
            **_vision_shapes("model.vision_tower.", family),
            **_resampler_shapes("model.resampler."),
        }
    return {
        **_decoder_shapes("llm.", vocab_size, kv_heads=HEADS),
        **_vision_shapes("vpm.", family),
        **_resampler_shapes("resampler."),
    }


def _decoder_shapes(prefix: str, vocab_size: int, *, kv_heads: int) -> Shapes:
    kv_width = HIDDEN // HEADS * kv_heads
    shapes: Shapes = {f"{prefix}model.embed_tokens.weight": (vocab_size, HIDDEN)}
    for index in range(LAYERS):
        layer = f"{prefix}model.layers.{index}."
        shapes |= {
            f"{layer}input_layernorm.weight": (HIDDEN,),
            f"{layer}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}self_attn.k_proj.weight": (kv_width, HIDDEN),
            f"{layer}self_attn.v_proj.weight": (kv_width, HIDDEN),
            f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return shapes | {f"{prefix}model.norm.weight": (HIDDEN,), f"{prefix}lm_head.weight": (vocab_size, HIDDEN)}


def _vision_shapes(prefix: str, family: Family) -> Shapes:
    """EVA02 has a class token and biases on q and v only; SigLIP has neither token nor exception."""
    width, mlp_width, positions = VISION_WIDTH, _mlp_width(family), (NATIVE_SIDE // PATCH) ** 2
    has_class_token = family is Family.OMNILMM_12B
    shapes: Shapes = {
        f"{prefix}patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        f"{prefix}patch_embed.proj.bias": (width,),
        f"{prefix}pos_embed": (1, positions + has_class_token, width),
    }
    if has_class_token:
        shapes[f"{prefix}cls_token"] = (1, 1, width)
    for index in range(VISION_DEPTH - 1):
        block = f"{prefix}blocks.{index}."
        shapes |= {
            f"{block}norm1.weight": (width,),
            f"{block}norm1.bias": (width,),
            f"{block}attn.qkv.weight": (3 * width, width),
            **(
                {f"{block}attn.q_bias": (width,), f"{block}attn.v_bias": (width,)}
                if has_class_token
                else {f"{block}attn.qkv.bias": (3 * width,)}
            ),
            f"{block}attn.proj.weight": (width, width),
            f"{block}attn.proj.bias": (width,),
            f"{block}norm2.weight": (width,),
            f"{block}norm2.bias": (width,),
            f"{block}mlp.fc1.weight": (mlp_width, width),
            f"{block}mlp.fc1.bias": (mlp_width,),
            f"{block}mlp.fc2.weight": (width, mlp_width),
            f"{block}mlp.fc2.bias": (width,),
        }
    return shapes | {f"{prefix}norm.weight": (width,), f"{prefix}norm.bias": (width,)}


def _resampler_shapes(prefix: str) -> Shapes:
    shapes: Shapes = {
        f"{prefix}pos_embed": (GRID * GRID, HIDDEN),
        f"{prefix}query": (GRID * GRID, HIDDEN),
        f"{prefix}kv_proj.weight": (HIDDEN, VISION_WIDTH),
        f"{prefix}attn.in_proj_weight": (3 * HIDDEN, HIDDEN),
        f"{prefix}attn.in_proj_bias": (3 * HIDDEN,),
        f"{prefix}attn.out_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}attn.out_proj.bias": (HIDDEN,),
        f"{prefix}proj": (HIDDEN, HIDDEN),
    }
    for norm in ("ln_q", "ln_kv", "ln_post"):
        shapes |= {f"{prefix}{norm}.weight": (HIDDEN,), f"{prefix}{norm}.bias": (HIDDEN,)}
    return shapes


def _mlp_width(family: Family) -> int:
    return int(VISION_WIDTH * (MLP_RATIO_12B if family is Family.OMNILMM_12B else MLP_RATIO_3B))


def _spread(family: Family, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation that keep activations near 1 and let the answer depend on picture and words."""
    is_3b = family is Family.OMNILMM_3B
    if name.endswith("embed_tokens.weight"):
        return 0.0, 0.8 / (SCALE_EMB if is_3b else 1)
    if name.endswith("lm_head.weight"):
        return 0.0, 2.0 / math.sqrt(HIDDEN) * (HIDDEN / DIM_MODEL_BASE if is_3b else 1)
    if name.endswith(("pos_embed", "cls_token")):
        return 0.0, 0.5
    if name.endswith("query"):
        return 0.0, 1.0
    if len(shape) == 1:
        is_gain = "norm" in name.split(".")[-2] or name.split(".")[-2].startswith("ln_")
        return (1.0, 0.15) if is_gain and name.endswith("weight") else (0.0, 0.15)
    return 0.0, 1.4 / math.sqrt(math.prod(shape[1:]))


def _sincos_table() -> torch.Tensor:
    """The resampler's position table, (64, 256) float32: MAE's 2-D sine-cosine embedding of an 8 x 8 grid.

    The first half of the width encodes the column, the second half the row.
    """
    frequencies = 10000.0 ** -(torch.arange(HIDDEN // 4, dtype=torch.float64) / (HIDDEN // 4))  # (64,)
    places = torch.arange(GRID, dtype=torch.float64)
    angles = places[:, None] * frequencies  # (8, 64)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (8, 128)
    columns, rows = line.repeat(GRID, 1), line.repeat_interleave(GRID, dim=0)  # (64, 128) each
    return torch.cat([columns, rows], dim=1).float()
