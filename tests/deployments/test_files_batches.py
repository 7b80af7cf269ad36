"""/v1/files and /v1/batches over a real HTTP server, asked by the official client and by rude ones."""

import asyncio
import io
import json
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))
from batch_fakes import ENDPOINT, QUICK, Echo, Stuck, jsonl, line, make_desk

from deployments import batches, files
from deployments.refusing import add_handlers
from omnilmm.batch.worker import BatchWorker
from omnilmm.config import ImageLimits
from omnilmm.errors import ContextLengthExceeded, Overloaded
from omnilmm.tenancy.idempotency import IdempotencyStore
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, digest_of

KEYS = {"acme": "sk-acme", "other": "sk-other"}
MAX_UPLOAD = 100_000


class Erased:
    def __init__(self):
        self.pictures = []
        self.is_away = False

    async def __call__(self, tenant, data):
        if self.is_away:
            raise Overloaded("the cache is away", retry_after=1)
        self.pictures.append((tenant.name, data))


@pytest.fixture
def service(tmp_path):
    desk = make_desk(tmp_path)
    yield SimpleNamespace(
        desk=desk,
        files=desk.files,
        limits=ImageLimits(max_file_bytes=50_000),
        max_upload_bytes=MAX_UPLOAD,
        erase_picture=Erased(),
        batch_endpoints=(ENDPOINT, "/v1/completions"),
        idempotency=IdempotencyStore(desk.files.database),
        root=tmp_path,
    )
    desk.batches.check_integrity()
    desk.files.check_integrity()
    assert not [*desk.files.blobs.incoming()], "an upload left something behind"


def make_app(service):
    book = KeyBook(KeyRecord(digest_of(key), Tenant(name, name)) for name, key in KEYS.items())
    app = FastAPI()

    async def authenticate(request: Request):
        request.state.tenant = book.authenticate(request.headers.getlist("authorization"), "127.0.0.1")

    routes = APIRouter(dependencies=[Depends(authenticate)])
    files.add_routes(routes, service)
    batches.add_routes(routes, service)
    app.include_router(routes)
    add_handlers(app)
    return app


@asynccontextmanager
async def serving(service, answerer=None):
    """The address of a server, with a worker behind it if there is somebody to answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", lifespan="off"))
        running = asyncio.ensure_future(server.serve(sockets=[listening]))
        tasks = [running]
        if answerer is not None:
            worker = BatchWorker(service.desk, answerer, QUICK, sleep=lambda seconds: asyncio.sleep(0.005))
            tasks.append(asyncio.ensure_future(worker.run()))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def client_of(address, tenant="acme"):
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEYS[tenant], max_retries=0)


@asynccontextmanager
async def raw(service, tenant="acme"):
    transport = httpx.ASGITransport(make_app(service))
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
        yield http


def error_of(response):
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


async def poll(ask, while_):
    """Ask until the answer is another, as a client would."""
    while (now := await ask()).status in while_:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return now


async def wait_for_end(client, batch):
    working = ("validating", "in_progress", "finalizing", "cancelling")
    return await poll(lambda: client.batches.retrieve(batch.id), working)


async def test_the_official_client_runs_a_batch(service):
    answerer = Echo(bad=ContextLengthExceeded("too long", param="messages"))
    content = jsonl(line("a", "one"), line("b", "bad"), line("c", "three"))
    async with serving(service, answerer) as address, client_of(address) as client:
        file = await client.files.create(file=("lines.jsonl", content), purpose="batch")
        assert (file.filename, file.bytes, file.purpose, file.status) == (
            "lines.jsonl",
            len(content),
            "batch",
            "processed",
        )
        assert file.expires_at == file.created_at + 30 * 24 * 3600
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"who": "me"}
        )
        assert batch.status == "validating"
        done = await wait_for_end(client, batch)
        assert done.status == "completed"
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
        assert done.metadata == {"who": "me"}
        assert done.usage.total_tokens == 10
        assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at < done.expires_at
        output = [json.loads(row) for row in (await client.files.content(done.output_file_id)).text.splitlines()]
        assert [row["custom_id"] for row in output] == ["a", "c"]
        assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == "one"
        errors = [json.loads(row) for row in (await client.files.content(done.error_file_id)).text.splitlines()]
        assert errors[0]["response"]["body"]["error"]["code"] == "context_length_exceeded"
        assert [b.id async for b in client.batches.list(limit=1)] == [batch.id]
        names = {f.id async for f in client.files.list(limit=1)}
        assert names == {file.id, done.output_file_id, done.error_file_id}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.cancel(batch.id)
        assert caught.value.code == "batch_not_cancellable"
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)


async def test_the_official_client_sees_a_failed_and_a_cancelled_batch(service):
    answerer = Stuck(0)
    async with serving(service, answerer) as address, client_of(address) as client:
        bad = await client.files.create(file=("x", b"{\n"), purpose="batch")
        batch = await client.batches.create(input_file_id=bad.id, endpoint=ENDPOINT, completion_window="24h")
        failed = await wait_for_end(client, batch)
        assert failed.status == "failed"
        assert [(e.code, e.line) for e in failed.errors.data] == [("invalid_json_line", 1)]
        good = await client.files.create(file=("x", jsonl(line("a"))), purpose="batch")
        batch = await client.batches.create(input_file_id=good.id, endpoint=ENDPOINT, completion_window="24h")
        await asyncio.wait_for(answerer.begun.wait(), 60)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        now = await wait_for_end(client, batch)
        assert now.status == "cancelled"
        assert "batch_cancelled" in (await client.files.content(now.error_file_id)).text


async def test_a_picture_is_uploaded_once_and_read_by_its_id(service, data):
    picture = (data / "images" / "coins_gray.png").read_bytes()
    service.limits = ImageLimits()
    service.max_upload_bytes = 10**6
    async with serving(service) as address, client_of(address) as client:
        file = await client.files.create(
            file=("coins.png", picture), purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600
        assert await service.files.read("acme", file.id) == picture
        assert [f.id async for f in client.files.list(purpose="vision")] == [file.id]
        service.erase_picture.is_away = True
        with pytest.raises(openai.InternalServerError):
            await client.files.delete(file.id)
        assert (await client.files.retrieve(file.id)).id == file.id  # nothing half-erased
        service.erase_picture.is_away = False
        await client.files.delete(file.id)
    assert service.erase_picture.pictures == [("acme", picture)]
    assert [*service.files.blobs.blobs()] == []


async def test_what_is_uploaded_as_a_picture_must_be_one(service):
    async with raw(service) as http:
        for content, code in ((b"hello there", "invalid_image_format"), (b"", "empty_image_file")):
            form = {"data": {"purpose": "vision"}, "files": {"file": ("a.png", content)}}
            assert error_of(await http.post("/v1/files", **form)) == (400, code, "file")
        big = {"data": {"purpose": "vision"}, "files": {"file": ("a.png", b"x" * 60_000)}}
        assert error_of(await http.post("/v1/files", **big))[:2] == (413, "image_file_too_large")


async def test_content_is_never_shown_as_a_page(service):
    page = b"<script>alert(1)</script>"
    async with raw(service) as http:
        name = 'a";\u2603/../x.html'
        form = {"data": {"purpose": "user_data"}, "files": {"file": (name, page)}}
        file_id = (await http.post("/v1/files", **form)).json()["id"]
        got = await http.get(f"/v1/files/{file_id}/content", headers={"Range": "bytes=5-1," * 3000})
    assert got.content == page
    assert got.status_code == 200
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["content-disposition"].startswith(
        "attachment; filename*=UTF-8''a%2522%3B%E2%98%83%2F..%2Fx.html"
    )


async def test_another_tenants_things_are_not_there(service):
    async with raw(service) as mine, raw(service, "other") as theirs:
        form = {"data": {"purpose": "batch"}, "files": {"file": ("a", jsonl(line("a")))}}
        file_id = (await theirs.post("/v1/files", **form)).json()["id"]
        ask = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
        batch_id = (await theirs.post("/v1/batches", json=ask)).json()["id"]
        nothing = "file-" + "0" * 32, "batch_" + "0" * 32
        for method, path in (
            ("GET", "/v1/files/{0}"),
            ("GET", "/v1/files/{0}/content"),
            ("DELETE", "/v1/files/{0}"),
            ("GET", "/v1/files?after={0}"),
            ("GET", "/v1/batches/{1}"),
            ("POST", "/v1/batches/{1}/cancel"),
            ("GET", "/v1/batches?after={1}"),
        ):
            foreign = await mine.request(method, path.format(file_id, batch_id))
            missing = await mine.request(method, path.format(*nothing))
            assert foreign.status_code == missing.status_code == 404, path
            assert foreign.content == missing.content
            assert foreign.headers == missing.headers
        foreign = await mine.post("/v1/batches", json=ask)
        missing = await mine.post("/v1/batches", json=ask | {"input_file_id": nothing[0]})
        assert foreign.status_code == missing.status_code == 404
        assert foreign.content == missing.content
        assert (await theirs.get(f"/v1/files/{file_id}")).status_code == 200
        assert (await mine.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"completion_window": "1h"}, (400, "invalid_value", "completion_window")),
        ({"endpoint": "/v1/embeddings"}, (400, "invalid_value", "endpoint")),
        ({"input_file_id": None}, (400, "invalid_type", "input_file_id")),
        ({"input_file_id": "file-x"}, (404, "file_not_found", "input_file_id")),
        ({"metadata": {"a" * 65: "b"}}, (400, "property_name_above_max_length", "metadata")),
        ({"metadata": {str(i): "" for i in range(17)}}, (400, "object_above_max_properties", "metadata")),
        ({"surprise": 1}, (400, "unknown_parameter", "surprise")),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, None),
    ],
)
async def test_bad_batches_are_refused(service, changes, wanted):
    async with raw(service) as http:
        form = {"data": {"purpose": "batch"}, "files": {"file": ("a", jsonl(line("a")))}}
        file_id = (await http.post("/v1/files", **form)).json()["id"]
        ask = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"} | changes
        wanted = wanted or (400, "integer_below_min_value", "output_expires_after.seconds")
        assert error_of(await http.post("/v1/batches", json=ask)) == wanted


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("limit=0", (400, "integer_below_min_value", "limit")),
        ("limit=10001", (400, "integer_above_max_value", "limit")),
        ("limit=x", (400, "invalid_type", "limit")),
        ("limit=1&limit=2", (400, "invalid_value", "limit")),
        ("order=up", (400, "invalid_value", "order")),
        ("purpose=evil", (400, "invalid_value", "purpose")),
        ("surprise=1", (400, "unknown_parameter", None)),
        ("after=" + "x" * 65, (400, "invalid_value", "after")),
    ],
)
async def test_bad_queries_are_refused(service, query, wanted):
    async with raw(service) as http:
        assert error_of(await http.get(f"/v1/files?{query}")) == wanted


async def test_what_is_sent_again_is_carried_out_once(service):
    async with raw(service) as mine, raw(service, "other") as theirs:

        def form(content=b"hello", name="a"):
            return {"data": {"purpose": "user_data"}, "files": {"file": (name, content)}}

        key = {"Idempotency-Key": "once"}
        first = await mine.post("/v1/files", **form(), headers=key)
        again = await mine.post("/v1/files", **form(), headers=key)  # httpx draws another boundary
        assert first.status_code == again.status_code == 200
        assert first.content == again.content
        for changed in (form(b"other"), form(name="b")):
            assert error_of(await mine.post("/v1/files", **changed, headers=key))[:2] == (422, "idempotency_key_reused")
        assert (await theirs.post("/v1/files", **form(), headers=key)).json()["id"] != first.json()["id"]
        bad = await mine.post("/v1/files", **form(), headers={"Idempotency-Key": "x" * 256})
        assert error_of(bad) == (400, "invalid_value", "idempotency-key")
        assert len((await mine.get("/v1/files")).json()["data"]) == 1

        file = {"data": {"purpose": "batch"}, "files": {"file": ("a", jsonl(line("a")))}}
        file_id = (await mine.post("/v1/files", **file)).json()["id"]
        ask = {"input_file_id": "file-none", "endpoint": ENDPOINT, "completion_window": "24h"}
        assert (await mine.post("/v1/batches", json=ask, headers=key)).status_code == 404  # not carried out, not saved
        ask["input_file_id"] = file_id
        ids = [(await mine.post("/v1/batches", json=ask, headers=key)).json()["id"] for _ in range(3)]
        assert len(set(ids)) == 1
        assert len((await mine.get("/v1/batches")).json()["data"]) == 1


async def test_the_openapi_document_has_every_status_and_no_other(service):
    document = make_app(service).openapi()
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == {
        ("post", "/v1/files"),
        ("get", "/v1/files"),
        ("get", "/v1/files/{file_id}"),
        ("delete", "/v1/files/{file_id}"),
        ("get", "/v1/files/{file_id}/content"),
        ("post", "/v1/batches"),
        ("get", "/v1/batches"),
        ("get", "/v1/batches/{batch_id}"),
        ("post", "/v1/batches/{batch_id}/cancel"),
    }
    upload = document["paths"]["/v1/files"]["post"]
    assert set(upload["requestBody"]["content"]) == {"multipart/form-data"}
    assert {"200", "400", "409", "413", "415", "422", "503"} <= set(upload["responses"])
    content = document["paths"]["/v1/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/octet-stream"}


# -- H09: forms that are meant to hurt ----------------------------------------------------------------


def part(headers: bytes, content: bytes, boundary=b"B") -> bytes:
    return b"--" + boundary + b"\r\n" + headers + b"\r\n\r\n" + content + b"\r\n"


FILE = part(b'Content-Disposition: form-data; name="file"; filename="a"', b"hello")
PURPOSE = part(b'Content-Disposition: form-data; name="purpose"', b"user_data")
END = b"--B--\r\n"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (PURPOSE + FILE + END, 200, None),
        (FILE + PURPOSE + END, 200, None),
        (b"", 400, "invalid_form"),
        (PURPOSE + FILE, 400, "invalid_form"),  # no end
        (PURPOSE + END, 400, "missing_required_parameter"),
        (FILE + END, 400, "missing_required_parameter"),
        (FILE + FILE + PURPOSE + END, 400, "invalid_value"),
        (PURPOSE + PURPOSE + FILE + END, 400, "invalid_value"),
        (part(b"X: y", b"z" * 100) + END, 400, "invalid_form"),  # nameless
        (part(b"X: y", b"z" * 10_000_000) + END, {400, 413}, None),
        ((part(b'Content-Disposition: form-data; name="a"', b"") * 10_000) + END, {400, 413}, None),
        (part(b"X" * 5000 + b": y", b"") + END, 400, "invalid_form"),
        (part(b'Content-Disposition: form-data; name="purpose"', b"x" * 2000) + END, 400, "string_above_max_length"),
        (part(b'Content-Disposition: form-data; name="x"; filename="y"', b"z") + END, 400, "unknown_parameter"),
        (FILE.replace(b"hello", b"x" * (MAX_UPLOAD + 1)) + PURPOSE + END, 413, "file_too_large"),
        (b"x" * 200_000, 400, "invalid_form"),
        (FILE.replace(b'"a"', b'"' + b"n" * 300 + b'"') + PURPOSE + END, 400, "string_above_max_length"),
        (FILE.replace(b'"a"', b'"a\0b"') + PURPOSE + END, 400, None),
        (FILE.replace(b'"a"', b'"\xff"') + PURPOSE + END, 400, "invalid_form"),
        (FILE.replace(b'"a"', b'"../../x"') + PURPOSE + END, 200, None),
        (FILE + PURPOSE.replace(b"user_data", b"fine-tune") + END, 400, "unsupported_value"),
        (FILE + PURPOSE.replace(b"user_data", b"evil") + END, 400, "invalid_value"),
        (FILE + PURPOSE + part(b'Content-Disposition: form-data; name="extra"', b"") + END, 400, "unknown_parameter"),
    ],
)
async def test_forms(service, body, status, code):
    before = {path for path in service.root.rglob("*") if "records.db" not in path.name}
    async with raw(service) as http:
        kind = {"Content-Type": "multipart/form-data; boundary=B"}

        async def pieces():
            for i in range(0, len(body), 10_000):
                yield body[i : i + 10_000]

        for content in (body, pieces()):  # with a length and without
            response = await http.post("/v1/files", content=content, headers=kind)
            assert response.status_code in (status if isinstance(status, set) else {status}), response.text
            assert code is None or response.json()["error"]["code"] == code
        if status == 200:
            return
        left = {path for path in service.root.rglob("*") if "records.db" not in path.name}
        assert left == before


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=" + "x" * 300, 400),
        ("multipart/mixed; boundary=B", 415),
    ],
)
async def test_bodies_that_are_no_forms(service, kind, status):
    async with raw(service) as http:
        assert (await http.post("/v1/files", content=FILE, headers={"Content-Type": kind})).status_code == status


async def test_too_long_is_known_before_it_is_read(service):
    async with raw(service) as http:

        async def never():
            raise AssertionError("the body was read")
            yield b""

        headers = {"Content-Type": "multipart/form-data; boundary=B", "Content-Length": str(10**9)}
        response = await http.post("/v1/files", content=never(), headers=headers)
    assert error_of(response)[:2] == (413, "file_too_large")


async def test_a_full_disk_is_no_fault_of_the_client(service, monkeypatch):
    def full(*args):
        raise OSError(28, "full")

    async with raw(service) as http:
        form = {"data": {"purpose": "user_data"}, "files": {"file": ("a", b"hello")}}
        monkeypatch.setattr("omnilmm.files.blobs.os.fsync", full)
        assert error_of(await http.post("/v1/files", **form))[:2] == (503, "storage_full")
        monkeypatch.undo()
        assert (await http.post("/v1/files", **form)).status_code == 200


async def test_the_synchronous_client_uploads_a_file_object(service):
    async with serving(service) as address:

        def ask():
            with openai.OpenAI(base_url=f"{address}/v1", api_key=KEYS["acme"]) as client:
                file = client.files.create(file=io.BytesIO(b"hello"), purpose="user_data")
                return client.files.with_raw_response.content(file.id).content

        assert await asyncio.get_running_loop().run_in_executor(None, ask) == b"hello"
