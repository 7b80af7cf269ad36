"""From a reference in a request to the bytes of a file: one path for every route, and for batches."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Protocol

from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, InvalidRequest, NotFound
from omnilmm.image.remote import RemoteFetcher
from omnilmm.image.source import read_image_url

FILE_ID = re.compile(r"file-[A-Za-z0-9_-]{1,128}")


class FileReader(Protocol):
    """Files that tenants have uploaded."""

    async def read(self, tenant: str, file_id: str) -> bytes:
        """Raises NotFound, the same whether the file never was, is gone, or is another tenant's."""
        ...


class ImageReader:
    """Reads pictures: data: URIs always, remote URLs and uploaded files where there is something to read them."""

    def __init__(
        self, limits: ImageLimits, *, remote: RemoteFetcher | None = None, files: FileReader | None = None
    ) -> None:
        self._limits = limits
        self._remote = remote
        self._files = files

    async def read(self, url_or_file_id: str, *, param: str, tenant: str) -> bytes:
        """The file a reference leads to. An id of the form file-... is a file's, anything else a URL.

        Raises:
            ImageError: what `read_image_url` and `RemoteFetcher.fetch` raise.
            PayloadTooLarge: the file is over its cap.
            NotFound: the tenant has no such file.
        """
        if FILE_ID.fullmatch(url_or_file_id):
            return await self._read_file(url_or_file_id, param, tenant)
        scheme = url_or_file_id[:8].partition(":")[0].lower()
        if self._remote is not None and scheme in ("http", "https"):
            return await self._remote.fetch(url_or_file_id, param=param, tenant=tenant)
        return read_image_url(url_or_file_id, param=param, limits=self._limits)

    async def read_all(self, references: Iterable[tuple[str, str]], *, tenant: str) -> dict[str, bytes]:
        """The files of (reference, param) pairs by param, fetched side by side.

        Raises:
            InvalidRequest: more of them than a request may have; what `read` raises.
        """
        wanted = list(references)
        if len(wanted) > self._limits.max_images:
            raise InvalidRequest(
                f"A request holds at most {self._limits.max_images} pictures.",
                param=wanted[self._limits.max_images][1],
                code="array_above_max_length",
            )
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    param: group.create_task(self.read(reference, param=param, tenant=tenant))
                    for reference, param in wanted
                }
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return {param: task.result() for param, task in tasks.items()}

    async def aclose(self) -> None:
        if self._remote is not None:
            await self._remote.aclose()

    async def _read_file(self, file_id: str, param: str, tenant: str) -> bytes:
        if self._files is None:
            raise ImageError("This server stores no files.", param=param, code="invalid_image_url")
        try:
            return await self._files.read(tenant, file_id)
        except (InvalidRequest, NotFound) as error:
            error.param = param
            raise
