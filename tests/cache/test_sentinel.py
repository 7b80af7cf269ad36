"""F16 with a real sentinel: two servers, one watcher, and a master that changes under us."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cache_fakes import OTHER, HandClock, vectors, works
from redis import ConnectionError as NotThere
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from deployments.redis_server import find_binary
from omnilmm.messages import Embedding

SERVICE = "omni"
FAILOVER_S = 30.0
"""It takes one second here; ten times that and more on a busy machine."""


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass
class Group:
    """A master, its replica and their sentinel, on loopback ports."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.ports[2]}/{SERVICE}"

    def client(self, port: int) -> Redis:
        return Redis(port=port, decode_responses=True)

    def start(self) -> None:
        one, two, watcher = self.ports
        self.start_server(one)
        self.start_server(two, "--replicaof", f"127.0.0.1 {one}")
        config = self.folder / "sentinel.conf"
        config.write_text(
            f"port {watcher}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {one} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 300\n"
            f"sentinel failover-timeout {SERVICE} 2000\n"
            f"sentinel known-replica {SERVICE} 127.0.0.1 {two}\n"
        )
        self._run(watcher, str(config), "--sentinel")

    def start_server(self, port: int, *more: str) -> None:
        options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
        self._run(port, "--port", str(port), "--dir", str(self.folder), *options, *more)

    def _run(self, port: int, *words: str) -> None:
        command = [str(find_binary()), *words]
        self.processes[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self, port: int) -> None:
        os.kill(self.processes[port].pid, signal.SIGKILL)
        self.processes[port].wait(10)

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(10)

    def role(self, port: int) -> str:
        """ "master", "slave" or, where nobody answers, ""."""
        try:
            with self.client(port) as client:
                return client.role()[0]
        except NotThere:
            return ""

    def master(self) -> int:
        """Whom the sentinel names."""
        with self.client(self.ports[2]) as client:
            return int(client.sentinel_get_master_addr_by_name(SERVICE)[1])

    def holds(self, port: int) -> bool:
        """Whether that server has what `works` stored."""
        with self.client(port) as client:
            return client.exists("omni:" + OTHER) == 1

    def can_fail_over(self) -> bool:
        """Whether the sentinel sees a replica it could promote."""
        try:
            with self.client(self.ports[2]) as client:
                replicas = client.sentinel_slaves(SERVICE)
        except RedisError:
            return False
        return any(replica["master-link-status"] == "ok" for replica in replicas)


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    group = Group(tmp_path)
    group.start()
    try:
        await soon(group.can_fail_over)
        yield group
    finally:
        group.stop()


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(FAILOVER_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.02)


def fails_over(client: Redis) -> bool:
    """Whether the sentinel takes the order: it must have heard from the replica lately."""
    try:
        client.execute_command("SENTINEL", "FAILOVER", SERVICE)
    except ResponseError:
        return False
    return True


async def test_f16_an_ordered_failover_is_followed_without_a_restart(
    group: Group, make_tier, clock: HandClock, embedding: Embedding
) -> None:
    """The old master lives on as a replica, and our connections to it are still open: it answers READONLY."""
    one, two, watcher = group.ports
    tier = make_tier(group.url, timeout_s=0.2)
    await works(tier, clock, embedding)
    assert group.holds(one)
    with group.client(watcher) as client:
        await soon(lambda: fails_over(client))
    await soon(lambda: group.master() == two and group.role(two) == "master")
    with group.client(one) as client, group.client(two) as new:
        client.replicaof("127.0.0.1", two)  # the sentinel would say so in its next round, up to ten seconds later
        new.flushall()
    await works(tier, clock, embedding)
    assert group.holds(two)


async def test_f16_a_killed_master_is_replaced_and_not_asked_when_it_returns(
    group: Group, make_tier, clock: HandClock, embedding: Embedding
) -> None:
    one, two, _ = group.ports
    tier = make_tier(group.url, timeout_s=0.2)
    await works(tier, clock, embedding)
    group.kill(one)
    started = time.monotonic()
    for _ in range(3):
        found, stored = await vectors(tier, OTHER), await tier.put(OTHER, embedding)
        if group.master() == two:  # a busy machine: the other is master before we have looked three times
            break
        assert (found, stored, tier.is_down) == (None, False, True)
    assert time.monotonic() - started < 5.0
    await soon(lambda: group.master() == two and group.role(two) == "master")
    await works(tier, clock, embedding)
    assert group.holds(two)

    group.start_server(one)  # empty, and sure to be the master
    await soon(lambda: group.role(one) != "")
    assert await vectors(tier, OTHER) == embedding
    await works(tier, clock, embedding)


async def test_f16_no_sentinel_no_cache(make_tier, clock: HandClock) -> None:
    (port,) = free_ports(1)
    tier = make_tier(f"redis+sentinel://127.0.0.1:{port}/{SERVICE}", timeout_s=0.2)
    for _ in range(2):
        assert await tier.find([OTHER]) is None
    assert tier.is_down


async def test_f16_a_sentinel_that_knows_of_no_such_service(group: Group, make_tier) -> None:
    tier = make_tier(f"redis+sentinel://127.0.0.1:{group.ports[2]}/other", timeout_s=0.2)
    for _ in range(2):
        assert await tier.find([OTHER]) is None
    assert tier.is_down


async def test_f16_a_silent_sentinel_is_passed_over(
    group: Group, make_tier, clock: HandClock, embedding: Embedding
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its backlog for ever
        url = f"redis+sentinel://127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{group.ports[2]}/{SERVICE}"
        await works(make_tier(url, timeout_s=1.0), clock, embedding)
