from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis
from tenancy_fakes import HandClock

from deployments.redis_server import RedisServer
from omnilmm.database import Database


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(scope="session")
def _limits_server() -> Iterator[RedisServer]:
    with RedisServer(max_memory_bytes=16 << 20) as server:
        yield server


@pytest.fixture
def redis(_limits_server: RedisServer) -> Iterator[Redis]:
    """A client of a real server, empty."""
    with Redis.from_url(_limits_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def database_url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/records/omnilmm.db"


@pytest.fixture
def database(database_url) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()
