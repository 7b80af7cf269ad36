"""The servers that are measured through HTTP: started here on loopback, ended here by process id."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
import yaml
from bench_prompts import BenchPrompt

from omnilmm.config import EngineConfig
from omnilmm.tenancy.keys import new_key

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
DEFAULT_BLOCKS = EngineConfig().num_blocks
MODEL = "bench"


class NotStarted(RuntimeError):
    """A server ended before it was ready, or was not ready in time; says what it printed last."""


class Server:
    """A server as a child process; `with` starts it, waits until it is ready, and ends it and all its children."""

    def __init__(
        self, command: list[str], *, port: int, ready_path: str, log: Path, env: Mapping[str, str], key: str | None
    ) -> None:
        self.command, self.port, self._ready_path, self._log, self._env = command, port, ready_path, log, env
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.base = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self._env}
            )
        try:
            self._await_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise NotStarted(f"{self.command[0]} ended before it was ready:\n{self._log_tail()}")
            try:
                if httpx.get(self.base + self._ready_path, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise NotStarted(f"{self.command[0]} is not ready after {START_TIMEOUT_S:.0f} s:\n{self._log_tail()}")

    def printed(self) -> str:
        """All it has printed since it was started."""
        return self._log.read_text(errors="replace")

    def _log_tail(self) -> str:
        return "\n".join(self.printed().splitlines()[-15:])

    def _stop(self) -> None:
        family = self.processes()
        self.process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for process in alive:
            process.kill()
        self.process.wait()

    def processes(self) -> list[psutil.Process]:
        """The server and all its descendants."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    async def stream(
        self, client: httpx.AsyncClient, prompt: BenchPrompt, num_tokens: int
    ) -> AsyncIterator[tuple[int, str]]:
        """One greedy answer of exactly `num_tokens` tokens over the OpenAI interface."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt.text}],
            "temperature": 0,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{self.base}/v1/chat/completions"
        async with client.stream("POST", url, json=body, headers=self._headers) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{url} answered {response.status_code}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                usage = chunk.get("usage") or {}
                if usage and usage["prompt_tokens"] != len(prompt.ids):
                    raise RuntimeError(
                        f"the server counts {usage['prompt_tokens']} prompt tokens, not {len(prompt.ids)}"
                    )
                if text or usage:
                    yield usage.get("completion_tokens", 0), text


def omnilmm_server(
    checkpoint: Path, dtype: str, scratch: Path, *, threads: int = 0, num_blocks: int = DEFAULT_BLOCKS
) -> Server:
    """`omnilmm serve` with its defaults; an API key because that is how it is run in earnest. `threads` are those of
    the engine, 0 for as many as there are cores."""
    port, (key, digest) = _free_port(), new_key()
    decoder = {"torch_threads": threads, "num_blocks": num_blocks}
    models = [{"name": MODEL, "path": str(checkpoint), "dtype": dtype, "decoder": decoder}]
    keys = [{"tenant": "bench", "sha256": digest}]
    config = scratch / "serve_config.yaml"
    args = {"models": models, "keys": keys, "cache": {"redis": "none"}}
    application = {"name": "omnilmm", "import_path": "deployments.app:build", "args": args}
    config.write_text(yaml.safe_dump({"applications": [application]}))
    command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(config), "--port", str(port)]
    return Server(command, port=port, ready_path="/ready", log=scratch / "omnilmm.log", env={}, key=key)


def vllm_server(venv: Path, checkpoint: Path, dtype: str, num_cores: int, scratch: Path) -> Server:
    """vLLM's OpenAI server with its defaults, on the same cores."""
    port = _free_port()
    command = [str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", MODEL, "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_cores - 1}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Server(command, port=port, ready_path="/health", log=scratch / "vllm.log", env=env, key=None)


def vllm_vision_server(venv: Path, checkpoint: Path, dtype: str, num_cores: int, scratch: Path) -> Server:
    """The same for a model that takes pictures: caches of prefixes, of pictures and of their vectors as vLLM sets them.

    It also prints a line per step, which is the one place where it says how many pictures it encoded.
    """
    server = vllm_server(venv, checkpoint, dtype, num_cores, scratch)
    server.command.append("--enable-logging-iteration-details")
    return server


def num_vllm_encodes(printed: str) -> int:
    """Pictures that went through the encoder, by the lines of `--enable-logging-iteration-details`."""
    return sum(map(int, re.findall(r"Iteration\(\d+\):.*\bencoder inputs: (\d+)", printed)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
