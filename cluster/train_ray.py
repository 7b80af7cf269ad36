"""Training on the workers of a Ray cluster. Ray Train starts them and joins them in a process group of torch; each then
runs the loop that the workers of one machine run.

Three parties work for it. This process shows how far the run is and hears Ctrl-C. A task (`_fit`) hands the run to Ray
Train, which would take Ctrl-C for itself and kill, and waits for it. A board carries news of the first worker here, and
the wish to stop the other way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.ray_session import check_room, connected, missing_packages
from omnilmm.errors import ConfigError, OmniError, StartupError

if TYPE_CHECKING:
    from omnilmm.training.config import TrainingConfig
    from omnilmm.training.curve import Display
    from omnilmm.training.workers import Workers

NEWS_S = 0.5
"""The longest wait for news: as soon is Ctrl-C heard."""
PATIENCE_S = 20.0
"""After so long without a worker it is said what the run waits for; as long may Ray Train take to call it off."""
BEGUN, WRITTEN = "begun", "written"

News = tuple[str, tuple[Any, ...]]
"""A method of Display and its arguments; or BEGUN; or WRITTEN and the folder, None if stopped early."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the workers run: the cluster's address as in `ray_session.connected`, and how many there are. Each books as
    many CPUs as it has threads, and one GPU where the run is to have any."""

    address: str
    workers: int
    threads: int = 1


def train_on_ray(
    settings: TrainingConfig, place: Place, *, resume: bool, display: Display, should_stop: Callable[[], bool]
) -> str | None:
    """Run to the end, as `omnilmm.training.run.train`. Its folders and files must be in one place for all machines.

    Args:
        settings: the run.
        place: its workers.
        resume: go on from the latest state in the output folder, whoever wrote it.
        display: told what the first worker does.
        should_stop: asked twice a second; True ends the run early, with a state to resume from.

    Returns:
        The folder of the checkpoint or adapter; None if stopped early.

    Raises:
        ConfigError: Ray Train is not installed, there is no such cluster or no room in it, or the run is not allowed.
        StartupError: a worker or the cluster failed; states that were saved are kept.
        OmniError: the loss is no longer finite.
    """
    if missing := missing_packages():
        raise ConfigError(f"Ray Train needs pip install 'omnilmm-serve[batch,train]' (no {', '.join(missing)})")
    from omnilmm.training.config import plain

    with connected(place.address, num_cpus=place.workers * place.threads):
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        on_gpus = _has_gpus(settings.device)
        books = {"CPU": float(place.threads)} | ({"GPU": 1.0} if on_gpus else {})
        check_room({name: num * place.workers for name, num in books.items()}, "the workers")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        board = ray.remote(**options)(Board).remote()
        job = {"settings": plain(settings), "resume": resume, "threads": place.threads}
        job |= {"folder": os.getcwd(), "board": board}
        fit = ray.remote(**options, max_retries=0)(_fit)
        try:
            return _watch(board, fit.remote(job, place.workers, books), display, should_stop)
        except RayError as error:
            raise StartupError(f"the Ray cluster gave up: {_last_line(error)}; what was saved is kept") from error


def _has_gpus(device: str) -> bool:
    import ray

    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


# -- this process -------------------------------------------------------------------------------------


def _watch(board: Any, fitting: Any, display: Display, should_stop: Callable[[], bool]) -> str | None:
    """Show the news until the task has ended; the folder that was written."""
    import ray

    has_begun = is_over = False
    written: str | None = None
    patience = int(PATIENCE_S / NEWS_S)
    while not is_over:
        is_over = bool(ray.wait([fitting], timeout=0)[0])  # and once more for the last news
        for kind, what in ray.get(board.take_news.remote(0.0 if is_over else NEWS_S)):
            has_begun = True
            if kind == WRITTEN:
                (written,) = what
            elif kind != BEGUN:
                getattr(display, kind)(*what)
        if should_stop() and not is_over:
            if not has_begun:
                _call_off(fitting)
            ray.get(board.stop.remote())
        patience -= not has_begun
        if patience == 0:
            display.say("waiting for the cluster to start the workers")
    if failure := ray.get(fitting):
        raise failure
    return written


def _call_off(fitting: Any) -> NoReturn:
    """End a run whose workers do not listen yet: the interrupt makes Ray Train end what it has started."""
    import ray

    ray.cancel(fitting)
    ray.wait([fitting], timeout=PATIENCE_S)
    raise StartupError("stopped before the workers had begun")


class Board:
    """An actor between the first worker and the process that was started."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._has_news, self._stop = asyncio.Event(), asyncio.Event()

    async def add(self, kind: str, *what: Any) -> None:
        self._news.append((kind, what))
        self._has_news.set()

    async def take_news(self, timeout_s: float) -> list[News]:
        """What was added since the last time, as soon as there is any, or nothing."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_news.wait(), timeout_s)
        self._has_news.clear()
        taken, self._news = self._news, []
        return taken

    async def stop(self) -> None:
        self._stop.set()

    async def stopped(self) -> None:
        """Returns when the run is to stop."""
        await self._stop.wait()


# -- on the cluster -----------------------------------------------------------------------------------


def _fit(job: Mapping[str, Any], workers: int, books: Mapping[str, float]) -> OmniError | None:
    """Have Ray Train do it; what went wrong, if anything did. It is never begun again by Ray: that is for --resume."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Without the guard that Ray Train leaves behind to give the workers' places back should all the rest be
        killed: Ray itself does that, and on a cluster without a dashboard the guard would stay for ever."""

        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # typed as Train V1
            return [callback for callback in made if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    on_gpus = "GPU" in books
    no_more: dict[str, Any] = {"max_failures": 0, "max_preemption_failures": 0}
    with tempfile.TemporaryDirectory(prefix="omnilmm-train-") as unused:  # states are ours, not Ray Train's
        trainer = Trainer(
            _work,
            train_loop_config=dict(job),
            # counters are added up in main memory, gradients where they are
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpus, resources_per_worker=dict(books)),
            run_config=RunConfig(storage_path=unused, failure_config=FailureConfig(**no_more)),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return _cause(getattr(error, "worker_failures", {}), error)
    return None


def _cause(failures: Mapping[int, Exception], error: Exception) -> OmniError:
    """Of the failures by worker, the one to be told: those that only lost another worker know nothing."""
    from omnilmm.training.workers import WorkerLost

    told = sorted(failures.items(), key=lambda entry: (isinstance(entry[1], WorkerLost), entry[0]))
    if not told:
        return StartupError(f"the Ray cluster gave up: {_last_line(error)}; what was saved is kept")
    rank, failure = told[0]
    if isinstance(failure, OmniError) and not isinstance(failure, WorkerLost):
        return failure
    if hasattr(failure, "health_check_failure"):  # Ray lost sight of its process, and says so in many sentences
        reason = _last_line(failure).partition(". ")[0]
    else:
        reason = f"{type(failure).__name__}: {_last_line(failure)}"
    return StartupError(f"worker {rank} of the training failed: {reason}; go on with --resume")


def _work(job: Mapping[str, Any]) -> None:
    """One worker of the run, inside the process group."""
    import ray

    from omnilmm.models.device import use_threads
    from omnilmm.training.config import parse_training_config
    from omnilmm.training.run import train
    from omnilmm.training.workers import current_workers

    settings, board = parse_training_config(job["settings"]), job["board"]
    use_threads(job["threads"])
    workers = current_workers()
    if Path(job["folder"]).is_dir():
        os.chdir(job["folder"])  # paths mean what they mean where the run was started
    if not job["resume"]:  # else each looks for the run in it
        _make_output(Path(settings.output), workers)
    if workers.rank > 0:
        train(settings, resume=job["resume"], workers=workers)
        return
    board.add.remote(BEGUN)
    stopped = board.stopped.remote()

    def should_stop() -> bool:
        return bool(ray.wait([stopped], timeout=0)[0])  # also if the board is gone, and so whoever asked for this

    written = train(settings, resume=job["resume"], display=_Told(board), workers=workers, should_stop=should_stop)
    ray.get(board.add.remote(WRITTEN, None if written is None else str(written)))


def _make_output(folder: Path, workers: Workers) -> None:
    """Raises ConfigError on workers that do not see the folder which the first one makes."""
    import torch

    if workers.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    workers.add_up([torch.zeros(1)])  # the others wait here
    if not folder.is_dir():
        raise ConfigError("A worker does not see the output folder: all machines must share it.", param="output")


class _Told:
    """A Display on the board."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def advance(self, step: int, entry: Mapping[str, float] | None) -> None:
        self._board.add.remote("advance", step, entry)

    def say(self, line: str) -> None:
        self._board.add.remote("say", line)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
