"""The loop: interrupted or not, on one worker or on two, in large batches or small, it is the same run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import row_about, talk

from omnilmm.errors import ConfigError, OmniError
from omnilmm.training.config import JsonlConfig, LoraConfig, OptimiserConfig, TrainingConfig
from omnilmm.training.curve import read_log
from omnilmm.training.learner import Learner
from omnilmm.training.rows import Row
from omnilmm.training.sequences import SequenceMaker
from omnilmm.training.state import states
from omnilmm.training.trainer import Trainer
from omnilmm.training.workers import OneWorker

WORDS = ("red", "blue", "green", "white", "black", "small", "large")


class FewRows:
    """Seven questions, one row each."""

    num_facts = 0

    def __init__(self, maker: SequenceMaker) -> None:
        self.num_rows: int | None = len(WORDS)
        self._rows = [row_about(maker, i, talk("What is it?", f"It is {word}.")) for i, word in enumerate(WORDS)]

    def row(self, index: int, step: int) -> Row:
        return self._rows[index]


def config_for(folder: Path, **changes: Any) -> TrainingConfig:
    # a large eps: else rounding decides the steps of parameters whose gradient is nearly nothing, such as key biases
    rates = OptimiserConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, eps=1e-4)
    base = TrainingConfig(
        output=str(folder), steps=6, checkpoint="x", batch=2, precision="float32", log_every=1, optimiser=rates,
        jsonl=JsonlConfig(train=()), save_every=2, keep_states=9,
    )  # fmt: skip
    return replace(base, **changes)


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "rows_per_s"} for entry in read_log(trainer.log_path)]


def parameters(learner: Learner) -> list[Tensor]:
    return [parameter.detach().clone() for _, _, parameter in learner.learning()]


@pytest.fixture
def make(learner_of: Callable[..., Learner], maker: SequenceMaker, tmp_path: Path) -> Callable[..., Any]:
    """(learner, trainer) of a run in a folder of its own."""

    def build(name: str, *, workers: Any = None, evaluator: Any = None, lora: Any = None, **changes: Any) -> Any:
        learner = learner_of(**({"learn": (), "lora": lora} if lora else {}))
        (tmp_path / name).mkdir(exist_ok=True)
        config = config_for(tmp_path / name, **changes)
        trainer = Trainer(learner, FewRows(maker), config, tmp_path / name, workers=workers, evaluator=evaluator)
        return learner, trainer

    return build


def test_the_loss_falls(make: Callable[..., Any]) -> None:
    _, trainer = make("run", steps=12)
    assert trainer.run()
    entries = losses(trainer)
    assert [entry["step"] for entry in entries] == [*range(1, 13)]
    assert entries[-1]["loss"] < 0.7 * entries[0]["loss"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LoraConfig(r=2, lora_dropout=0.3)}, {"optimiser": OptimiserConfig(learning_rate=1e-3, muon=True)}],
    ids=["whole", "lora", "muon"],
)
@pytest.mark.parametrize("stop", [2, 3])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    stop: int, settings: dict[str, Any], make: Callable[..., Any]
) -> None:
    whole_learner, whole = make("whole", log_every=2, **settings)
    assert whole.run()
    _, first = make("parts", log_every=2, **settings)
    assert not first.run(lambda: first.step == stop)
    learner, second = make("parts", log_every=2, **settings)
    assert second.resume()
    assert second.step == stop
    assert second.run()
    assert losses(second) == losses(whole)
    assert all(map(torch.equal, parameters(learner), parameters(whole_learner)))


def test_what_a_crashed_run_logged_after_its_last_state_is_dropped(make: Callable[..., Any]) -> None:
    _, whole = make("whole")
    whole.run()
    _, crashed = make("parts", steps=6)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run(lambda: _crash_at(crashed, 5))
    assert [state.name for state in states(crashed._folder / "states")] == ["step-00000002", "step-00000004"]
    _, again = make("parts")
    assert again.resume()
    assert again.step == 4
    again.run()
    assert losses(again) == losses(whole)


def _crash_at(trainer: Trainer, step: int) -> bool:
    if trainer.step == step:
        raise RuntimeError("crash")
    return False


def test_small_passes_add_up_to_a_large_one(make: Callable[..., Any]) -> None:
    at_once, large = make("large", batch=6, accumulate=1, steps=2)
    in_parts, small = make("small", batch=2, accumulate=3, steps=2)
    large.run()
    small.run()
    for ours, theirs in zip(parameters(in_parts), parameters(at_once), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    assert losses(small)[0]["loss"] == pytest.approx(losses(large)[0]["loss"], rel=1e-5)


class Pair:
    """Two workers in two threads that add up for real: each waits for the other."""

    world = 2

    def __init__(self, rank: int, meeting: threading.Barrier, table: dict[int, list[Tensor]]) -> None:
        self.rank, self._meeting, self._table = rank, meeting, table

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        held = list(tensors)
        self._table[self.rank] = [tensor.clone() for tensor in held]
        self._meeting.wait(60)
        for tensor, one, other in zip(held, self._table[0], self._table[1], strict=True):
            tensor.copy_(one + other)
        self._meeting.wait(60)


def test_two_workers_make_the_run_of_one(make: Callable[..., Any]) -> None:
    alone, single = make("alone", batch=4, steps=3)
    single.run()
    meeting, table = threading.Barrier(2), dict[int, list[Tensor]]()
    pairs = [make(f"pair{rank}", batch=2, steps=3, workers=Pair(rank, meeting, table)) for rank in range(2)]
    threads = [threading.Thread(target=trainer.run) for _, trainer in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for learner, _ in pairs:
        for ours, theirs in zip(parameters(learner), parameters(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    assert not pairs[1][1].log_path.exists()
    assert losses(pairs[0][1])[0]["loss"] == pytest.approx(losses(single)[0]["loss"], rel=1e-5)


class Counting:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def measure(self, learner: Learner) -> Mapping[str, float]:
        self.steps.append(len(self.steps))
        return {"all": 0.25}


def test_it_evaluates_on_the_way_and_at_the_end(make: Callable[..., Any]) -> None:
    evaluator = Counting()
    _, trainer = make("run", evaluator=evaluator, evaluate_every=4)
    trainer.run()
    measured = [entry["step"] for entry in read_log(trainer.log_path) if "accuracy" in entry]
    assert measured == [4, 6]
    assert len(evaluator.steps) == 2


def test_only_the_latest_states_are_kept(make: Callable[..., Any], tmp_path: Path) -> None:
    _, trainer = make("run", save_every=1, keep_states=2)
    trainer.run()
    assert [state.name for state in states(tmp_path / "run" / "states")] == ["step-00000005", "step-00000006"]


def test_a_loss_that_is_not_finite_ends_the_run(make: Callable[..., Any]) -> None:
    learner, trainer = make("run")
    with torch.no_grad():
        learner.language.norm.weight.fill_(float("nan"))
    with pytest.raises(OmniError, match="step 0"):
        trainer.run()


def test_a_state_of_another_run_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    _, trainer = make("run", steps=2)
    trainer.run()
    _, other = make("run", lora=LoraConfig(r=2))
    with pytest.raises(ConfigError):
        other.resume()
    (states(tmp_path / "run" / "states")[-1] / "state.json").write_text("{")
    _, same = make("run")
    with pytest.raises(ConfigError):
        same.resume()


def test_an_empty_folder_has_nothing_to_resume(make: Callable[..., Any]) -> None:
    _, trainer = make("run")
    assert not trainer.resume()


def test_one_worker_adds_nothing() -> None:
    held = torch.ones(2)
    OneWorker().add_up([held])
    assert held.tolist() == [1, 1]
