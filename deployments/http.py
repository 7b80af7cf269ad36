"""The HTTP surface of a router: who may come in, what is where, and what happens to everything else.

Every route but /health and /ready asks for a key (`tenancy.keys`), the catch-all for unknown paths included, so
nothing answers without one by default. Routes are written in modules of their own, each with
``add_routes(routes, service)``; here they are put behind the same lock. Bodies are read and parsed by us, not by
FastAPI: our JSON is stricter.
"""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from deployments import admin, answering, batches, files, lookups
from deployments.adapter_uploads import AdapterService, adapter_routes
from deployments.metrics_page import MetricsService, metrics_routes
from deployments.patience import Patience
from deployments.refusing import MethodNotAllowed, add_handlers
from omnilmm.api.openapi import complete, health_operation
from omnilmm.errors import NotFound
from omnilmm.tenancy.keys import KeyBook


class Service(
    answering.AnswerService,
    lookups.LookupService,
    files.FileService,
    batches.BatchService,
    MetricsService,
    admin.AdminService,
    AdapterService,
    Protocol,
):
    """What the surface needs of the router behind it: what each module of routes needs, and this."""

    keys: KeyBook

    async def is_ready(self) -> bool: ...


def make_app(service: Service, *, is_patient: bool = False) -> FastAPI:
    """The application of one router replica. `is_patient`: see `deployments.patience`."""
    app = FastAPI(title="OmniLMM", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_handlers(app)
    if is_patient:
        app.add_middleware(Patience)
    locked = (
        metrics_routes(service),
        admin.admin_routes(service),
        adapter_routes(service),
        _tenant_routes(app, service),
    )
    groups = (_open_routes(service), *locked)
    for group in groups:
        app.include_router(group)
    known = [route for group in groups for route in group.routes]
    app.router.routes.append(Route("/{path:path}", _Rest(service, known)))
    return app


def _open_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health", openapi_extra=health_operation(200))
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready", openapi_extra=health_operation(200, 503))
    async def ready() -> Response:
        if await service.is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "starting"}, status_code=503, headers={"Retry-After": "1"})

    return routes


def _authenticate(request: Request, service: Service) -> None:
    peer = request.client.host if request.client else None
    request.state.tenant = service.keys.authenticate(request.headers.getlist("authorization"), peer)


def _tenant_routes(app: FastAPI, service: Service) -> APIRouter:
    """Everything a tenant can ask for, each with `request.state.tenant`: one line for each module of routes."""

    def authenticate(request: Request) -> None:
        _authenticate(request, service)

    routes = APIRouter(dependencies=[Depends(authenticate)])
    answering.add_routes(routes, service)
    lookups.add_routes(routes, service)
    files.add_routes(routes, service)
    batches.add_routes(routes, service)
    admin.add_usage_routes(routes, service)

    @routes.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return complete(app.openapi())

    return routes


class _Rest:
    """Whatever there is not, by any method. As an application of its own it is asked for every method there is."""

    def __init__(self, service: Service, known: list[BaseRoute]) -> None:
        self._service = service
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _authenticate(Request(scope, receive, send), self._service)
        partial = [route for route in self._known if route.matches(scope)[0] is Match.PARTIAL]
        allowed = {method for route in partial if isinstance(route, Route) for method in route.methods or ()}
        if allowed:
            raise MethodNotAllowed(allowed)
        raise NotFound("There is nothing at this path.")
