"""The stores the settings describe. What needs a cluster (the embedded server's actor) is tested in tests/e2e."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence

import pytest
from pydantic import ValidationError
from redis import Redis

from deployments.redis_server import RedisServer
from deployments.settings import CACHE_SECRET_VARIABLE, Cache
from deployments.stores import open_encoder_store, open_store
from omnilmm.errors import OmniError
from omnilmm.messages import Embedding, PreparedImage
from omnilmm.observe import CacheAsked, Event

KEY = "emb:" + "0" * 64
SIDE = 28
EVEN = struct.pack("<128f", *(math.sin(i) for i in range(128)))
SPIKED = struct.pack("<128f", *(1e4 if i == 5 else math.sin(i) for i in range(128)))


class Encoder:
    """Makes the same vectors of every picture, and remembers what it was asked."""

    def __init__(self, data: bytes) -> None:
        self.vectors = Embedding("float32", (2, 64), data)
        self.sides: list[int] = []

    def encode(self, pictures: Sequence[PreparedImage]) -> list[Embedding | OmniError]:
        self.sides += [picture.side for picture in pictures]
        return [self.vectors for _ in pictures]


class Notes:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_SECRET_VARIABLE, "s" * 32)
    with RedisServer(max_memory_bytes=16 << 20) as running:
        yield running


async def stored_bytes(server: RedisServer, cache: Cache, encoder: Encoder, notes: Notes) -> int:
    """Length of what a vision replica puts into Redis; what a decoder gets out is checked on the way."""
    store = await open_encoder_store(cache, notes, encoder.encode, SIDE)
    reader = await open_store(cache, Notes())
    try:
        assert await store.put(KEY, encoder.vectors)
        got = await reader.get(KEY)
        assert got is not None
        assert (got.dtype, got.shape) == ("float32", (2, 64))
    finally:
        await store.aclose()
        await reader.aclose()
    with Redis.from_url(server.url) as client:
        return client.strlen("omni:" + KEY)


async def test_an_encoding_that_fits_is_used(server: RedisServer) -> None:
    exact = await stored_bytes(server, Cache(redis=server.url, timeout_s=5), Encoder(EVEN), Notes())
    encoder, notes = Encoder(EVEN), Notes()
    packed = await stored_bytes(server, Cache(redis=server.url, timeout_s=5, encoding="int8"), encoder, notes)
    assert exact - packed == len(EVEN) - 2 * (4 + 64)
    assert encoder.sides == [SIDE] * 5
    assert CacheAsked("redis", "refused") not in notes.events


async def test_an_encoding_that_does_not_is_refused_at_start(
    server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    exact = await stored_bytes(server, Cache(redis=server.url, timeout_s=5), Encoder(SPIKED), Notes())
    notes = Notes()
    refused = await stored_bytes(server, Cache(redis=server.url, timeout_s=5, encoding="int8"), Encoder(SPIKED), notes)
    assert refused == exact
    assert notes.events.count(CacheAsked("redis", "refused")) == 1  # at start, and then never tried again
    assert "int8 does not fit" in caplog.text


async def test_exact_numbers_need_no_rehearsal(server: RedisServer) -> None:
    encoder = Encoder(EVEN)
    for cache in (Cache(redis=server.url), Cache(redis="none", encoding="fp8")):
        await (await open_encoder_store(cache, Notes(), encoder.encode, SIDE)).aclose()
    assert encoder.sides == []


async def test_the_password_may_stand_in_a_file(server: RedisServer, tmp_path) -> None:
    path = tmp_path / "password"
    path.write_text("word\n")
    with Redis.from_url(server.url) as client:
        client.config_set("requirepass", "word")
    store = await open_store(Cache(redis=server.url, timeout_s=5, redis_password_file=str(path)), Notes())
    try:
        assert await store.put(KEY, Encoder(EVEN).vectors)
    finally:
        await store.aclose()


@pytest.mark.parametrize("url", ["redis+sentinel://a:1,b:2/service", "rediss+sentinel://a/service", "unix:///x"])
def test_every_kind_of_address_can_be_said(url: str) -> None:
    assert Cache(redis=url, redis_password_file="/run/secrets/redis").redis == url


@pytest.mark.parametrize(
    "words",
    [
        {"encoding": "int4"},
        {"redis": "sentinel://a/b"},
        {"redis": "redis+sentinels://a/b"},
        {"redis_password_file": "/run/secrets/redis"},  # whose?
        {"redis": "none", "redis_password_file": "/run/secrets/redis"},
        {"redis": "redis://a", "redis_password_file": ""},
    ],
)
def test_what_makes_no_sense_is_refused(words: dict) -> None:
    with pytest.raises(ValidationError):
        Cache.model_validate(words)
