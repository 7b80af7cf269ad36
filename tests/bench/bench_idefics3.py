"""The bench's checkpoint once more, as Idefics3: what vLLM can run that comes nearest to it.

OmniLMM-3B and Idefics3 share their two large parts, a SigLIP tower without pooling and a decoder of the Llama family,
so those are the same weights under other names. MiniCPM's three factors, which Llama does not have, are multiplied
into the matrices beside them. What differs is what stands between the two: Idefics3 folds 4 x 4 patches into one
vector and multiplies once (random weights here) where OmniLMM-3B's resampler attends from 64 queries; either way a
picture fills 64 positions. Idefics3 writes three marks around them, OmniLMM-3B two.

Names and layout are those of transformers (models/idefics3) and of vLLM (model_executor/models/idefics3.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_vision_model import TOKENIZER
from safetensors import safe_open
from torch import Tensor
from transformers import Idefics3Config, LlamaConfig, LlamaTokenizer
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from omnilmm.models.config import LanguageConfig, ModelConfig, VisionConfig, read_model_config
from omnilmm.training.export import write_shards

FOLD = 4  # patches in a row, and in a column, that become one vector
MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")  # what Idefics3's processor writes
VOCABULARY_STEP = 64  # rows of a vocabulary are padded to whole multiples of this, as vLLM would do itself

# OmniLMM-3B's format: role marks of ordinary text, pictures in front of the words of their message.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<AI>' if message['role'] == 'assistant' else '<用户>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>\\n' }}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<AI>{% endif %}"
)


def write_idefics3(source: Path, folder: Path) -> None:
    """Write the checkpoint of `bench_vision_model.write_checkpoint` in `source` as an Idefics3 checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_model_config(source)
    assert config.vision is not None
    assert config.resampler is not None
    assert config.vision.num_patches == FOLD**2 * config.num_image_tokens
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    vocab_size = -(-len(tokenizer) // VOCABULARY_STEP) * VOCABULARY_STEP
    settings = Idefics3Config(
        vision_config=vision_settings(config.vision),
        text_config=language_settings(config.language, vocab_size),
        scale_factor=FOLD,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        bos_token_id=config.bos_id,
        eos_token_id=list(config.eos_ids),
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Idefics3ForConditionalGeneration"],
        dtype="bfloat16",
    )
    settings.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", picture_settings(config.vision.side))
    write_json(
        folder / "processor_config.json",
        {"processor_class": "Idefics3Processor", "image_seq_len": config.num_image_tokens},
    )
    with safe_open(source / "model.safetensors", framework="pt") as stored:
        tensors = ((name, stored.get_tensor(name)) for name in sorted(stored.keys()))
        write_shards(folder, rename(config, vocab_size, tensors))


def vision_settings(vision: VisionConfig) -> Idefics3VisionConfig:
    return Idefics3VisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.num_blocks,
        num_attention_heads=vision.num_heads,
        image_size=vision.side,
        patch_size=vision.patch,
        hidden_act="gelu",
        layer_norm_eps=vision.norm_eps,
    )


def language_settings(language: LanguageConfig, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=language.hidden,
        intermediate_size=language.mlp_width,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads,
        max_position_embeddings=language.max_context,
        rms_norm_eps=language.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        tie_word_embeddings=False,
    )


def picture_settings(side: int) -> dict:
    """Every picture becomes one square of the side that OmniLMM-3B uses, whatever its shape; none is cut up.

    The processor that needs no torchvision is asked for by name.
    """
    return {
        "image_processor_type": "Idefics3ImageProcessorPil",
        "processor_class": "Idefics3Processor",
        "do_image_splitting": False,
        "size": {"longest_edge": side},
        "max_image_size": {"longest_edge": side},
        "resample": 3,  # bicubic
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def rename(config: ModelConfig, vocab_size: int, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tower and the decoder under Idefics3's names; the resampler is left out and a connector put in its place."""
    assert config.vision is not None
    generator = torch.Generator().manual_seed(0)
    folded = (config.language.hidden, FOLD**2 * config.vision.width)
    connector = torch.empty(folded).normal_(std=0.02, generator=generator)
    yield "model.connector.modality_projection.proj.weight", connector.to(torch.bfloat16)
    for name, tensor in tensors:
        if name.startswith("vpm."):
            yield from tower_tensors(name.removeprefix("vpm."), tensor)
        elif name.startswith("llm."):
            yield decoder_tensor(name.removeprefix("llm."), tensor, config.language, vocab_size)


TOWER = {
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.out_proj.",
}


def tower_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of timm's ViT under its other name; queries, keys and values, which timm stacks, one by one."""
    prefix = "model.vision_model."
    if name == "pos_embed":  # (1, patches, width)
        yield f"{prefix}embeddings.position_embedding.weight", tensor[0]
        return
    for ours, theirs in TOWER.items():
        if ours.startswith(".") or name.startswith(ours):
            name = name.replace(ours, theirs)
    name = prefix + name.replace("blocks.", "encoder.layers.")
    if ".attn.qkv." not in name:
        yield name, tensor
        return
    for part, third in zip("qkv", tensor.chunk(3), strict=True):
        yield name.replace(".attn.qkv.", f".self_attn.{part}_proj."), third


def decoder_tensor(name: str, tensor: Tensor, language: LanguageConfig, vocab_size: int) -> tuple[str, Tensor]:
    """One tensor of the language model, with MiniCPM's factor on it."""
    factor = 1.0
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        factor = language.residual_scale
    elif name == "model.embed_tokens.weight":
        factor = language.scale_emb
    elif name == "lm_head.weight":
        factor = 1 / language.logit_divisor
    if len(tensor) == language.vocab_size:
        tensor = torch.cat((tensor, tensor.new_zeros(vocab_size - len(tensor), tensor.shape[1])))
    tensor = (tensor.float() * factor).to(tensor.dtype)
    return (name if name == "lm_head.weight" else name.replace("model.", "model.text_model.", 1)), tensor


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
