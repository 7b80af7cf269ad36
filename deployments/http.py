"""The HTTP surface: OpenAI's chat completions over the flows of a router.

Every route but /health and /ready asks for a key (`tenancy.keys`), the catch-all for unknown paths included, so
nothing answers without one by default. Bodies are read and parsed here, not by FastAPI: our JSON is stricter.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from omnilmm.api.openapi import chat_completions_operation, models_operation
from omnilmm.api.requests import ChatCompletionRequest, parse_chat_request, to_chat_request
from omnilmm.api.responses import Answer, ChunkWriter, Heading, chat_completion, model_list, model_object
from omnilmm.api.sse import DONE, MEDIA_TYPE, encode_error, encode_event
from omnilmm.api.strict_json import require_json
from omnilmm.config import ImageLimits
from omnilmm.errors import InvalidRequest, NotFound, OmniError, PayloadTooLarge
from omnilmm.flow import ChatFlow
from omnilmm.image.source import read_image_url
from omnilmm.messages import Delta, Finished, Usage
from omnilmm.tenancy.keys import KeyBook, Tenant

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SESSION = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger("ray.serve")


class Service(Protocol):
    """What the surface needs of the router behind it. `started` is a Unix time in seconds."""

    keys: KeyBook
    limits: ImageLimits
    flows: dict[str, ChatFlow]
    started: int
    max_body_bytes: int
    request_timeout_s: float

    async def is_ready(self) -> bool: ...


def make_app(service: Service) -> FastAPI:
    """The application of one router replica."""
    app = FastAPI(title="OmniLMM", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(OmniError, _refuse)
    app.add_exception_handler(Exception, _fail)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        if await service.is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "starting"}, status_code=503, headers={"Retry-After": "1"})

    app.include_router(_keyed_routes(app, service))
    return app


def _keyed_routes(app: FastAPI, service: Service) -> APIRouter:
    def authenticate(request: Request) -> None:
        peer = request.client.host if request.client else None
        request.state.tenant = service.keys.authenticate(request.headers.getlist("authorization"), peer)

    routes = APIRouter(dependencies=[Depends(authenticate)])

    @routes.post("/v1/chat/completions", openapi_extra=chat_completions_operation())
    async def chat_completions(request: Request) -> Response:
        return await _Chat(service, request, request.state.tenant).respond()

    @routes.get("/v1/models", openapi_extra=models_operation())
    async def models(request: Request) -> dict[str, Any]:
        allowed = request.state.tenant.models
        mine = [name for name in service.flows if allowed is None or name in allowed]
        return dict(model_list(model_object(name, created=service.started) for name in mine))

    @routes.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    every_method = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]

    @routes.api_route("/{path:path}", methods=every_method, include_in_schema=False)
    async def unknown(path: str) -> None:
        raise NotFound("There is nothing at this path and method.")

    return routes


@dataclass(slots=True)
class _Chat:
    """One call of chat completions, from its bytes to its response."""

    service: Service
    request: Request
    tenant: Tenant
    begun: float = 0.0

    async def respond(self) -> Response:
        self.begun = time.monotonic()
        headers = self.request.headers
        require_json(headers.get("content-type"), headers.get("content-encoding"))
        parsed = parse_chat_request(await _read_body(self.request, self.service.max_body_bytes))
        self.tenant.check_model(parsed.model, self.service.flows)
        limits = self.service.limits
        request_id = _token(headers.get("x-request-id"), REQUEST_ID, "x-request-id") or secrets.token_hex(16)
        chat = to_chat_request(
            parsed,
            request_id=request_id,
            read_image=lambda url, param: read_image_url(url, param=param, limits=limits),
            limits=limits,
            tenant=self.tenant.name,
            scope=self.tenant.scope,
            timeout_s=self.service.request_timeout_s,
        )
        session = _token(headers.get("x-session-id"), SESSION, "x-session-id")
        flow = self.service.flows[parsed.model]
        answer = flow.answer(replace(chat, session=session, weight=self.tenant.weight))
        heading = Heading(request_id, parsed.model, int(time.time()), f"fp_{flow.card.fingerprint[:12]}")
        if parsed.stream:
            first = await anext(answer)  # failures before the first token still have a status of their own
            events = self._stream(first, answer, ChunkWriter(heading, parsed.include_usage), parsed)
            return StreamingResponse(events, media_type=MEDIA_TYPE, headers={"Cache-Control": "no-store"})
        return JSONResponse(await self._whole(answer, heading, parsed))

    async def _whole(
        self, answer: AsyncGenerator[Delta | Finished, None], heading: Heading, parsed: ChatCompletionRequest
    ) -> dict[str, Any]:
        deltas: list[Delta] = []
        async with aclosing(answer):
            async for event in answer:
                if isinstance(event, Delta):
                    deltas.append(event)
                    continue
                self._log(parsed, event.usage)
                whole = Answer.collect(deltas, event.finish, logprobs=bool(parsed.logprobs))
                return dict(chat_completion(heading, [whole], event.usage))
        raise AssertionError("an answer ends with Finished")

    async def _stream(
        self,
        first: Delta | Finished,
        answer: AsyncGenerator[Delta | Finished, None],
        writer: ChunkWriter,
        parsed: ChatCompletionRequest,
    ) -> AsyncIterator[bytes]:
        async with aclosing(answer):
            yield encode_event(writer.first())
            event: Delta | Finished | None = first
            try:
                while event is not None:
                    if isinstance(event, Delta):
                        yield encode_event(writer.delta(event))
                    else:
                        self._log(parsed, event.usage)
                        yield encode_event(writer.last(event.finish))
                        if parsed.include_usage:
                            yield encode_event(writer.usage(event.usage))
                    event = await anext(answer, None)
            except OmniError as error:
                _log_failure(self.request, error)
                yield encode_error(error)
                return
            except Exception as error:
                logger.exception("a stream failed")
                yield encode_error(OmniError(str(error)))
                return
            yield DONE

    def _log(self, parsed: ChatCompletionRequest, usage: Usage) -> None:
        fields = {
            "tenant": self.tenant.name,
            "model": parsed.model,
            "stream": bool(parsed.stream),
            "seconds": round(time.monotonic() - self.begun, 4),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "images": [image.source.value for image in usage.images],
        }
        logger.info("answered", extra={"ray_serve_extra_fields": fields})


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    too_large = PayloadTooLarge(f"The request body may have at most {max_bytes} bytes.", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _token(value: str | None, form: re.Pattern[str], name: str) -> str | None:
    if value is not None and not form.fullmatch(value):
        raise InvalidRequest(f"The header {name} must be 1 to 128 of A-Z a-z 0-9 . _ : -", param=name)
    return value


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, OmniError)
    _log_failure(request, error)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _fail(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(OmniError("unforeseen").body(), status_code=500)


def _log_failure(request: Request, error: OmniError) -> None:
    fields = {"route": request.url.path[:128], "status": error.status, "code": error.code, "param": error.param}
    level = logging.ERROR if error.status == 500 else logging.INFO
    logger.log(level, "refused" if error.status < 500 else "failed", extra={"ray_serve_extra_fields": fields})
