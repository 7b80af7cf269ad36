"""The routes that answer prompts: ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/responses``."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.asking import Admitted, AskService, Told, ask, caller_of, gather, heading_of
from deployments.refusing import log_failure
from omnilmm.api.endpoints import ENDPOINTS
from omnilmm.api.openapi import ANSWERING
from omnilmm.api.rendering import Rendering
from omnilmm.api.sse import MEDIA_TYPE
from omnilmm.api.strict_json import parse_json, require_json
from omnilmm.errors import InvalidRequest, OmniError, PayloadTooLarge
from omnilmm.messages import Delta, Finished, Usage
from omnilmm.tenancy.governor import Estimate
from omnilmm.tenancy.keys import Tenant

NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What x-request-id and x-session-id may be."""


class AnswerService(AskService, Protocol):
    max_body_bytes: int


def add_routes(routes: APIRouter, service: AnswerService) -> None:
    """Add the routes to a router whose dependencies have put the tenant into `request.state`."""

    def route(path: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await _Call(service, request, request.state.tenant, path).respond()

        return answer

    for path in ENDPOINTS:
        name = path.removeprefix("/v1/").replace("/", "_")
        routes.add_api_route(path, route(path), methods=["POST"], name=name, openapi_extra=ANSWERING[path]())


async def read_json_body(request: Request, max_bytes: int) -> dict[str, object]:
    """The object in the body, refused as soon as it is known to be too large.

    Raises:
        UnsupportedMediaType, PayloadTooLarge, InvalidRequest: see `omnilmm.api.strict_json`.
    """
    require_json(request.headers.get("content-type"), request.headers.get("content-encoding"))
    too_large = PayloadTooLarge(f"The request body may have at most {max_bytes} bytes.", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return parse_json(bytes(body))


@dataclass(slots=True)
class _Call:
    """One call, from its bytes to its response."""

    service: AnswerService
    request: Request
    tenant: Tenant
    path: str

    async def respond(self) -> Response:
        try:
            return await self._answer()
        except InvalidRequest:
            # What is refused for what it says counts as a request: garbage has its limit too.
            (await self.service.governor.admit(self.tenant, Estimate())).close()
            raise

    async def _answer(self) -> Response:
        headers = self.request.headers
        body = ENDPOINTS[self.path](await read_json_body(self.request, self.service.max_body_bytes))
        request_id = _name(headers.get("x-request-id"), "x-request-id") or secrets.token_hex(16)
        session = _name(headers.get("x-session-id"), "x-session-id")
        caller = caller_of(self.service, self.tenant, request_id=request_id, session=session)
        told = ask(self.service, body, self.tenant, caller, endpoint=self.path)
        try:
            admitted = await anext(told)
            assert isinstance(admitted, Admitted)
            if not body.stream:
                whole = await gather(self.service, body, caller, told)
                return JSONResponse(whole, headers=dict(admitted.headers))
            first = await anext(told)  # failures before the first word still have a status of their own
        except BaseException:
            await told.aclose()
            raise
        rendering = body.rendering(heading_of(self.service, body, caller))
        return StreamingResponse(
            self._stream(first, told, rendering),
            media_type=MEDIA_TYPE,
            headers={"Cache-Control": "no-store", **dict(admitted.headers)},
        )

    async def _stream(
        self,
        first: Admitted | Told | Usage,
        told: AsyncGenerator[Admitted | Told | Usage, None],
        rendering: Rendering,
    ) -> AsyncIterator[bytes]:
        async with aclosing(told):
            try:
                yield b"".join(rendering.begin())
                yield _spell(rendering, first)
                async for event in told:
                    yield _spell(rendering, event)
            except Exception as failure:
                error = failure if isinstance(failure, OmniError) else OmniError("unforeseen")
                log_failure(self.request, error, cause=failure)
                yield b"".join(rendering.fail(error))


def _spell(rendering: Rendering, event: Admitted | Told | Usage) -> bytes:
    match event:
        case Told(index, Delta() as delta):
            return b"".join(rendering.delta(index, delta))
        case Told(index, Finished() as end):
            return b"".join(rendering.finish(index, end.finish))
        case Usage():
            return b"".join(rendering.end(event))
    raise AssertionError("a request is admitted once")


def _name(value: str | None, header: str) -> str | None:
    if value is not None and not NAME.fullmatch(value):
        raise InvalidRequest(f"The header {header} must be 1 to 128 of A-Z a-z 0-9 . _ : -", param=header)
    return value
