"""The commands around training, from a settings file to a report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from typer.testing import CliRunner, Result

from cluster.train import _told_by, eval_nano, merge_adapter, train
from omnilmm.errors import ConfigError, OmniError
from omnilmm.models.config import read_model_config
from omnilmm.models.device import use_threads
from omnilmm.training import nano
from omnilmm.training.config import LoraConfig
from omnilmm.training.learner import load_learner
from omnilmm.training.lora import Adapter


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    commands = typer.Typer()
    commands.command("train")(train)
    commands.command("eval-nano")(eval_nano)
    commands.command("merge-adapter")(merge_adapter)
    return commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"SIDE": 32, "PATCH": 8, "VISION_WIDTH": 32, "VISION_BLOCKS": 1, "HIDDEN": 128, "LAYERS": 1}
    small = sizes | {"CORPUS_SCENES": 200}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(nano, name, value)
        nano.write_nano(folder, nano.Family.OMNILMM_3B)
    return folder


@pytest.fixture
def run(app: typer.Typer) -> Any:
    def invoke(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    yield invoke
    use_threads(0)


def test_train_writes_a_checkpoint_and_resume_finds_it_done(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    line = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    settings = {
        "output": str(tmp_path / "run"),
        "checkpoint": str(checkpoint),
        "steps": 2,
        "batch": 1,
        "device": "cpu",
        "jsonl": {"train": [str(tmp_path / "data.jsonl")]},
        "save_every": 1,
        "log_every": 1,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    result = run("train", "--config", path, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "written:" in result.output
    read_model_config(tmp_path / "run" / "checkpoint")
    assert run("train", "--config", path, "--resume", "--threads", 1).exit_code == 0
    again = run("train", "--config", path, "--threads", 1)
    assert isinstance(again.exception, ConfigError)


def test_two_workers_learn_what_one_does(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    lines = [
        {"conversations": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = {
        "checkpoint": str(checkpoint),
        "steps": 2,
        "batch": 1,
        "device": "cpu",
        "precision": "float32",
        "save_dtype": "float32",
        "jsonl": {"train": [str(tmp_path / "data.jsonl")]},
        "optimiser": {"learning_rate": 1e-3, "eps": 1e-4},
    }
    learned = []
    for name, accumulate, workers in (("one", 2, 1), ("two", 1, 2)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output": str(tmp_path / name), "accumulate": accumulate}))
        result = run("train", "--config", path, "--workers", workers, "--threads", 1)
        assert result.exit_code == 0, result.output
        learned.append(load_file(tmp_path / name / "checkpoint" / "model.safetensors"))
    alone, together = learned
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-5)
    again = run("train", "--config", tmp_path / "two.yaml", "--workers", 2, "--threads", 1)
    assert isinstance(again.exception, OmniError)
    assert again.exception.message == "The output folder holds a run already: resume it or name another."


def test_the_cause_is_told_rather_than_that_workers_lost_each_other(tmp_path: Path) -> None:
    ended = ProcessExitedException("gone", error_index=1, error_pid=7, exit_code=1)
    assert str(_told_by(1, tmp_path, ended)) == "worker 1 has ended; --resume goes on from the latest state"
    (tmp_path / "failed-0.json").write_text(json.dumps([False, "another worker has ended"]))
    assert str(_told_by(1, tmp_path, ended)) == "worker 1 has ended; --resume goes on from the latest state"
    (tmp_path / "failed-1.json").write_text(json.dumps([True, "the loss is not finite at step 3"]))
    assert str(_told_by(0, tmp_path, ended)) == "the loss is not finite at step 3"


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    raised = ProcessRaisedException("KeyError: 'x'", error_index=0, error_pid=7)
    with pytest.raises(ProcessRaisedException, match="KeyError"):
        _told_by(0, tmp_path, raised)


def test_eval_nano_reports_by_kind_and_language(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("--scenes", 3, "--seed", 5, "--threads", 1, "--precision", "float32", "--out", tmp_path / "exam")
    result = run("eval-nano", checkpoint, *words)
    assert result.exit_code == 0, result.output
    assert "seed 5" in result.output
    assert len(re.findall("yes to absent things", result.output)) == 3
    report = json.loads((tmp_path / "exam" / "report.json").read_text())
    assert {*report["exams"]} == {"test", "combinations", "shuffled"}
    asked = report["exams"]["test"]["kinds"]["all"]
    assert asked["en"]["asked"] + asked["zh"]["asked"] >= 24
    table = (tmp_path / "exam" / "report.md").read_text().splitlines()
    assert (
        table[0] == "| question | test en | test zh | combinations en | combinations zh | shuffled en | shuffled zh |"
    )
    assert table[-1].startswith("| all | ")
    written = {path.name for path in (tmp_path / "exam").iterdir()}
    assert written == {"report.json", "report.md", "confusion.png", "sheet.png"}


def test_merging_an_adapter_makes_a_new_checkpoint(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    adapter = Adapter(read_model_config(checkpoint), LoraConfig(r=1))
    for up in adapter.up:
        up.data.fill_(0.5)
    adapter.save(tmp_path, base="x")
    result = run("merge-adapter", checkpoint, tmp_path, tmp_path / "merged", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    before, after = (
        load_learner(folder, read_model_config(folder), learn=()).language.layers[0].attention.out.weight
        for folder in (checkpoint, tmp_path / "merged")
    )
    slot = next(index for index, slot in enumerate(adapter.slots) if slot.parameter == "layers.0.attention.out.weight")
    expected = before + adapter.lora.scale * adapter.up[slot] @ adapter.down[slot]
    assert after.allclose(expected, atol=1e-6)
    refused = run("merge-adapter", checkpoint, tmp_path, tmp_path / "merged")
    assert isinstance(refused.exception, ConfigError)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("nano-3b", nano.Family.OMNILMM_3B),
        ("nano-12b", nano.Family.OMNILMM_12B),
        ("nano-12b-second", "nano-12b"),
        ("nano-12b-third", "nano-12b-second"),
    ],
)
def test_the_recipes_that_are_shipped_can_be_read(name: str, begins: nano.Family | str) -> None:
    from omnilmm.training.config import read_training_config

    config = read_training_config(Path(nano.__file__).parent / "recipes" / f"{name}.yaml")
    assert config.output == f"runs/{name}"
    if isinstance(begins, nano.Family):
        assert config.nano is begins
    else:
        assert config.checkpoint == f"runs/{begins}/checkpoint"
