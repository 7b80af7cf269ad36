"""Nano: the smallest checkpoints that see, one in each official format.

What makes them small and quick to train on a CPU, all of it within what the formats can say:

- pictures of 112 pixels in 64 patches (`image_size` is an official key);
- a tower of width 128, a language model of width 256, the least two heads of the resampler allow;
- a tokenizer learned from the scenes' own sentences, in which nearly every word is one token and every digit and
  capital letter another, so that any number and any word can be read out;
- position tables are waves from the start, as they do not learn; every query of the resampler begins by looking at
  its own place, and every head of the tower at a neighbour.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilmm.config import Family
from omnilmm.errors import ConfigError
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.resampler import Resampler
from omnilmm.models.vision import ImageEncoder, VisionBlock, VisionTower
from omnilmm.models.weights import to_checkpoint
from omnilmm.prompt.template import OMNILMM_SYSTEM
from omnilmm.training.export import write_json, write_shards
from omnilmm.training.scenes import Split
from omnilmm.training.scenes_ask import ask
from omnilmm.training.scenes_make import make_scene
from omnilmm.training.scenes_words import chinese_words
from omnilmm.training.tokenizer import train_tokenizer, write_tokenizer

SIDE, PATCH = 112, 14
VISION_WIDTH, VISION_BLOCKS, VISION_HEADS, VISION_MLP = 128, 4, 4, 384
HIDDEN, LAYERS, HEADS, MLP = 256, 4, 4, 640
GRID = 8  # of the resampler's queries
SCALE_EMB, DIM_MODEL_BASE = 12, 256
MAX_CONTEXT = 2048
NUM_PIECES: Mapping[Family, int] = {Family.OMNILMM_12B: 880, Family.OMNILMM_3B: 992}
CORPUS_SCENES = 3000
TOP_FREQUENCY, SHARPNESS = 0.9, 20.0  # of the position tables; of the queries' first attention
HEAD_SHARPNESS = 6.0  # of the tower's first attention
NEIGHBOURS = (  # (columns, rows) from a patch to the one that a head looks at first, by block and head
    ((1, 0), (-1, 0), (0, 1), (0, -1)),
    ((1, 1), (-1, -1), (1, -1), (-1, 1)),
    ((2, 0), (-2, 0), (0, 2), (0, -2)),
)
DELIMITER = "\u2063"  # between words of the corpus; never part of a text
EOS_ID = 2


def write_nano(folder: Path, family: Family, *, seed: int = 0) -> ModelConfig:
    """Write a checkpoint that has learned nothing yet, in the official layout, float32. The same seed gives the same
    files.

    Raises:
        ConfigError: it is not one of the two picture families.
    """
    if family not in NUM_PIECES:
        raise ConfigError("There is a nano only of the two picture families.", param="nano")
    folder.mkdir(parents=True, exist_ok=True)
    num_pieces = NUM_PIECES[family]
    sentences = tuple(corpus())
    chinese = "".join(sorted({*filter(lambda char: "\u4e00" <= char <= "\u9fff", "".join(sentences))}))
    model = train_tokenizer(sentences, family, num_pieces=num_pieces, delimiter=DELIMITER, characters=chinese)
    vocab_size = write_tokenizer(folder, model, family, num_pieces=num_pieces)
    write_json(folder / "config.json", nano_settings(family, vocab_size))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": EOS_ID})
    config = read_model_config(folder)
    assert config.vision is not None
    assert config.resampler is not None
    torch.manual_seed(seed)
    encoder, language = ImageEncoder(config.vision, config.resampler), LanguageModel(config.language)
    initialise(encoder, language)
    write_shards(folder, to_checkpoint(config, encoder=encoder, language_model=language))
    return config


def nano_settings(family: Family, vocab_size: int) -> dict[str, Any]:
    """The content of `config.json`. `vision_config_override` is the only key the official files lack."""
    shared = {
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_size": SIDE,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": MAX_CONTEXT,
        "mm_use_im_start_end": True,
        "model_type": family.value,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vision_config_override": {
            "depth": VISION_BLOCKS + 1,  # counts the last block, which neither family stores
            "embed_dim": VISION_WIDTH,
            "img_size": SIDE,
            "mlp_hidden_dim": VISION_MLP,
            "mlp_ratio": VISION_MLP / VISION_WIDTH,
            "num_heads": VISION_HEADS,
            "patch_size": PATCH,
        },
        "vocab_size": vocab_size,
    }
    if family is Family.OMNILMM_12B:
        return shared | {
            "architectures": ["OmniLMMForCausalLM"],
            "mm_vision_tower": "eva02_enormous_patch14_clip_224.laion2b_plus",
            "num_query": GRID * GRID,
            "pad_token_id": EOS_ID,
            "sliding_window": MAX_CONTEXT,
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }
    return shared | {
        "architectures": ["MiniCPMV"],
        "attention_bias": False,
        "dim_model_base": DIM_MODEL_BASE,
        "drop_vision_last_layer": True,
        "pretraining_tp": 1,
        "query_num": GRID * GRID,
        "rope_scaling": None,
        "scale_depth": 1.4,
        "scale_emb": SCALE_EMB,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
    }


# -- the first weights ----------------------------------------------------------------------------------


@torch.no_grad()
def initialise(encoder: ImageEncoder, language: LanguageModel) -> None:
    """Weights to start from, drawn from torch's generator: normal with deviation 1 / sqrt(inputs) for products,
    less where a residual branch ends, and picture vectors about as long as embedded tokens."""
    for module in (*encoder.modules(), *language.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                module.bias.zero_()
    for model, num_blocks in ((encoder.vision, len(encoder.vision.blocks)), (language, len(language.layers))):
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.fc2.weight", "mlp.down.weight")):
                parameter.mul_(1 / math.sqrt(2 * num_blocks))
    if encoder.vision.config.is_post_norm:  # a norm ends the branch there, and undoes any scale in front of it
        for block in encoder.vision.blocks:
            assert isinstance(block, VisionBlock)
            for norm in (block.norm1, block.norm2):
                norm.weight.fill_(1 / math.sqrt(2 * len(encoder.vision.blocks)))
    vision, prefix = encoder.vision, int(encoder.vision.config.has_class_token)
    if prefix:
        vision.class_token.normal_(std=0.02)
    vision.pos_embed[0, prefix:] = wave_table(vision.config.native_grid, vision.config.width)
    encoder.resampler.pos_embed.copy_(wave_table(GRID, encoder.resampler.pos_embed.shape[1]))
    encoder.resampler.query.normal_(std=0.02)
    encoder.resampler.proj.normal_(std=1 / math.sqrt(len(encoder.resampler.proj)))
    aim_queries(encoder.resampler)
    aim_heads(encoder.vision)
    encoder.derive_tables()
    language.embedding.weight.normal_(std=1 / language.config.scale_emb)
    language.output_matrix.normal_(std=1 / math.sqrt(language.config.hidden))


def aim_heads(vision: VisionTower) -> None:
    """Let every head of the tower begin by looking at one neighbour of each patch, so that the tower starts as a kind
    of convolution (compare Zheng, Lei and others, "Convolutional Initialization for Data-Efficient Vision
    Transformers", 2024). Queries are the position waves shifted by the neighbour's distance, keys are the waves
    themselves; what patches show only disturbs this at first."""
    width, num_heads, head_dim = vision.config.width, vision.config.num_heads, vision.config.head_dim
    num_waves, quarter = head_dim // 4, width // 4  # of each head and axis; of the table
    waves = [round((number + 1) * quarter / num_waves) - 1 for number in range(num_waves)]
    gain = math.sqrt(HEAD_SHARPNESS * math.sqrt(head_dim) / (2 * num_waves))
    for number, block in enumerate(vision.blocks):
        assert isinstance(block, VisionBlock)
        for head in range(num_heads):
            shift = NEIGHBOURS[number % len(NEIGHBOURS)][head % 4]
            query, key = torch.zeros(head_dim, width), torch.zeros(head_dim, width)
            for axis, (wave_index, wave) in itertools.product((0, 1), enumerate(waves)):
                sine = 2 * axis * quarter + wave
                cosine, row = sine + quarter, 2 * (axis * num_waves + wave_index)
                turn = (wave + 1) / quarter * TOP_FREQUENCY * math.pi * shift[axis]
                query[row, cosine], query[row, sine] = math.cos(turn), -math.sin(turn)
                query[row + 1, cosine], query[row + 1, sine] = math.sin(turn), math.cos(turn)
                key[row, cosine] = key[row + 1, sine] = 1.0
            rows = slice(head * head_dim, (head + 1) * head_dim)
            block.attention.qkv.weight[:width][rows] = gain * query
            block.attention.qkv.weight[width : 2 * width][rows] = gain * key


def aim_queries(resampler: Resampler) -> None:
    """Let every query begin by looking at the patches where it stands, and hardly at what they show.

    Queries and keys get the same projection in every head: onto the directions in which the position table varies,
    each scaled to the same size. Left to chance, 64 queries that all see the average of the picture take thousands of
    steps to come apart.
    """
    hidden = resampler.pos_embed.shape[1]
    mean = resampler.pos_embed.mean(0)
    _, sizes, directions = torch.linalg.svd(resampler.pos_embed - mean, full_matrices=False)
    kept = int((sizes > GRID).sum())
    kept = min(kept, resampler.head_dim)
    projection = torch.zeros(resampler.head_dim, hidden)
    projection[:kept] = directions[:kept] * (GRID / sizes[:kept, None])
    projection *= math.sqrt(SHARPNESS * math.sqrt(resampler.head_dim) / kept)
    for first in range(0, 2 * hidden, resampler.head_dim):
        rows = slice(first, first + resampler.head_dim)
        resampler.in_proj.weight[rows] = projection
        resampler.in_proj.bias[rows] = -(projection @ mean)
    resampler.norm_q.weight.fill_(0.1)


def wave_table(grid: int, width: int) -> Tensor:
    """(grid * grid, width) float32: sines and cosines of column (first half) and row, like MAE's table that the
    official resamplers store, but with even frequencies up to nearly one turn in two cells. MAE's run down to one in
    sixty thousand, and on a grid this small most of its numbers are the same everywhere."""
    frequencies = torch.arange(1, width // 4 + 1, dtype=torch.float64) / (width // 4) * (TOP_FREQUENCY * math.pi)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)], dim=1).float()


# -- its language ---------------------------------------------------------------------------------------


def corpus() -> Iterator[str]:
    """What the tokenizer learns from: the scenes' questions and answers, and the templates' fixed words.

    Words that are read off pictures are left out, so that their letters stay single tokens. Sentences come with a
    sign in front too, as no space precedes what follows a line break or a role mark. Chinese is cut into its words.
    """
    words = sorted({*chinese_words(), *_CHINESE_WORDS.split()}, key=len, reverse=True)
    cut = re.compile("|".join(words))
    for index in range(CORPUS_SCENES):
        scene = make_scene(Split.TRAIN, -1, index)
        for talk in ask(scene, Split.TRAIN, -1, index, num=4):
            for exchange in talk:
                for text in (exchange.question, exchange.answer):
                    words_apart = cut.sub(rf"{DELIMITER}\g<0>{DELIMITER}", re.sub("[A-Z]{2,}", "", text))
                    yield from (words_apart, f">{words_apart}")
    for _ in range(CORPUS_SCENES):
        yield OMNILMM_SYSTEM
        yield f">{OMNILMM_SYSTEM}"
        yield from ("<|system|>", "<|user|>", "<|assistant|>", "<用户>")
    yield " ".join(string.ascii_uppercase)


_CHINESE_WORDS = (
    "图片 图中 图形 什么 颜色 形状 哪里 哪种 位置 多大 几个 多少 一个 另一个 另外 "
    "大的 小的 还是 看到 请 描述 这张 内容 数字 单词 读出 写着 写的 写了 上面 "
    "它 你 里 有 是 在 的 了 吗 呢 那 还 第 列 行"
)
