"""Whole runs: from a YAML file's settings to a checkpoint that the ordinary loader takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from training_cases import row_about, square, talk, write_jsonl

from omnilmm.config import Family
from omnilmm.errors import ConfigError
from omnilmm.models.config import read_model_config
from omnilmm.training import nano, run
from omnilmm.training.config import TrainingConfig, parse_training_config
from omnilmm.training.curve import Quiet, read_log
from omnilmm.training.learner import load_learner
from omnilmm.training.lora import load_adapter
from omnilmm.training.rows import collate
from omnilmm.training.run import train
from omnilmm.training.scenes_draw import Scenery
from omnilmm.training.sequences import SequenceMaker


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    records = []
    for number, word in enumerate(("red", "green", "blue")):
        Image.fromarray(square(number)).save(tmp_path / f"{number}.png")
        talk_ = [{"role": "user", "content": "<image>\nColour?"}, {"role": "assistant", "content": f"It is {word}."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": talk_})
    return write_jsonl(tmp_path / "data.jsonl", *records)


def settings(tmp_path: Path, folder: Path, jsonl: Path, **changes: Any) -> TrainingConfig:
    values = {
        "output": str(tmp_path / "run"),
        "checkpoint": str(folder),
        "steps": 4,
        "batch": 2,
        "log_every": 1,
        "jsonl": {"train": [str(jsonl)], "held_out": [str(jsonl)]},
        "precision": "float32",
        "save_dtype": "float32",
        "optimiser": {"learning_rate": 1e-3},
        "evaluate_every": 2,
        "save_every": 2,
        "device": "cpu",
    }
    return parse_training_config(values | changes)


def loss(folder: Path, maker: SequenceMaker, adapter: Path | None = None) -> float:
    config = read_model_config(folder)
    learner = load_learner(folder, config, learn=())
    if adapter is not None:
        load_adapter(adapter, config).attach(learner.language)
    return float(learner(collate([row_about(maker, 0, talk("Colour?", "It is red."))])).answers.detach())


def test_tuning_on_files_ends_in_a_better_checkpoint(
    folder: Path, jsonl: Path, maker: SequenceMaker, tmp_path: Path
) -> None:
    written = train(settings(tmp_path, folder, jsonl, steps=8))
    assert written == tmp_path / "run" / "checkpoint"
    assert loss(written, maker) < 0.8 * loss(folder, maker)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [entry["accuracy"]["held_out_loss"] > 0 for entry in log if "accuracy" in entry] == [True] * 4
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_lora_alone_ends_in_an_adapter(folder: Path, jsonl: Path, maker: SequenceMaker, tmp_path: Path) -> None:
    rates = {"learning_rate": 3e-2}
    config = settings(tmp_path, folder, jsonl, steps=6, learn=[], lora={"r": 4}, optimiser=rates)
    written = train(config)
    assert written == tmp_path / "run" / "adapter"
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert loss(folder, maker, written) < 0.8 * loss(folder, maker)


def test_a_stopped_run_resumes_and_only_with_the_same_settings(folder: Path, jsonl: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, folder, jsonl, steps=3)
    answers = iter((False, True))
    assert train(config, should_stop=lambda: next(answers)) is None
    with pytest.raises(ConfigError, match="already"):
        train(config)
    with pytest.raises(ConfigError, match="exactly"):
        train(replace(config, seed=1), resume=True)
    said = Said()
    assert train(config, resume=True, display=said) == tmp_path / "run" / "checkpoint"
    assert any("step 1" in line for line in said.lines)


def test_nothing_to_resume_is_an_error(folder: Path, jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train(settings(tmp_path, folder, jsonl), resume=True)


class Said(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_a_nano_begins_from_nothing_and_learns_from_scenes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SIDE": 32, "PATCH": 8, "VISION_WIDTH": 32, "VISION_BLOCKS": 1, "HIDDEN": 128, "LAYERS": 1}
    small = sizes | {"CORPUS_SCENES": 200}
    for name, value in small.items():
        monkeypatch.setattr(nano, name, value)
    monkeypatch.setattr(run, "load_scenery", Scenery)
    values = {
        "output": str(tmp_path / "run"),
        "nano": str(family),
        "steps": 6,
        "keep_states": 3,
        "batch": 2,
        "log_every": 1,
        "scenes": {"conversations": 3, "held_out": 2, "sight": 2},
        "evaluate_every": 2,
        "save_every": 2,
        "device": "cpu",
        "optimiser": {"learning_rate": 2e-3, "muon": True},
    }
    said = Said()
    written = train(parse_training_config(values), display=said)
    assert written is not None
    load_learner(written, read_model_config(written), learn=())
    entries = read_log(tmp_path / "run" / "log.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["loss"] > 0 for entry in steps] == [False, False, True, True, True, True]  # first it only looks
    assert all(entry["grounding"] > 0 for entry in steps)
    assert steps[-1]["loss"] < steps[2]["loss"]
    state = load_file(tmp_path / "run" / "states" / "step-00000002" / "state.safetensors")
    start = load_file(tmp_path / "run" / "start" / "model.safetensors")
    spoken = "model.norm.weight" if family is Family.OMNILMM_12B else "llm.model.norm.weight"
    assert start[spoken].equal(state["parameter.language.norm.weight"])  # while it only looks, its speech is left alone
    assert [entry["step"] for entry in entries if "accuracy" in entry] == [4, 6]
    assert any(line.startswith("step 6: all") for line in said.lines)
