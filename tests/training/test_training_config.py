"""A run's YAML file says everything or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from omnilmm.config import Family
from omnilmm.errors import ConfigError
from omnilmm.training.config import Learning, LoraConfig, parse_training_config, plain, read_training_config

LEAST: dict[str, Any] = {"output": "out", "steps": 3, "checkpoint": "model", "jsonl": {"train": ["a.jsonl"]}}


def test_the_least_a_file_may_say(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    config = read_training_config(path)
    assert config.learn == tuple(Learning)
    assert config.jsonl is not None
    assert config.jsonl.train == ("a.jsonl",)


def test_everything_comes_back_as_it_was_written() -> None:
    values = {
        "output": "out",
        "steps": 3,
        "nano": "minicpmv",
        "scenes": {"seed": 4},
        "learn": ["vision", "resampler"],
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "optimiser": {"part_rates": {"vision": 0.5}},
    }
    config = parse_training_config(values)
    assert config.nano is Family.OMNILMM_3B
    assert config.lora == LoraConfig(r=2, target_modules=("q_proj",))
    assert parse_training_config(yaml.safe_load(yaml.safe_dump(plain(config)))) == config


def test_numbers_written_as_1e_4_are_numbers() -> None:
    config = parse_training_config(LEAST | yaml.safe_load("optimiser: {learning_rate: 1e-4, clip: 1}"))
    assert (config.optimiser.learning_rate, config.optimiser.clip) == (1e-4, 1.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stpes": 3}, "stpes"),
        ({"optimiser": {"lr": 1.0}}, "optimiser.lr"),
        ({"optimiser": {"learning_rate": "fast"}}, "optimiser.learning_rate"),
        ({"optimiser": {"part_rates": {"tower": 1.0}}}, "optimiser.part_rates"),
        ({"steps": "3"}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 0}, "steps"),
        ({"jsonl": {"train": "a.jsonl"}}, "jsonl.train"),
        ({"jsonl": ["a.jsonl"]}, "jsonl"),
        ({"learn": ["everything"]}, "learn"),
        ({"learn": []}, "learn"),
        ({"lora": {"r": 4}}, "learn"),
        ({"lora": {"r": 0}, "learn": []}, "lora.r"),
        ({"lora": {"target_modules": ["qkv"]}, "learn": []}, "lora.target_modules"),
        ({"weights": "bfloat16"}, "weights"),
        ({"precision": "float8"}, "precision"),
        ({"nano": "omnilmm"}, "checkpoint"),
        ({"checkpoint": None}, "checkpoint"),
        ({"scenes": {}}, "jsonl"),
        ({"scenes": {"ramp": -2}, "jsonl": None}, "scenes"),
        ({"scenes": {"encoder_rate": -0.1}, "jsonl": None}, "scenes"),
        ({"scenes": {"sight": 0.5}, "jsonl": None}, "scenes.sight"),
        ({"scenes": {"sight": 5, "grounding": 0}, "jsonl": None}, "scenes.sight"),
        ({"output": None}, "output"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_training_config(LEAST | change)
    assert caught.value.param == named


@pytest.mark.parametrize("text", ["[1, 2]", "steps: 3", "a: [", ""])
def test_a_file_that_is_no_run_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_training_config(path)


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_training_config(tmp_path / "nothing.yaml")
