"""Adapters that an admin uploads: they appear whole or not at all, and what is wrong with one harms nobody."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from fastapi import FastAPI
from route_walk import every_route

from deployments.adapter_folder import ABANDONED_S, RECORD_FILE, AdapterFolder
from deployments.adapter_uploads import MAX_SETTINGS_BYTES, adapter_routes
from deployments.adapters import AdapterDecoder, AdapterHost, look, open_adapter_folder, served_to
from deployments.refusing import add_handlers
from deployments.settings import Adapters, Model
from omnilmm.database import Database
from omnilmm.engine.shelf import AdapterShelf
from omnilmm.errors import ConfigError, NotFound
from omnilmm.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterCatalog, AdapterFacts, read_adapter
from omnilmm.models.config import read_model_config
from omnilmm.pipeline import SystemClock
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.keys import AdminKeys, KeyBook, new_key
from omnilmm.tenancy.tenant import Tenant
from omnilmm.training.config import LoraConfig
from omnilmm.training.lora import Adapter

CHECKPOINT = Path(__file__).parents[1] / "data" / "minicpm-v-tiny"
CONFIG = read_model_config(CHECKPOINT)
ADMIN, ADMIN_DIGEST = new_key()
POST = "/admin/v1/adapters/m"
MAX_RANK = 4


def make_files(folder, *, seed=1, rank=2):
    """Settings and weights of an adapter, as bytes."""
    torch.manual_seed(seed)
    adapter = Adapter(CONFIG, LoraConfig(r=rank, lora_alpha=4.0)).requires_grad_(False)
    for up in adapter.up:
        torch.nn.init.normal_(up)
    folder.mkdir()
    adapter.save(folder, base="somewhere")
    return (folder / CONFIG_FILE).read_text(), (folder / WEIGHTS_FILE).read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("made") / "adapter")


class Service(SimpleNamespace):
    async def refresh_adapters(self):
        for host in self.adapters.values():
            await host.refresh()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def settings(folder):
    return Adapters(folder=str(folder), max_rank=MAX_RANK, paths={"fixed": str(folder)}, tenants={"mine": ["acme"]})


def make_host(settings):
    def make_flow(name, called, owners):
        return SimpleNamespace(card=SimpleNamespace(name=f"m:{name}"), decoder=AdapterDecoder(None, called, owners))

    model = Model(name="m", path=str(CHECKPOINT), dtype="float32", adapters=settings)
    return AdapterHost(settings, open_folder=lambda: open_adapter_folder(model, CONFIG), make_flow=make_flow)


@pytest.fixture
def service(tmp_path, settings):
    database = Database(f"sqlite:///{tmp_path}/omnilmm.db")
    directory = Directory(database)
    keys = KeyBook(is_managed=True)
    for name in ("acme", "other"):
        directory.add(name, {})
        directory.add_key(name)
    keys.learn(directory.roster())
    yield Service(keys=keys, admins=AdminKeys([ADMIN_DIGEST]), adapters={"m": make_host(settings)})
    database.close()


@pytest.fixture
def app(service):
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_handlers(app)
    app.include_router(adapter_routes(service))
    return app


@pytest.fixture
async def admin(app):
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5000))
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        yield client


async def upload(admin, files, name="legal", url=POST, **fields):
    settings, weights = files
    data = {"name": name, "adapter_config": settings, **fields}
    return await admin.post(url, data=data, files={"file": ("adapter_model.safetensors", weights)})


def code_of(response):
    error = response.json()["error"]
    return response.status_code, error["code"]


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


async def test_no_route_answers_but_to_an_admin(app, service):
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5000))
    routes = {*every_route(app)}
    assert {("POST", "/admin/v1/adapters/x"), ("DELETE", "/admin/v1/adapters/x/x")} <= routes
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for method, path in routes:
            assert (await client.request(method, path)).status_code == 401


async def test_the_life_of_an_adapter(admin, service, folder, files):
    host = service.adapters["m"]
    made = await upload(admin, files, tenants="other, acme")
    assert made.status_code == 201
    document = made.json()
    digest = read_adapter(folder / "legal", CONFIG, max_rank=MAX_RANK, dtype=torch.float32).digest
    assert document == {
        "object": "adapter",
        "id": "m:legal",
        "model": "m",
        "name": "legal",
        "tenants": ["acme", "other"],
        "uploaded": True,
        "created_at": document["created_at"],
        "rank": 2,
        "bytes": len(files[1]),
        "digest": digest,
    }
    assert contents(folder) == ["legal", *(f"legal/{f}" for f in (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE))]
    assert list(host.flows) == ["m:fixed", "m:legal"]
    assert served_to(Tenant("acme", "acme"), host.flows) == ["m:fixed", "m:legal"]
    assert served_to(Tenant("stranger", "stranger"), host.flows) == ["m:fixed"]
    assert host.flows["m:legal"].decoder._adapter == f"legal@{digest[:16]}"
    assert (await admin.get(f"{POST}/legal")).json() == document
    assert [each["id"] for each in (await admin.get("/admin/v1/adapters")).json()["data"]] == ["m:fixed", "m:legal"]

    assert code_of(await upload(admin, files)) == (400, "already_exists")
    assert code_of(await upload(admin, files, name="fixed")) == (400, "already_exists")
    gone = await admin.delete(f"{POST}/legal")
    assert gone.json() == {"object": "adapter", "id": "m:legal", "status": "deleted"}
    assert (contents(folder), list(host.flows)) == ([], ["m:fixed"])
    for response in (await admin.delete(f"{POST}/legal"), await admin.get(f"{POST}/legal")):
        assert code_of(response) == (404, "adapter_not_found")


async def test_other_routers_find_it_and_keep_what_has_not_changed(admin, settings, tmp_path, files):
    elsewhere = make_host(settings)
    assert not await elsewhere.refresh()
    await upload(admin, files, name="a")
    assert await elsewhere.refresh()
    flow = elsewhere.flows["m:a"]
    await upload(admin, files, name="b")
    assert await elsewhere.refresh()
    assert elsewhere.flows["m:a"] is flow
    await admin.delete(f"{POST}/a")
    other = make_files(tmp_path / "other", seed=2)
    assert (await upload(admin, other, name="a")).status_code == 201
    assert await elsewhere.refresh()
    assert elsewhere.flows["m:a"].decoder._adapter != flow.decoder._adapter, "another of the same name is another"


async def test_a_decoder_never_takes_one_version_for_another(admin, folder, tmp_path, files):
    digest = (await upload(admin, files, name="a")).json()["digest"]

    def read(place):
        return read_adapter(place, CONFIG, max_rank=MAX_RANK, dtype=torch.float32)

    pool = SimpleNamespace(num_ranks=8, write=lambda ranks, weights: None)
    shelf = AdapterShelf(AdapterCatalog(folder), read, pool, max_loaded=2, clock=SystemClock())
    old = f"a@{digest[:16]}"
    loaded = shelf.admit(old, shelf.read(old), shelf.take_room(2))
    assert loaded.key == old
    await admin.delete(f"{POST}/a")
    new = f"a@{(await upload(admin, make_files(tmp_path / 'o', seed=2), name='a')).json()['digest'][:16]}"
    assert shelf.try_hold(old) is loaded, "what runs, goes on with what it began with"
    assert shelf.try_hold(new) is None
    assert shelf.read(new).digest.startswith(new[2:])
    with pytest.raises(NotFound):
        shelf.read(old)


@pytest.mark.parametrize("name", ["../x", "..", ".", "a/b", "", ".hidden", "a:b", "a@b", "x" * 64, "a\0b", "é", "a\n"])
async def test_names_that_are_none_are_refused(name, admin, folder, files):
    assert (await upload(admin, files, name=name)).status_code == 400
    assert (contents(folder), contents(folder.parent)) == ([], ["adapters", *contents_of_database(folder.parent)])


def contents_of_database(folder):
    return sorted(path.name for path in folder.glob("omnilmm.db*"))


def reheader(weights, change):
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    change(header, min(set(header) - {"__metadata__"}))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


def claim(**changes):
    return lambda settings, weights: (settings, reheader(weights, lambda header, some: header[some].update(changes)))


def say(**changes):
    return lambda settings, weights: (json.dumps(json.loads(settings) | changes), weights)


def weights_are(change):
    return lambda settings, weights: (settings, change(weights))


def with_nan(weights):
    return weights[:-4] + struct.pack("<f", float("nan"))


WRONG = {
    "rank 1e6": say(r=10**6),
    "rank over the limit": say(r=MAX_RANK + 1),
    "another rank than the tensors": say(r=3),
    "not of this model": say(target_modules=["lm_head"]),
    "dora": say(use_dora=True),
    "settings no json": lambda settings, weights: ("{", weights),
    "settings deep": lambda settings, weights: ("[" * 10_000, weights),
    "settings a list": lambda settings, weights: ("[]", weights),
    "100 GB declared": claim(data_offsets=[0, 100 * 10**9]),
    "negative offset": claim(data_offsets=[-4, 0]),
    "overlap": claim(data_offsets=[4, 8]),
    "huge shape": claim(shape=[10**9, 10**9]),
    "no list": claim(shape="many"),
    "float64": claim(dtype="F64"),
    "unknown tensor": weights_are(lambda w: reheader(w, lambda h, some: h.update({"CANARY": h[some]}))),
    "missing tensor": weights_are(lambda w: reheader(w, lambda h, some: h.pop(some))),
    "header of 1 GB": weights_are(lambda w: struct.pack("<Q", 10**9) + w[8:]),
    "header of 2**63": weights_are(lambda w: struct.pack("<Q", 2**63) + w[8:]),
    "header deep": weights_are(lambda w: struct.pack("<Q", 60_000) + b"[" * 60_000),
    "empty": weights_are(lambda w: b""),
    "seven bytes": weights_are(lambda w: w[:7]),
    "cut": weights_are(lambda w: w[:-1]),
    "cut in the header": weights_are(lambda w: w[:100]),
    "too long": weights_are(lambda w: w + b"\0"),
    "nan": weights_are(with_nan),
    "pickle": weights_are(lambda w: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
    "zip": weights_are(lambda w: b"PK\x03\x04" + bytes(100)),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
async def test_what_is_wrong_with_it_is_told_and_nothing_stays(change, admin, service, folder, files):
    response = await upload(admin, change(*files))
    assert code_of(response) == (400, "invalid_adapter")
    assert str(folder) not in response.text
    assert "CANARY" not in response.text
    assert contents(folder) == []
    assert list(service.adapters["m"].flows) == ["m:fixed"]


async def test_one_that_is_too_large_is_cut_off(admin, service, folder, files):
    most = service.adapters["m"].open_folder().max_bytes
    assert code_of(await upload(admin, (files[0], bytes(most + 1)))) == (413, "file_too_large")
    sent = 0

    async def endless():
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while True:
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = await admin.post(POST, content=endless(), headers=headers)
    assert code_of(response) == (413, "file_too_large")
    assert sent <= most + (2 << 20)
    assert contents(folder) == []


async def test_the_form_is_looked_at(admin, folder, files):
    assert code_of(await upload(admin, files, owner="x")) == (400, "unknown_parameter")
    assert code_of(await upload(admin, files, tenants="nobody")) == (400, "tenant_not_found")
    assert (await upload(admin, files, tenants="")).status_code == 400
    assert (await upload(admin, (" " * MAX_SETTINGS_BYTES + files[0], files[1]))).status_code == 400
    for missing in ("name", "adapter_config"):
        data = {"name": "a", "adapter_config": files[0]}
        del data[missing]
        response = await admin.post(POST, data=data, files={"file": files[1]})
        assert code_of(response) == (400, "missing_required_parameter")
    assert code_of(await upload(admin, files, url="/admin/v1/adapters/other")) == (404, "model_not_found")
    assert contents(folder) == []


async def test_a_client_that_breaks_off_leaves_nothing(admin, folder):
    async def broken():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + bytes(1000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert code_of(await admin.post(POST, content=broken(), headers=headers)) == (400, "invalid_form")
    assert contents(folder) == []


async def test_the_operator_s_own_are_shown_and_stay(admin, folder, files):
    (folder / "mine").mkdir()
    (folder / "link").symlink_to(folder / "mine")
    shown = (await admin.get(f"{POST}/mine")).json()
    assert (shown["uploaded"], shown["tenants"], shown["rank"]) == (False, ["acme"], None)
    for name in ("mine", "link", "fixed", "%2e%2e"):
        assert (await admin.delete(f"{POST}/{name}")).status_code == 404
    assert contents(folder) == ["link", "mine"]


async def test_the_configuration_has_the_last_word_on_owners(admin, files):
    assert (await upload(admin, files, name="mine", tenants="other")).json()["tenants"] == ["acme"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tenants": null}', "[" * 50_000])
async def test_a_record_that_cannot_be_read_belongs_to_nobody(text, admin, settings, folder, files):
    await upload(admin, files)
    (folder / "legal" / RECORD_FILE).write_text(text)
    assert look(settings)["legal"].owners == frozenset()


async def test_without_a_folder_nothing_is_uploaded(admin, service, folder, files):
    service.adapters["m"] = make_host(Adapters())
    assert code_of(await upload(admin, files)) == (400, "uploads_not_possible")
    with pytest.raises(ConfigError):
        AdapterFolder(folder / "missing", lambda place: AdapterFacts("", 1, 1), max_bytes=1)


async def test_what_a_killed_server_left_is_swept_away(admin, folder, files):
    for name, age in ((".incoming-old", ABANDONED_S + 60), (".outgoing-old", ABANDONED_S + 60), (".incoming-new", 0)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    await upload(admin, files)
    assert sorted(path.name for path in folder.iterdir()) == [".incoming-new", "legal"]


async def test_a_folder_out_of_sight_changes_nothing(service, monkeypatch):
    host = service.adapters["m"]

    def away(settings):
        raise PermissionError

    monkeypatch.setattr("deployments.adapters.look", away)
    assert not await host.refresh()
    assert list(host.flows) == ["m:fixed"]
