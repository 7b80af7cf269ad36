"""``/admin/v1``: tenants, keys and usage for whoever runs the server, and ``/v1/usage``: a tenant's own.

The admin's routes have a lock of their own: a tenant's key does not open them, an admin's key opens nothing else. They
are not in the OpenAPI document, which is for tenants; docs/tenants.md has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.admin_lock import Locked, admin_lock
from deployments.answering import read_json_body
from deployments.database import blocking
from omnilmm.errors import InvalidRequest
from omnilmm.tenancy.directory import DAY_S, Directory, NewKey
from omnilmm.tenancy.profile import TenantProfile, check_name
from omnilmm.tenancy.usage import DayUsage, Ledger, to_csv

MAX_BODY_BYTES: Final = 64 * 1024
MAX_RECEIPTS: Final = 1000
_DEFAULT_DAYS: Final = 30
_NO_STORE: Final[Mapping[str, str]] = {"Cache-Control": "no-store"}


class UsageService(Protocol):
    """What a tenant's look at its own usage needs of the router."""

    usage_ledger: Ledger


class AdminService(UsageService, Locked, Protocol):
    """What the admin's routes need of the router."""

    directory: Directory


def admin_routes(service: AdminService) -> APIRouter:
    """Routes with their own lock; include the router before the catch-all."""
    routes = APIRouter(dependencies=[admin_lock(service)], include_in_schema=False)
    _add_tenants(routes, service)
    _add_keys(routes, service)
    _add_usage(routes, service)
    return routes


def _add_tenants(routes: APIRouter, service: AdminService) -> None:
    directory = service.directory

    @routes.get("/admin/v1/tenants")
    async def list_tenants() -> dict[str, Any]:
        found = await blocking(directory.tenants)
        return {"object": "list", "data": [_tenant(profile, is_live) for profile, is_live in found]}

    @routes.post("/admin/v1/tenants", status_code=201)
    async def add_tenant(request: Request) -> dict[str, Any]:
        document = await read_json_body(request, MAX_BODY_BYTES)
        name = check_name(document.pop("name", None), "name")
        return _tenant(await blocking(directory.add, name, document), is_live=True)

    @routes.get("/admin/v1/tenants/{name}")
    async def show_tenant(name: str) -> dict[str, Any]:
        profile, is_live = await blocking(directory.tenant, name)
        keys = await blocking(directory.keys, name)
        return {**_tenant(profile, is_live), "keys": [key.document() for key in keys]}

    @routes.patch("/admin/v1/tenants/{name}")
    async def change_tenant(name: str, request: Request) -> dict[str, Any]:
        document = await read_json_body(request, MAX_BODY_BYTES)
        return _tenant(await blocking(directory.change, name, document), is_live=True)

    @routes.delete("/admin/v1/tenants/{name}")
    async def revoke_tenant(name: str) -> dict[str, Any]:
        await blocking(directory.revoke, name)
        return {"object": "tenant", "name": name, "status": "revoked"}


def _add_keys(routes: APIRouter, service: AdminService) -> None:
    directory = service.directory

    @routes.post("/admin/v1/tenants/{name}/keys")
    async def add_key(name: str, request: Request) -> Response:
        asked = _only(await read_json_body(request, MAX_BODY_BYTES), "models", "lasts_s")
        models, lasts_s = asked.get("models"), asked.get("lasts_s")
        return _new_key(await blocking(directory.add_key, name, models=models, lasts_s=lasts_s))

    @routes.post("/admin/v1/tenants/{name}/keys/{key_id}/rotate")
    async def rotate_key(name: str, key_id: str, request: Request) -> Response:
        asked = _only(await read_json_body(request, MAX_BODY_BYTES), "grace_s")
        return _new_key(await blocking(directory.rotate_key, name, key_id, grace_s=asked.get("grace_s", DAY_S)))

    @routes.delete("/admin/v1/tenants/{name}/keys/{key_id}")
    async def revoke_key(name: str, key_id: str) -> dict[str, Any]:
        await blocking(directory.revoke_key, name, key_id)
        return {"object": "tenant.key", "id": key_id, "status": "revoked"}


def _add_usage(routes: APIRouter, service: AdminService) -> None:
    ledger = service.usage_ledger

    @routes.get("/admin/v1/usage")
    async def usage(request: Request) -> Response:
        query = _query(request, "start", "end", "format", "tenant")
        first, last = _days(query)
        return _usage(query, await blocking(ledger.days, first, last, tenant=query.get("tenant")))

    @routes.get("/admin/v1/receipts")
    async def receipts(request: Request) -> dict[str, Any]:
        query = _query(request, "start", "end", "tenant", "after")
        first, last = _days(query)
        found = await blocking(
            ledger.receipts,
            first,
            last,
            tenant=query.get("tenant"),
            after=query.get("after", ""),
            limit=MAX_RECEIPTS + 1,
        )
        data = [receipt.document() for receipt in found[:MAX_RECEIPTS]]
        return {"object": "list", "data": data, "has_more": len(found) > MAX_RECEIPTS}


def add_usage_routes(routes: APIRouter, service: UsageService) -> None:
    """Add ``/v1/usage`` to a router whose dependencies have put the tenant into `request.state`."""

    @routes.get("/v1/usage", openapi_extra=_usage_operation())
    async def own_usage(request: Request) -> Response:
        query = _query(request, "start", "end", "format")
        first, last = _days(query)
        days = await blocking(service.usage_ledger.days, first, last, tenant=request.state.tenant.name)
        return _usage(query, days)


# -- requests -----------------------------------------------------------------------------------------


def _only(document: Mapping[str, object], *names: str) -> Mapping[str, object]:
    for name in document:
        if name not in names:
            raise InvalidRequest("A member of the body is unknown.", param=name[:64], code="unknown_parameter")
    return document


def _query(request: Request, *names: str) -> dict[str, str]:
    """The query's parameters, each given at most once."""
    query: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise InvalidRequest("A parameter of the query is unknown.", param=name[:64], code="unknown_parameter")
        if name in query or "\0" in value:
            raise InvalidRequest(f"'{name}' must be given once, as plain text.", param=name)
        query[name] = value
    return query


def _days(query: Mapping[str, str]) -> tuple[date, date]:
    """`start` and `end`, both included: by default the last thirty days, in UTC."""
    last = _day(query, "end") or datetime.now(UTC).date()
    first = _day(query, "start")
    return (last - timedelta(days=min(_DEFAULT_DAYS - 1, last.toordinal() - 1)) if first is None else first), last


def _day(query: Mapping[str, str], name: str) -> date | None:
    value = query.get(name)
    try:
        return None if value is None else datetime.strptime(value, "%Y-%m-%d").date()
    except ValueError:
        raise InvalidRequest(f"'{name}' must be a day: YYYY-MM-DD.", param=name) from None


# -- responses ----------------------------------------------------------------------------------------


def _tenant(profile: TenantProfile, is_live: bool) -> dict[str, Any]:
    return {"object": "tenant", **profile.document(), "status": "live" if is_live else "revoked"}


def _new_key(new: NewKey) -> Response:
    document = {"object": "tenant.key", **new.info.document(), "key": new.secret}
    return JSONResponse(document, status_code=201, headers=_NO_STORE)


def _usage(query: Mapping[str, str], days: list[DayUsage]) -> Response:
    formats: Mapping[str, Callable[[], Response]] = {
        "json": lambda: JSONResponse({"object": "list", "data": [day.document() for day in days]}),
        "csv": lambda: Response(to_csv(days), media_type="text/csv", headers={"X-Content-Type-Options": "nosniff"}),
    }
    made = formats.get(query.get("format", "json"))
    if made is None:
        raise InvalidRequest("'format' must be json or csv.", param="format")
    return made()


def _usage_operation() -> dict[str, Any]:
    def parameter(name: str, schema: dict[str, Any], told: str) -> dict[str, Any]:
        return {"name": name, "in": "query", "required": False, "schema": schema, "description": told}

    day = {"type": "string", "format": "date"}
    error = {
        "application/json": {
            "schema": {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
        }
    }
    refusals = {400: "A parameter is wrong", 401: "No key", 500: "A fault of the server", 503: "Try again later"}
    return {
        "summary": "What the tenant used, by day and model",
        "parameters": [
            parameter("start", day, "First day, UTC; by default 29 days before `end`"),
            parameter("end", day, "Last day, UTC; by default today"),
            parameter("format", {"type": "string", "enum": ["json", "csv"]}, "By default json"),
        ],
        "responses": {
            "200": {
                "description": "One line a day, model and adapter",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/csv": {"schema": {"type": "string"}},
                },
            },
            **{str(status): {"description": told, "content": error} for status, told in refusals.items()},
        },
    }
