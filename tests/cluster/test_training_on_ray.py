"""The Ray side of `omnilmm train`, as far as it goes without a cluster."""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml
from typer.testing import CliRunner, Result

from cluster import cli, ray_session, train, train_ray
from cluster.ray_session import check_room, connected
from cluster.train_ray import BEGUN, NEWS_S, PATIENCE_S, WRITTEN, Board, Place, train_on_ray
from omnilmm.errors import ConfigError, OmniError, StartupError
from omnilmm.training.config import TrainingConfig, parse_training_config
from omnilmm.training.curve import Quiet
from omnilmm.training.workers import OneWorker, WorkerLost

SETTINGS = {"output": "run", "steps": 3, "checkpoint": "x", "jsonl": {"train": ["data.jsonl"]}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


# -- the command --------------------------------------------------------------------------------------


class Asked:
    """What the command asks of train_on_ray."""

    def __init__(self) -> None:
        self.settings: TrainingConfig | None = None
        self.place: Place | None = None
        self.resume: bool | None = None
        self.written: str | None = "run/checkpoint"

    def __call__(self, settings: TrainingConfig, place: Place, *, resume: bool, display: Any, should_stop: Any) -> Any:
        self.settings, self.place, self.resume = settings, place, resume
        assert not should_stop()
        display.say("8 rows")
        display.advance(1, None)
        return self.written


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(train, "train_on_ray", asked)
    return asked


def invoke(*words: object) -> Result:
    app = typer.Typer()
    app.command()(train.train)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_flags_say_where_the_workers_run(asked: Asked, config: Path) -> None:
    result = invoke("--config", config, "--workers", 3, "--threads", 2, "--ray", "10.0.0.1:6379", "--resume")
    assert result.exit_code == 0, result.output
    assert asked.settings == parse_training_config(SETTINGS)
    assert asked.place == Place("10.0.0.1:6379", workers=3, threads=2)
    assert asked.resume is True
    assert "8 rows" in result.output
    assert "written: run/checkpoint" in result.output


def test_a_worker_has_one_thread_if_nothing_is_said(asked: Asked, config: Path) -> None:
    assert invoke("--config", config, "--ray", "auto").exit_code == 0
    assert asked.place == Place("auto", workers=1, threads=1)
    assert asked.resume is False


def test_a_stopped_run_says_how_to_go_on(asked: Asked, config: Path) -> None:
    asked.written = None
    result = invoke("--config", config, "--workers", 2, "--ray", "auto")
    assert f"stopped; go on with: omnilmm train --config {config} --resume --workers 2 --ray auto" in result.output


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_session, "LIBRARIES_NEED", ("json", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["omnilmm", "train", "--config", str(config), "--ray", "nowhere:1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'omnilmm-serve[batch,train]' (no no_such_package)" in capsys.readouterr().err


# -- the cluster --------------------------------------------------------------------------------------


def test_no_cluster_is_an_error_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(ConfigError, match=r"no Ray cluster at 10\.0\.0\.1:6379"),
        connected("10.0.0.1:6379", num_cpus=2),
    ):
        pass


@pytest.mark.parametrize(
    ("device", "there", "books"),
    [
        ("cpu", {"CPU": 8.0, "GPU": 2.0}, False),
        ("auto", {"CPU": 8.0}, False),
        ("auto", {"CPU": 8.0, "GPU": 2.0}, True),
        ("cuda", {"CPU": 8.0}, True),
    ],
)
def test_gpus_are_booked_where_the_run_is_to_have_them(
    device: str, there: dict[str, float], books: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    assert train_ray._has_gpus(device) is books


def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_room({"CPU": 4.0, "GPU": 0.0}, "the workers")
    with pytest.raises(ConfigError, match="the workers need 2 GPUs, the cluster has 0"):
        check_room({"CPU": 4.0, "GPU": 2.0}, "the workers")


# -- the board ----------------------------------------------------------------------------------------


async def test_news_come_in_order_and_once() -> None:
    board = Board()
    assert await board.take_news(0.0) == []
    await board.add(BEGUN)
    await board.add("say", "hello")
    assert await board.take_news(60.0) == [(BEGUN, ()), ("say", ("hello",))]
    waiting = asyncio.create_task(board.take_news(60.0))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    await board.add("advance", 1, None)
    assert await waiting == [("advance", (1, None))]
    assert await board.take_news(0.0) == []


async def test_whoever_waits_for_the_stop_is_told() -> None:
    board = Board()
    waiting = asyncio.create_task(board.stopped())
    await asyncio.sleep(0)
    assert not waiting.done()
    await board.stop()
    await asyncio.wait_for(waiting, 60)


# -- watching -----------------------------------------------------------------------------------------


class Remote:
    """A method of an actor: what it returns is there at once."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class FakeRun:
    """A run on a cluster as `_watch` sees it: each look at its board brings the next news; with the last it is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *news: Any, failure: OmniError | None = None) -> None:
        self._news, self._failure = list(news), failure
        self.stops = self.cancels = 0
        self.take_news, self.stop = Remote(self._take), Remote(self._stop)
        monkeypatch.setattr(ray, "get", lambda ref: self._failure if ref is self else ref)
        monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([] if self._news[1:] else refs, []))
        monkeypatch.setattr(ray, "cancel", self._cancel)

    def _take(self, timeout_s: float) -> Any:
        return self._news.pop(0) if self._news else []

    def _stop(self) -> None:
        self.stops += 1

    def _cancel(self, ref: Any) -> None:
        assert ref is self
        self.cancels += 1


class Seen(Quiet):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lines: list[str] = []

    def advance(self, step: int, entry: Any) -> None:
        self.steps.append(step)

    def say(self, line: str) -> None:
        self.lines.append(line)


def never() -> bool:
    return False


def test_all_news_are_shown_also_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(
        monkeypatch,
        [(BEGUN, ()), ("say", ("8 rows",))],
        [("advance", (1, None)), ("advance", (2, None))],
        [("advance", (3, None)), (WRITTEN, ("run/checkpoint",))],
    )
    seen = Seen()
    assert train_ray._watch(run, run, seen, never) == "run/checkpoint"
    assert (seen.steps, seen.lines) == ([1, 2, 3], ["8 rows"])


def test_a_stop_is_passed_on_to_workers_that_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(monkeypatch, [(BEGUN, ())], [], [(WRITTEN, (None,))])
    assert train_ray._watch(run, run, Seen(), lambda: True) is None
    assert run.stops > 0
    assert run.cancels == 0


def test_a_stop_before_the_workers_have_begun_calls_the_run_off(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(monkeypatch, [], [], [])
    with pytest.raises(StartupError, match="before the workers had begun"):
        train_ray._watch(run, run, Seen(), lambda: True)
    assert run.cancels == 1


def test_a_failure_is_raised_after_the_news(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(monkeypatch, [(BEGUN, ())], [("advance", (1, None))], failure=StartupError("worker 1 failed"))
    seen = Seen()
    with pytest.raises(StartupError, match="worker 1 failed"):
        train_ray._watch(run, run, seen, never)
    assert seen.steps == [1]


def test_a_cluster_that_starts_nobody_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = [[] for _ in range(2 * int(PATIENCE_S / NEWS_S))]
    seen = Seen()
    train_ray._watch(run := FakeRun(monkeypatch, *idle), run, seen, never)
    assert seen.lines == ["waiting for the cluster to start the workers"]


# -- on the cluster -----------------------------------------------------------------------------------


class LostSight(Exception):
    """As Ray Train tells of a worker whose process is gone."""

    health_check_failure = RuntimeError("gone")


def test_the_worker_that_failed_is_told_and_not_those_that_lost_it() -> None:
    lost = WorkerLost("another worker has ended, or cannot be reached")
    died = LostSight("A health check failed.\nThe actor is dead because its process died. Some causes: (1) memory.")
    cause = train_ray._cause({0: lost, 1: died}, RuntimeError())
    assert isinstance(cause, StartupError)
    assert cause.message == (
        "worker 1 of the training failed: The actor is dead because its process died; go on with --resume"
    )
    ours = ConfigError("There is no such file.")
    assert train_ray._cause({0: lost, 1: ours}, RuntimeError()) is ours
    assert (
        "worker 2 of the training failed: KeyError: 'x'" in train_ray._cause({2: KeyError("x")}, RuntimeError()).message
    )
    assert "worker 0" in train_ray._cause({0: lost}, RuntimeError()).message
    assert "no place" in train_ray._cause({}, RuntimeError("Ray says:\nno place\n")).message


def test_what_went_wrong_survives_the_way_back() -> None:
    lost = pickle.loads(pickle.dumps(WorkerLost("another worker has ended")))
    assert isinstance(lost, WorkerLost)
    assert lost.message == "another worker has ended"


class SecondWorker(OneWorker):
    rank, world = 1, 2


def test_every_worker_must_see_the_output_folder(tmp_path: Path) -> None:
    shared = tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match="does not see the output folder"):
        train_ray._make_output(shared, SecondWorker())
    assert not shared.exists()
    train_ray._make_output(shared, OneWorker())
    train_ray._make_output(shared, SecondWorker())


def test_no_cluster_is_asked_before_the_packages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "LIBRARIES_NEED", ("no_such_package",))
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("asked for a cluster"))
    settings = parse_training_config(SETTINGS)
    with pytest.raises(ConfigError, match="no_such_package"):
        train_on_ray(settings, Place("local", 1), resume=False, display=Quiet(), should_stop=never)
