"""K12: what is under way for a revoked tenant ends, and what it had is taken away."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest
import uvicorn
from http_fakes import Decoder, client_of, error_of, make_card, make_flow, make_service

from deployments.departures import Departures
from deployments.http import make_app
from deployments.records import RosterWatch
from deployments.storage import Storage
from omnilmm.api.sse import EventReader
from omnilmm.batch.states import Status
from omnilmm.database import Database
from omnilmm.errors import NotFound, Overloaded
from omnilmm.files.store import Purpose
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.keys import KeyBook

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"
TICK_S = 0.002


@pytest.fixture
def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'records.db'}")
    yield database
    database.close()


@pytest.fixture
def directory(database):
    directory = Directory(database)
    for name, changes in (("acme", {}), ("other", {}), ("sharing", {"share": "x"})):
        directory.add(name, changes)
    return directory


@pytest.fixture
def storage(database, tmp_path):
    return Storage(database, tmp_path / "storage", max_tenant_bytes=1 << 30)


@pytest.fixture
async def book(directory):
    book = KeyBook()
    watch = RosterWatch(directory, book, every_s=TICK_S)
    await watch.start()
    yield book
    await watch.aclose()


class Eraser:
    def __init__(self):
        self.erased, self.is_away = [], False

    async def __call__(self, tenant, data):
        if self.is_away:
            raise Overloaded("away")
        self.erased.append((tenant.scope, data))


@pytest.fixture
def eraser():
    return Eraser()


@pytest.fixture
async def departures(book, directory, storage, eraser):
    departures = Departures(book, directory, storage.desk, eraser, every_s=TICK_S, again_s=0.05)
    departures.start()
    yield departures
    await departures.aclose()


def put(storage, tenant, data=b"picture", purpose=Purpose.VISION):
    with storage.files.upload(tenant, max_bytes=1000) as upload:
        upload.write(data)
        return upload.finish(purpose=purpose, filename="a")


def hand_in(storage, tenant):
    line = {"custom_id": "a", "method": "POST", "url": PATH, "body": CHAT}
    stored = put(storage, tenant, json.dumps(line).encode(), Purpose.BATCH)
    return storage.desk.submit(tenant, endpoint=PATH, input_file_id=stored.id, completion_window="24h")


def num_files(storage, tenant):
    return len(storage.files.list(tenant).items)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)


# -- requests under way -------------------------------------------------------------------------------


@pytest.fixture
def decoder():
    return Decoder()


@pytest.fixture
def service(data, decoder, book):
    return make_service({"m": make_flow(make_card(data, "m"), decoder)}, keys=book)


@pytest.mark.parametrize("what", ["tenant", "key"])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_what_is_under_way_ends_when_its_key_is_revoked(directory, service, decoder, what, is_stream):
    mine, others = (directory.add_key(name) for name in ("acme", "other"))
    await until(lambda: service.keys.is_revoked(service.keys.tenant("acme")) is False and not service.keys.is_open)
    decoder.gates = {0: asyncio.Event(), 1: asyncio.Event()}  # in front of the second token
    async with client_of(service) as http:

        async def ask(key):
            header = {"Authorization": f"Bearer {key.secret}"}
            return await http.post(PATH, json=CHAT | {"stream": is_stream}, headers=header)

        asking = asyncio.create_task(ask(mine))
        await until(lambda: decoder.num_open == 1)
        bystander = asyncio.create_task(ask(others))
        await until(lambda: decoder.num_open == 2)
        if what == "tenant":
            directory.revoke("acme")
        else:
            directory.revoke_key("acme", mine.info.id)
        response = await asyncio.wait_for(asking, 30)
        assert decoder.num_open == 1, "the decoder is free again"
        if is_stream:
            events = EventReader().feed(response.content)
            assert json.loads(events[-1].data)["error"]["code"] == "invalid_api_key"
            assert b"[DONE]" not in response.content
        else:
            assert error_of(response)[:2] == (401, "invalid_api_key")
        again = await ask(mine)
        assert again.status_code == 401
        decoder.gates[1].set()
        assert (await bystander).status_code == 200
    first, second = service.ledger.receipts
    assert (first.tenant, first.status, first.completion_tokens) == ("acme", 401, 1)
    assert (second.tenant, second.status) == ("other", 200)
    service.keys.presence.check_integrity()
    service.governor.check_integrity()


async def test_a_stream_over_a_socket_is_told_why_it_ends(directory, service, decoder):
    """The server carries a stream on in a task of its own, inside a cancel scope of its own."""
    key = directory.add_key("acme")
    await until(lambda: not service.keys.is_open)
    decoder.gates = {0: asyncio.Event()}
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}{PATH}"
    header = {"Authorization": f"Bearer {key.secret}"}
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            async with http.stream("POST", url, json=CHAT | {"stream": True}, headers=header) as response:
                pieces = response.aiter_bytes()
                received = await anext(pieces)
                assert decoder.num_open == 1
                directory.revoke("acme")
                received += b"".join([piece async for piece in pieces])
            again = await http.post(url, json=CHAT, headers=header)
    finally:
        server.should_exit = True
        await serving
        listening.close()
    assert json.loads(EventReader().feed(received)[-1].data)["error"]["code"] == "invalid_api_key"
    assert again.status_code == 401
    assert decoder.num_open == 0
    assert [receipt.status for receipt in service.ledger.receipts] == [401]


# -- what is left -------------------------------------------------------------------------------------


async def test_a_revoked_tenant_leaves_nothing(directory, storage, departures, eraser):
    batch, kept = hand_in(storage, "acme"), hand_in(storage, "other")
    put(storage, "acme", b"one")
    put(storage, "acme", b"two")
    put(storage, "acme", b"text", Purpose.USER_DATA)
    put(storage, "other")
    directory.revoke("acme")
    await until(lambda: num_files(storage, "acme") == 0)
    assert storage.desk.batches.get("acme", batch.id).status is Status.CANCELLING
    assert sorted(eraser.erased) == [("acme", b"one"), ("acme", b"two")]
    assert storage.desk.batches.get("other", kept.id).status is Status.VALIDATING
    assert num_files(storage, "other") == 2
    assert {blob.parent.name for blob in storage.files.blobs.blobs()} == {
        storage.files.blobs.path("other", "x").parent.name
    }


async def test_a_revoked_key_takes_nothing_along(directory, storage, departures, book, eraser):
    key = directory.add_key("acme")
    await until(lambda: not book.is_open)
    batch = hand_in(storage, "acme")
    directory.revoke_key("acme", key.info.id)
    directory.revoke("other")  # seen later than the key
    put(storage, "other")
    await until(lambda: num_files(storage, "other") == 0)
    assert num_files(storage, "acme") == 1
    assert storage.desk.batches.get("acme", batch.id).status is Status.VALIDATING


async def test_what_arrives_late_goes_too(directory, storage, departures, book):
    directory.revoke("acme")
    await until(lambda: "acme" in departures._gone)
    put(storage, "acme")  # an upload that was under way
    await until(lambda: num_files(storage, "acme") == 0)


async def test_a_picture_of_a_shared_scope_is_erased_there(directory, storage, departures, eraser):
    put(storage, "sharing", b"one")
    directory.revoke("sharing")
    await until(lambda: eraser.erased == [("+x", b"one")])


async def test_a_cache_that_is_away_is_waited_for(directory, storage, departures, eraser, book, caplog):
    eraser.is_away = True
    put(storage, "acme", b"one")
    put(storage, "other", b"text", Purpose.USER_DATA)
    directory.revoke("acme")
    directory.revoke("other")
    await until(lambda: num_files(storage, "other") == 0)  # one does not hold up another
    assert num_files(storage, "acme") == 1
    eraser.is_away = False
    await until(lambda: num_files(storage, "acme") == 0)
    assert eraser.erased == [("acme", b"one")]


async def test_it_goes_on_after_a_restart(directory, storage, book, eraser):
    put(storage, "acme")
    directory.revoke("acme")
    await until(lambda: book.revoked == {"acme"})
    departures = Departures(book, directory, storage.desk, eraser)
    await departures.clear()
    assert num_files(storage, "acme") == 0
    with pytest.raises(NotFound):
        book.tenant("acme")


async def test_two_routers_do_not_disturb_each_other(directory, storage, book, eraser):
    for number in range(20):
        put(storage, "acme", b"%d" % number)
    directory.revoke("acme")
    await until(lambda: book.revoked == {"acme"})
    both = [Departures(book, directory, storage.desk, eraser) for _ in range(2)]
    await asyncio.gather(*(departures.clear() for departures in both))
    assert num_files(storage, "acme") == 0
    assert {data for _, data in eraser.erased} == {b"%d" % number for number in range(20)}
