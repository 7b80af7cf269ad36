"""The smallest checkpoints: in the official layout, small, and ready to learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnilmm.config import Family
from omnilmm.errors import ConfigError
from omnilmm.models.config import read_model_config
from omnilmm.models.layout import checkpoint_layout
from omnilmm.models.weights import load_encoder, load_language_model
from omnilmm.prompt.template import load_template
from omnilmm.training import nano
from omnilmm.training.export import num_parameters
from omnilmm.training.nano import wave_table, write_nano

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "CORPUS_SCENES", 600)
        write_nano(folder, Family.OMNILMM_3B)
    return folder


def test_it_is_small_enough(nano_folder: Path) -> None:
    config = read_model_config(nano_folder)
    encoder = load_encoder(nano_folder, config, dtype="bfloat16")
    language = load_language_model(nano_folder, config, dtype="bfloat16")
    assert num_parameters(encoder, language) <= 6_000_000
    others = sum(path.stat().st_size for path in nano_folder.iterdir() if path.suffix != ".safetensors")
    assert 2 * num_parameters(encoder, language) + others < MAX_BYTES
    assert config.num_image_tokens == 64


def test_both_families_are_complete_checkpoints(family: Family, folder: Path) -> None:
    config = read_model_config(folder)
    assert config.family is family
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    layout = checkpoint_layout(config)
    assert shapes == {name: slot.shape for name, slot in layout.items() if not slot.is_optional}
    template = load_template(family, folder)
    assert template.tokenizer.vocab_size == config.language.vocab_size


@pytest.mark.parametrize("text", ["circle", "圆形", "红色", "picture"])
def test_words_of_the_scenes_are_single_tokens(text: str, family: Family, nano_folder: Path) -> None:
    tokenizer = load_template(Family.OMNILMM_3B, nano_folder).tokenizer
    behind_a_space = text if not text.isascii() else f" {text}"
    assert len(tokenizer.encode_text(f">{behind_a_space}")) <= 3  # the dummy space, the sign, the word


def test_what_is_read_is_spelled_character_by_character(nano_folder: Path) -> None:
    tokenizer = load_template(Family.OMNILMM_3B, nano_folder).tokenizer
    for text in ("4711", "STOP", "RAIN"):
        spelled = [tokenizer.token_bytes(piece.id).decode().strip() for piece in tokenizer.encode_text(f"是{text}。")]
        assert [piece for piece in spelled if piece] == ["是", *text, "。"]


def test_every_vector_of_a_picture_begins_by_looking_at_its_own_place(folder: Path) -> None:
    config = read_model_config(folder)
    encoder = load_encoder(folder, config, dtype="float32")
    resampler = encoder.resampler
    table, weight, bias = resampler.pos_embed, resampler.in_proj.weight, resampler.in_proj.bias
    hidden, width = table.shape[1], resampler.head_dim
    q = (table @ weight[:width].T + bias[:width]) * width**-0.5
    k = table @ weight[hidden : hidden + width].T + bias[hidden : hidden + width]
    attention = (q @ k.T).softmax(-1)
    assert torch.equal(attention.argmax(-1), torch.arange(64))


def test_every_block_of_the_tower_begins_by_adding_little(folder: Path) -> None:
    """Be the norms in front of its branches (3B) or behind them (12B)."""
    vision = load_encoder(folder, read_model_config(folder), dtype="float32").vision
    x = torch.randn(1, 17, vision.config.width, generator=torch.Generator().manual_seed(0))
    for block in vision.blocks:
        assert 0.01 < float((block(x) - x).norm() / x.norm()) < 0.9


def test_every_head_of_the_tower_begins_by_looking_at_a_neighbour(folder: Path) -> None:
    """With the constants of pico: head width 8, blocks 2, a grid of 4 x 4."""
    config = read_model_config(folder)
    vision = load_encoder(folder, config, dtype="float32").vision
    width, head_dim, grid = vision.config.width, vision.config.head_dim, vision.config.grid
    table = vision.pos_embed[0, int(vision.config.has_class_token) :]
    for number, block in enumerate(vision.blocks):
        q, k = (table @ part.T for part in block.attention.qkv.weight[: 2 * width].chunk(2))
        for head in range(vision.config.num_heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            best = (q[:, rows] @ k[:, rows].T).argmax(-1)
            columns, lines = nano.NEIGHBOURS[number][head % 4]
            for place in range(grid * grid):
                line, column = place // grid + lines, place % grid + columns
                if 0 <= line < grid and 0 <= column < grid:
                    assert int(best[place]) == line * grid + column


def test_position_tables_tell_every_place_from_every_other() -> None:
    table = wave_table(8, 128)
    likeness = torch.nn.functional.normalize(table, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    assert float((likeness - torch.eye(64)).max()) < 0.8


def test_the_same_seed_makes_the_same_files(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"HIDDEN": 128, "MLP": 32, "LAYERS": 1, "VISION_BLOCKS": 1, "SIDE": 32, "PATCH": 8, "CORPUS_SCENES": 200}
    for name, value in small.items():
        monkeypatch.setattr(nano, name, value)
    contents = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_nano(tmp_path / name, family, seed=seed)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())})
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_there_is_none_of_a_text_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_nano(tmp_path, Family.TEXT)
