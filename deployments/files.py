"""``/v1/files``: upload, list, look at, download and delete a tenant's files.

Handlers that touch the disk or the database are plain functions, which FastAPI runs away from the event loop; only the
receiving of an upload happens there, a piece at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote

from anyio import from_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from deployments.multipart import Form, receive_form
from deployments.once import carry_out_once
from omnilmm.api.files import (
    MAX_FILES_LISTED,
    FileObject,
    check_filename,
    file_deleted,
    file_list,
    parse_list_query,
    parse_upload_form,
)
from omnilmm.api.openapi_files import (
    create_file_operation,
    delete_file_operation,
    file_content_operation,
    list_files_operation,
    retrieve_file_operation,
)
from omnilmm.config import ImageLimits
from omnilmm.errors import PayloadTooLarge
from omnilmm.files.store import FileStore, Purpose, StoredFile, Upload
from omnilmm.image.source import check_picture, located
from omnilmm.tenancy.idempotency import IdempotencyStore
from omnilmm.tenancy.keys import Tenant

READ_BYTES = 256 * 1024
LISTING = frozenset({"after", "limit", "order", "purpose"})


class ErasePicture(Protocol):
    """Forgets, in every tier of the cache, what a tenant's picture was turned into."""

    async def __call__(self, tenant: Tenant, data: bytes) -> None:
        """`data` is the picture's file. Raises Overloaded if a tier could not be reached: the file then stays."""
        ...


class FileService(Protocol):
    """What the routes need of the router behind them. `max_upload_bytes` bounds every file, pictures by `limits`."""

    files: FileStore
    limits: ImageLimits
    max_upload_bytes: int
    idempotency: IdempotencyStore

    async def erase_picture(self, tenant: Tenant, data: bytes) -> None:
        """See ErasePicture."""
        ...


def file_object(stored: StoredFile) -> FileObject:
    """The record as OpenAI spells it."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.num_bytes,
        "created_at": stored.created_at,
        "expires_at": stored.expires_at,
        "filename": stored.filename,
        "purpose": stored.purpose.value,
        "status": "processed",
        "status_details": None,
    }


def add_routes(routes: APIRouter, service: FileService) -> None:
    """Add the routes to a router whose dependencies have put the tenant into `request.state`."""

    async def receive(request: Request) -> AsyncIterator[tuple[Upload, Form]]:
        limit = service.max_upload_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit + 128 * 1024:
            raise PayloadTooLarge(f"The file may have at most {limit} bytes.", code="file_too_large")
        with service.files.upload(request.state.tenant.name, max_bytes=limit) as upload:
            form = await receive_form(request.headers.get("content-type"), request.stream(), write=upload.write)
            yield upload, form

    receiving = Depends(receive)

    @routes.post("/v1/files", openapi_extra=create_file_operation())
    def create_file(request: Request, received: tuple[Upload, Form] = receiving) -> Response:
        upload, form = received
        asked = parse_upload_form(form.fields)
        filename = check_filename(form.filename)
        if asked.purpose == "vision":
            _check_picture(upload, service.limits)
        finish = partial(
            upload.finish, purpose=Purpose(asked.purpose), filename=filename, expires_after=asked.expires_after
        )
        parts = (asked.purpose.encode(), str(asked.expires_after).encode(), filename.encode(), upload.digest)
        return carry_out_once(service.idempotency, request, parts, lambda: dict(file_object(finish())))

    @routes.get("/v1/files", openapi_extra=list_files_operation())
    def list_files(request: Request) -> dict[str, Any]:
        query = parse_list_query(
            request.query_params.multi_items(),
            max_limit=MAX_FILES_LISTED,
            default_limit=MAX_FILES_LISTED,
            names=LISTING,
        )
        page = service.files.list(
            request.state.tenant.name,
            after=query.after,
            limit=query.limit,
            order=query.order,
            purpose=None if query.purpose is None else Purpose(query.purpose),
        )
        return dict(file_list(map(file_object, page.items), has_more=page.has_more))

    @routes.get("/v1/files/{file_id}", openapi_extra=retrieve_file_operation())
    def retrieve_file(file_id: str, request: Request) -> dict[str, Any]:
        return dict(file_object(service.files.get(request.state.tenant.name, file_id)))

    @routes.get("/v1/files/{file_id}/content", openapi_extra=file_content_operation(), response_class=StreamingResponse)
    def file_content(file_id: str, request: Request) -> Response:
        tenant = request.state.tenant.name
        stored = service.files.get(tenant, file_id)
        headers = {
            "Content-Length": str(stored.num_bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        pieces = _pieces(service.files.open(tenant, file_id))
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @routes.delete("/v1/files/{file_id}", openapi_extra=delete_file_operation())
    def delete_file(file_id: str, request: Request) -> dict[str, Any]:
        tenant: Tenant = request.state.tenant
        if service.files.get(tenant.name, file_id).purpose is Purpose.VISION:
            with service.files.open(tenant.name, file_id) as file:
                from_thread.run(service.erase_picture, tenant, file.read())
        service.files.delete(tenant.name, file_id)
        return dict(file_deleted(file_id))


def _check_picture(upload: Upload, limits: ImageLimits) -> None:
    """What is uploaded as a picture must be one, and within the limits, by its header."""
    if upload.num_bytes > limits.max_file_bytes:
        raise PayloadTooLarge(f"The picture file is over {limits.max_file_bytes} bytes.", code="image_file_too_large")
    with located("file"):
        check_picture(upload.content(), limits)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(READ_BYTES):
            yield piece
