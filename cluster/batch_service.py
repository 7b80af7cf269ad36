"""What answers the rows of a run without a server: a pipeline behind the same checks as over HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omnilmm.batch.offline import Done
from omnilmm.config import EngineConfig, ImageLimits, InputHandling
from omnilmm.errors import ConfigError

if TYPE_CHECKING:
    from omnilmm.image.reader import FileReader, ImageReader
    from omnilmm.pipeline import Pipeline

TENANT = "offline"


@dataclass(frozen=True, slots=True)
class Load:
    """How the model is loaded, what requests call it, and from where pictures may be fetched."""

    path: str
    name: str
    dtype: str
    device: str
    handling: InputHandling
    engine: EngineConfig
    hosts: tuple[str, ...] = ()


@dataclass(slots=True)
class Tally:
    """What a run has done so far."""

    begun: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pictures: int = 0
    encoded: int = 0
    failed: int = 0

    def add(self, done: Done) -> None:
        if done.body is None:
            self.failed += 1
            return
        usage = done.body["usage"]
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", 0)
        images = usage.get("images", [])
        self.pictures += len(images)
        self.encoded += sum(image["source"] == "encoded" for image in images)

    def summary(self) -> str:
        seconds = max(time.monotonic() - self.begun, 1e-9)
        return (
            f"{self.completion_tokens / seconds:.0f} tokens/s, "
            f"{self.pictures - self.encoded} of {self.pictures} pictures were there already, {self.failed} failures"
        )


class LocalService:
    """Flows as what `deployments.asking` asks: the same checks and answers as over HTTP, in this process."""

    def __init__(self, flows: dict[str, Any], images: Any) -> None:
        from deployments.asking import Ledger, LoggedReceipts
        from omnilmm.observe import Silent
        from omnilmm.pipeline import SystemClock
        from omnilmm.tenancy.governor import Governor
        from omnilmm.tenancy.keys import KeyBook, Tenant
        from omnilmm.tenancy.lines import Lines
        from omnilmm.tenancy.places import Places

        self.flows, self.images = flows, images
        self.governor, self.keys = Governor(SystemClock()), KeyBook()
        self.places, self.lines = Places(1), Lines(Silent())  # lines of a batch take none
        self.ledger: Ledger = LoggedReceipts()
        self.request_timeout_s = 24 * 3600.0
        self._tenant = Tenant(TENANT, TENANT)

    @classmethod
    def over(cls, pipeline: Pipeline, name: str, *, hosts: Sequence[str] = ()) -> LocalService:
        return cls({name: pipeline.flow}, open_reader(hosts))

    async def ask(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Mapping[str, Any]:
        """What the endpoint would answer to this body. Raises OmniError."""
        from deployments.asking import answer_document

        return await answer_document(self, endpoint, body, tenant=self._tenant, request_id=request_id)

    async def aclose(self) -> None:
        await self.images.aclose()


def open_reader(hosts: Sequence[str] = (), files: FileReader | None = None) -> ImageReader:
    """What reads the pictures of requests: data: URIs, files where there are some, URLs of these hosts alone."""
    from omnilmm.image.address import AllowList
    from omnilmm.image.reader import ImageReader
    from omnilmm.image.remote import RemoteFetcher, RemotePolicy

    try:
        remote = RemoteFetcher(RemotePolicy(AllowList(tuple(hosts)))) if hosts else None
    except ValueError:
        raise ConfigError("--allow-host takes a host's name, or *.name for all below it") from None
    return ImageReader(ImageLimits(), remote=remote, files=files)
