"""One cluster for the whole session: `omnilmm serve` as a user starts it, in a process of its own.

The tests speak HTTP to it, and connect to its Ray as a second driver to read counters, kill replicas and deploy
further applications beside the first.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from e2e_cluster import (
    FAMILIES,
    SLOW_READER_S,
    Cluster,
    Golden,
    connect,
    disconnect,
    free_port,
    model_settings,
    read_goldens,
)

from deployments.settings import CACHE_SECRET_VARIABLE, DATABASE_VARIABLE

START_TIMEOUT_S = 180


@pytest.fixture(scope="session")
def goldens(data: Path, picture_folder: Path | None) -> list[Golden]:
    return read_goldens(data, picture_folder)


@pytest.fixture(scope="session")
def golden(goldens: list[Golden]) -> Callable[[str, str, str], Golden]:
    """One case by model, picture and conversation."""

    def find(model: str, image: str, conversation: str) -> Golden:
        return next(g for g in goldens if (g.model, g.image, g.conversation) == (model, image, conversation))

    return find


@pytest.fixture(scope="session")
def cluster(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = tmp_path_factory.mktemp("e2e") / "serve_config.yaml"
    models = [model_settings(data, name) for name in FAMILIES]
    args = {"models": models, "router": {"slow_reader_s": SLOW_READER_S}}
    config.write_text(yaml.safe_dump({"applications": [{"import_path": "deployments.app:build", "args": args}]}))
    port = free_port()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", CACHE_SECRET_VARIABLE: "s" * 32}
    environment[DATABASE_VARIABLE] = f"sqlite:///{config.with_name('omnilmm.db')}"
    process = subprocess.Popen(
        [Path(sys.executable).with_name("omnilmm"), "serve", "--config", config, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    running = Cluster(process, f"http://127.0.0.1:{port}", config)
    reader = threading.Thread(target=running.read_output, daemon=True)
    reader.start()
    try:
        running.await_line("Ctrl-C stops", START_TIMEOUT_S)
        connect(running)
        yield running
    finally:
        disconnect()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()
