"""The admin's routes: who gets in, what they do, and what they refuse."""

from __future__ import annotations

import asyncio
import csv
import io
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from route_walk import every_route

from deployments.admin import MAX_RECEIPTS, add_usage_routes, admin_routes
from deployments.refusing import add_handlers
from omnilmm.database import Database
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.keys import AdminKeys, KeyBook, new_key
from omnilmm.tenancy.usage import Ledger, Receipt

ADMIN, ADMIN_DIGEST = new_key()
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
SPAN = {"start": "2026-11-01", "end": "2026-11-30"}


@pytest.fixture
def service(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/omnilmm.db")
    yield SimpleNamespace(
        keys=KeyBook(is_managed=True),
        admins=AdminKeys([ADMIN_DIGEST]),
        directory=Directory(database),
        usage_ledger=Ledger(database),
    )
    database.close()


@pytest.fixture
def app(service):
    """The admin's routes and a tenant's usage, as the router puts them together."""

    def authenticate(request: Request) -> None:
        request.state.tenant = service.keys.authenticate(request.headers.getlist("authorization"), "127.0.0.1")

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_handlers(app)
    app.include_router(admin_routes(service))
    tenants = APIRouter(dependencies=[Depends(authenticate)])
    add_usage_routes(tenants, service)
    app.include_router(tenants)
    return app


@pytest.fixture
async def http(app):
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def admin(http):
    http.headers["Authorization"] = f"Bearer {ADMIN}"
    return http


@pytest.fixture
async def key(admin, service):
    """A tenant's key, known to the server."""
    await admin.post("/admin/v1/tenants", json={"name": "acme"})
    made = (await admin.post("/admin/v1/tenants/acme/keys", json={})).json()["key"]
    service.keys.learn(service.directory.roster())
    return made


def write(service, *tenants, **changes):
    about = {"key_id": "k", "model": "m", "status": 200, "request_id": "r", "at": NOON, "prompt_tokens": 7, **changes}
    service.usage_ledger.write([Receipt(tenant=tenant, **about) for tenant in tenants])


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["param"]


async def test_no_route_answers_without_a_key_or_to_a_tenant_s(app, http, key):
    routes = {*every_route(app)}
    assert ("POST", "/admin/v1/tenants/x/keys/x/rotate") in routes
    assert ("GET", "/v1/usage") in routes
    before = (await http.get("/admin/v1/tenants/acme")).content
    for method, path in routes:
        for header, status in ((None, 401), ("Bearer wrong", 401), (f"Bearer {ADMIN_DIGEST}", 401), (key, 403)):
            if (path, status) == ("/v1/usage", 403):
                continue
            headers = {"Authorization": f"Bearer {header}" if header == key else header or ""}
            body = {"json": {"name": "new"}} if method in ("POST", "PATCH") else {}
            response = await http.request(method, path, headers=headers, **body)
            assert response.status_code == status, (method, path)
            assert error_of(response)[1] == ("invalid_api_key" if status == 401 else "admin_key_required")
            assert ("www-authenticate" in response.headers) == (status == 401)
    assert (await http.get("/admin/v1/tenants/acme")).content == before
    assert (await http.get("/v1/usage")).status_code == 401  # an admin's key opens nothing else


async def test_an_admin_from_elsewhere_is_refused(app):
    transport = httpx.ASGITransport(app, client=("203.0.113.9", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/admin/v1/tenants", headers={"Authorization": f"Bearer {ADMIN}"})
    assert error_of(response)[:2] == (403, "admin_address_refused")


async def test_the_life_of_a_tenant(admin, service):
    made = await admin.post("/admin/v1/tenants", json={"name": "acme", "models": ["a", "b"], "tokens_per_min": 100})
    assert made.status_code == 201
    wanted = {
        "object": "tenant",
        "name": "acme",
        "share": None,
        "weight": 1.0,
        "priority": "online",
        "models": ["a", "b"],
        "requests_per_min": None,
        "tokens_per_min": 100,
        "image_pixels_per_min": None,
        "concurrent_requests": None,
        "cache_bytes": None,
        "status": "live",
    }
    assert made.json() == wanted
    changed = await admin.patch("/admin/v1/tenants/acme", json={"tokens_per_min": None, "weight": 2})
    wanted |= {"tokens_per_min": None, "weight": 2.0}
    assert changed.json() == wanted
    assert (await admin.get("/admin/v1/tenants")).json() == {"object": "list", "data": [wanted]}
    assert (await admin.get("/admin/v1/tenants/acme")).json() == {**wanted, "keys": []}
    assert (await admin.delete("/admin/v1/tenants/acme")).json()["status"] == "revoked"
    assert (await admin.get("/admin/v1/tenants/acme")).json()["status"] == "revoked"
    assert error_of(await admin.delete("/admin/v1/tenants/acme")) == (404, "tenant_not_found", None)


async def test_the_life_of_a_key(admin, service):
    await admin.post("/admin/v1/tenants", json={"name": "acme"})
    made = await admin.post("/admin/v1/tenants/acme/keys", json={"models": ["a"], "lasts_s": 1000})
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    first = made.json()
    rotated = await admin.post(f"/admin/v1/tenants/acme/keys/{first['id']}/rotate", json={"grace_s": 0})
    second = rotated.json()
    assert second["models"] == ["a"]
    service.keys.learn(service.directory.roster())
    assert service.keys.authenticate([f"Bearer {second['key']}"], None).models == {"a"}
    shown = await admin.get("/admin/v1/tenants/acme")
    assert {key["id"] for key in shown.json()["keys"]} == {first["id"], second["id"]}
    assert first["key"] not in shown.text
    assert second["key"] not in shown.text
    gone = f"/admin/v1/tenants/acme/keys/{second['id']}"
    assert (await admin.delete(gone)).json()["status"] == "revoked"
    assert error_of(await admin.delete(gone)) == (404, "key_not_found", None)


@pytest.mark.parametrize(
    ("method", "path", "body", "wanted"),
    [
        ("POST", "tenants", {}, (400, "invalid_value", "name")),
        ("POST", "tenants", {"name": "*"}, (400, "invalid_value", "name")),
        ("POST", "tenants", {"name": "acme"}, (400, "already_exists", "name")),
        ("POST", "tenants", {"name": "b", "scope": "acme"}, (400, "unknown_parameter", "scope")),
        ("POST", "tenants", {"name": "b", "weight": -1}, (400, "invalid_value", "weight")),
        ("PATCH", "tenants/acme", {"name": "b"}, (400, "unknown_parameter", "name")),
        ("PATCH", "tenants/nobody", {}, (404, "tenant_not_found", None)),
        ("POST", "tenants/nobody/keys", {}, (404, "tenant_not_found", None)),
        ("POST", "tenants/acme/keys", {"tenant": "b"}, (400, "unknown_parameter", "tenant")),
        ("POST", "tenants/acme/keys", {"models": ["*"]}, (400, "invalid_value", "models")),
        ("POST", "tenants/acme/keys", {"lasts_s": 0}, (400, "invalid_value", "lasts_s")),
        ("POST", "tenants/acme/keys/0/rotate", {}, (404, "key_not_found", None)),
        ("GET", "tenants/%2e%2e", None, (404, "tenant_not_found", None)),
        ("GET", "usage?start=yesterday", None, (400, "invalid_value", "start")),
        ("GET", "usage?start=2026-02-30", None, (400, "invalid_value", "start")),
        ("GET", "usage?start=2026-02-03&end=2026-02-02", None, (400, "invalid_value", "end")),
        ("GET", "usage?format=xml", None, (400, "invalid_value", "format")),
        ("GET", "usage?tenants=a", None, (400, "unknown_parameter", "tenants")),
        ("GET", "usage?tenant=a&tenant=b", None, (400, "invalid_value", "tenant")),
        ("GET", "receipts?after=%00", None, (400, "invalid_value", "after")),
        ("GET", "usage?end=0001-01-01", None, None),
    ],
)
async def test_what_is_wrong_is_named(admin, key, method, path, body, wanted):
    response = await admin.request(method, f"/admin/v1/{path}", json=body)
    if wanted is None:
        assert response.status_code == 200
    else:
        assert error_of(response) == wanted


async def test_bodies_are_json_of_a_sane_size(admin):
    plain = await admin.post("/admin/v1/tenants", content=b"name=a")
    assert plain.status_code == 415
    huge = await admin.post("/admin/v1/tenants", json={"name": "a" * 70_000})
    assert huge.status_code == 413


async def test_usage_as_json_and_csv(admin, service, key):
    write(service, "acme", "acme", "other")
    told = (await admin.get("/admin/v1/usage", params=SPAN)).json()["data"]
    assert [(day["tenant"], day["requests"], day["prompt_tokens"]) for day in told] == [
        ("acme", 2, 14),
        ("other", 1, 7),
    ]
    one = (await admin.get("/admin/v1/usage", params=SPAN | {"tenant": "other"})).json()["data"]
    assert one == told[1:]
    sheet = await admin.get("/admin/v1/usage", params=SPAN | {"format": "csv"})
    assert sheet.headers["content-type"].startswith("text/csv")
    assert [row["tenant"] for row in csv.DictReader(io.StringIO(sheet.text))] == ["acme", "other"]


async def test_a_tenant_sees_its_own_usage_only(http, service, key):
    write(service, "acme", "other")
    mine = {"Authorization": f"Bearer {key}"}
    told = (await http.get("/v1/usage", params=SPAN, headers=mine)).json()["data"]
    assert [day["tenant"] for day in told] == ["acme"]
    assert "other" not in (await http.get("/v1/usage", params=SPAN | {"format": "csv"}, headers=mine)).text
    refused = await http.get("/v1/usage", params=SPAN | {"tenant": "other"}, headers=mine)
    assert error_of(refused) == (400, "unknown_parameter", "tenant")


async def test_usage_is_of_the_last_thirty_days_if_not_said(admin, service, key):
    now = datetime.now(UTC).timestamp()
    write(service, "acme", at=now)
    write(service, "acme", at=now - 31 * 86_400)
    assert len((await admin.get("/admin/v1/usage")).json()["data"]) == 1


async def test_receipts_come_in_pages(admin, service):
    await asyncio.to_thread(write, service, *["acme"] * (MAX_RECEIPTS + 1))
    page = (await admin.get("/admin/v1/receipts", params=SPAN)).json()
    assert (len(page["data"]), page["has_more"]) == (MAX_RECEIPTS, True)
    rest = (await admin.get("/admin/v1/receipts", params=SPAN | {"after": page["data"][-1]["id"]})).json()
    assert (len(rest["data"]), rest["has_more"]) == (1, False)
    assert rest["data"][0]["prompt_tokens"] == 7
