"""`omnilmm train --ray` on the shared cluster: a run that loses a worker, goes on in two processes of this machine, and
ends on the cluster again has the very bits of a run that nothing happened to."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from e2e_cluster import FAMILIES, wait_until

pytest.importorskip("ray.train")

pytestmark = pytest.mark.e2e

NUM_STEPS = 40
TIMEOUT_S = 240


class Run:
    """A run by one settings file, in a folder of its own: paths in it count from there."""

    def __init__(self, folder, config):
        folder.mkdir()
        self.folder, self._config = folder, config

    def start(self, *options):
        words = ["train", "--config", self._config, "--workers", 2, *options]
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *map(str, words)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        )

    def states(self):
        return {path.name for path in (self.folder / "run" / "states").glob("step-*")}

    def await_a_state(self, process, known=frozenset()):
        """Until there is one that is not `known`."""
        wait_until(lambda: self.states() - known or process.poll() is not None, "a state is saved", TIMEOUT_S)

    def log(self):
        """Without the one figure that is a measure of time."""
        entries = [json.loads(line) for line in (self.folder / "run" / "log.jsonl").read_text().splitlines()]
        return [{name: figure for name, figure in entry.items() if name != "rows_per_s"} for entry in entries]

    def weights(self):
        return (self.folder / "run" / "checkpoint" / "model.safetensors").read_bytes()


@pytest.fixture
def config(data, tmp_path):
    lines = []
    for number in range(8):
        said = [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"{number}, as asked."}]
        picture = {"image": str(data / "images" / "coins_gray.png")} if number % 2 else {}
        lines.append(json.dumps({"conversations": said, **picture}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = {
        "output": "run",
        "checkpoint": str(data / FAMILIES["omnilmm-3b"]),
        "steps": NUM_STEPS,
        "batch": 1,
        "device": "cpu",
        "precision": "float32",
        "save_dtype": "float32",
        "jsonl": {"train": [str(tmp_path / "data.jsonl")]},
        "learn": ["resampler", "llm"],
        "optimiser": {"learning_rate": 1e-3},
        "log_every": 1,
        "save_every": 4,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def ended(process):
    told, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, told


def workers_of(cluster, run=None):
    """Ray Train's processes, of all runs or of one. Ray writes what an actor is over its command line, and each worker
    goes to where its run was started."""
    found = []
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            is_worker = " ".join(process.cmdline()).startswith("ray::RayTrainWorker")
            if is_worker and (run is None or Path(process.cwd()) == run.folder):
                found.append(process)
    return found


def test_a_run_that_is_broken_and_moves_learns_the_very_same(cluster, config, tmp_path):
    address = re.search(r"Ray is up at (\S+)", cluster.await_line("Ray is up at", 5)).group(1)
    on_ray = ("--ray", address)
    whole, stopped, moved = (Run(tmp_path / name, config) for name in ("whole", "stopped", "moved"))

    to_stop, to_break = stopped.start(*on_ray), moved.start(*on_ray)
    stopped.await_a_state(to_stop)
    to_stop.send_signal(signal.SIGINT)
    moved.await_a_state(to_break)
    workers = workers_of(cluster, moved)
    assert len(workers) == 2, "the run has ended, or Ray calls its workers otherwise"
    workers[-1].kill()
    code, told = ended(to_stop)
    assert code == 0, told
    assert f"--resume --workers 2 --ray {address}" in told, "it was over before it was stopped"
    code, told = ended(to_break)
    assert code == 1, told
    assert re.search(r"error: worker \d of the training failed: .*; go on with --resume", told)
    wait_until(lambda: not workers_of(cluster), "no worker is left", 60)

    known = moved.states()
    undisturbed, to_move = whole.start(), moved.start("--resume")
    moved.await_a_state(to_move, known)
    to_move.send_signal(signal.SIGTERM)
    code, told = ended(to_move)
    assert code == 0, told
    assert "stopped; go on with" in told, "it was over before it was stopped"
    code, told = ended(undisturbed)
    assert code == 0, told

    code, told = ended(moved.start("--resume", *on_ray))
    assert code == 0, told
    assert "going on from step" in told
    assert "written: run/checkpoint" in told
    assert moved.log() == whole.log()
    assert moved.weights() == whole.weights()
    until_stopped = stopped.log()
    assert 0 < len(until_stopped) < NUM_STEPS
    assert until_stopped == whole.log()[: len(until_stopped)]
