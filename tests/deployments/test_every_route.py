"""The lock is on every door: all routes of the application are walked, those that are added later too."""

from __future__ import annotations

from unittest.mock import MagicMock

import httpx
import pytest
from fastapi import FastAPI
from route_walk import every_route

from deployments.http import make_app
from omnilmm.tenancy.keys import AdminKeys, KeyBook, KeyRecord, Tenant, new_key

KEY, DIGEST = new_key()
ADMIN, ADMIN_DIGEST = new_key()
OPEN = {("GET", "/health"), ("GET", "/ready")}
ODD = [
    ("GET", "//v1/models"),
    ("POST", "/V1/chat/completions"),
    ("POST", "/v1/chat/completions/"),
    ("GET", "/v1/../admin/v1/tenants"),
    ("GET", "/%2e%2e/admin/v1/tenants"),
    ("GET", "/admin/v1/tenants/"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("TRACE", "/v1/models"),
    ("OPTIONS", "/v1/chat/completions"),
    ("PROPFIND", "/v1/models"),
]
FORGED = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1", "X-Real-IP": "127.0.0.1"}


@pytest.fixture
def app() -> FastAPI:
    """Behind the locks there is nothing real: who gets past one gets something other than a refusal."""
    service = MagicMock()
    service.keys = KeyBook([KeyRecord(DIGEST, Tenant("acme", "acme"))], is_managed=True)
    service.admins = AdminKeys([ADMIN_DIGEST])
    return make_app(service)


def reach(app: FastAPI, peer: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(peer, 5000))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


def locked(app: FastAPI) -> list[tuple[str, str]]:
    return sorted({*every_route(app), *ODD} - OPEN - {("HEAD", path) for _, path in OPEN})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        FORGED,
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {DIGEST}"},
        {"Cookie": f"api_key={KEY}"},
        {"Host": "127.0.0.1/admin?x#", "x-api-key": KEY},
    ],
)
async def test_no_route_but_two_answers_without_a_key(app, headers):
    routes = locked(app)
    assert ("POST", "/v1/chat/completions") in routes
    async with reach(app, **headers) as client:
        for method, path in routes:
            response = await client.request(method, f"{path}?api_key={KEY}", json={})
            unknown_method = method not in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
            assert response.status_code in ((401, 405) if unknown_method else (401,)), (method, path)
            assert (response.status_code == 405) or response.headers["www-authenticate"] == "Bearer"


async def test_the_admin_s_doors_are_not_the_tenants(app):
    """Whatever lies under /admin or /metrics refuses a tenant's key, and all else refuses an admin's."""
    theirs, ours = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {ADMIN}"}
    async with reach(app) as client:
        for method, path in sorted({*every_route(app)} - OPEN):
            if path.startswith(("/admin", "/metrics")):
                assert (await client.request(method, path, headers=theirs)).status_code in (403, 404), (method, path)
            elif (method, path) not in {("HEAD", path) for _, path in OPEN}:
                assert (await client.request(method, path, headers=ours)).status_code == 401, (method, path)


async def test_an_admin_comes_from_this_machine_only(app):
    async with reach(app, "203.0.113.9", **FORGED, Authorization=f"Bearer {ADMIN}") as client:
        for method, path in every_route(app):
            if path.startswith(("/admin", "/metrics")):
                assert (await client.request(method, path)).status_code == 403, (method, path)
