"""Errors as responses and as lines of the log: OpenAI's error object, whatever went wrong and wherever."""

from __future__ import annotations

import logging
from collections.abc import Collection

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from deployments.repeating import MARK, mark_of
from omnilmm.errors import InvalidRequest, NotFound, OmniError, QueueFull
from omnilmm.tenancy.standing import LimitReached

logger = logging.getLogger("ray.serve")


class MethodNotAllowed(NotFound):
    """There is something at this path, for other methods: the header Allow names them."""

    status = 405
    default_code = "method_not_allowed"

    def __init__(self, allowed: Collection[str]) -> None:
        super().__init__(f"This path is for {' and '.join(sorted(allowed))}.")
        self.headers = (("Allow", ", ".join(sorted(allowed))),)


def add_handlers(app: FastAPI) -> None:
    """Whatever a route raises becomes an error object."""
    app.add_exception_handler(OmniError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    app.add_exception_handler(HTTPException, _refuse_by_framework)
    app.add_exception_handler(Exception, _fail)


def log_failure(request: Request, error: OmniError, *, cause: BaseException | None = None) -> None:
    """One line, with the traceback of a `cause` we did not foresee. No text of the request is in it."""
    fields = {"route": request.url.path[:128], "status": error.status, "code": error.code, "param": error.param}
    level = logging.ERROR if error.status == 500 else logging.INFO
    unforeseen = None if cause is None or isinstance(cause, OmniError) else cause
    message = "refused" if error.status < 500 else "failed"
    logger.log(level, message, extra={"ray_serve_extra_fields": fields}, exc_info=unforeseen)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, OmniError)
    log_failure(request, error)
    headers = dict(error.headers) if isinstance(error, (LimitReached, MethodNotAllowed)) else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if isinstance(error, QueueFull) and error.lasts_s > 0:
        headers[MARK] = mark_of(error)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _refuse_parameters(request: Request, error: Exception) -> Response:
    return await _refuse(request, InvalidRequest("A parameter of the path or the query is malformed."))


async def _refuse_by_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code >= 500:
        return await _fail(request, error)
    ours = InvalidRequest("The request is malformed.", code="invalid_request")
    ours.status = error.status_code
    return await _refuse(request, ours)


async def _fail(request: Request, error: Exception) -> Response:
    unforeseen = OmniError("unforeseen")
    log_failure(request, unforeseen, cause=error)
    return JSONResponse(unforeseen.body(), status_code=500)
