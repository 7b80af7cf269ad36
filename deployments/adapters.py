"""Adapters as models of their own: ``base:adapter`` is the base's flow with every call to the decoder naming one."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from deployments.adapter_folder import AdapterFolder, Record, read_record
from deployments.affinity import with_adapter
from deployments.database import blocking
from deployments.settings import Adapters, Model
from omnilmm.engine.shelf import AdapterShelf
from omnilmm.errors import ConfigError, NotFound
from omnilmm.flow import ChatFlow
from omnilmm.messages import GenerateCall, TokenBatch
from omnilmm.models.adapter_files import AdapterCatalog, check_adapter, max_weights_bytes, read_adapter
from omnilmm.models.adapters import AdapterPool
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.weights import torch_dtype
from omnilmm.pipeline import SystemClock
from omnilmm.ports import Decoder
from omnilmm.tenancy.tenant import Tenant

logger = logging.getLogger("ray.serve")


class AdapterDecoder:
    """ports.Decoder that has one adapter answer, for its owners only. `adapter` is what decoders call it."""

    def __init__(self, decoder: Decoder, adapter: str, owners: frozenset[str] | None) -> None:
        self._decoder = decoder
        self._adapter = adapter
        self._owners = owners

    def may_be_used_by(self, tenant: str) -> bool:
        return self._owners is None or tenant in self._owners

    async def generate(self, call: GenerateCall, *, affinity: str) -> AsyncGenerator[TokenBatch, None]:
        """As the decoder's own.

        Raises:
            NotFound: the call is not one of an owner.
        """
        if not self.may_be_used_by(call.tenant):
            raise NotFound(
                "The model does not exist or you do not have access to it.", param="model", code="model_not_found"
            )
        named = replace(call, adapter=self._adapter)
        stream = self._decoder.generate(named, affinity=with_adapter(self._adapter, affinity))
        async with aclosing(stream):
            async for batch in stream:
                yield batch


def served_to(tenant: Tenant, flows: Mapping[str, ChatFlow]) -> list[str]:
    """Names of the models that are there for a tenant, as far as adapters have owners."""
    return [
        name
        for name, flow in flows.items()
        if not isinstance(decoder := getattr(flow, "decoder", None), AdapterDecoder)
        or decoder.may_be_used_by(tenant.name)
    ]


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter in a model's folder, or at one of its paths. `owners` None is everybody; `record` None means that it
    was not uploaded."""

    owners: frozenset[str] | None
    record: Record | None

    def called(self, name: str) -> str:
        """What decoders call it. An uploaded one by what is in it too: another of its name is another adapter."""
        return name if self.record is None else f"{name}@{self.record.digest[:16]}"


def look(settings: Adapters) -> dict[str, Found]:
    """All adapters that are there now, by name. The configuration's word on owners is the last. Blocks; OSError."""
    catalog = catalog_of(settings)
    found = {}
    for name in catalog.names():
        folder = catalog.find(name)
        record = None if folder is None or name in settings.paths else read_record(folder)
        owners = settings.tenants.get(name, None if record is None else record.tenants)
        found[name] = Found(None if owners is None else frozenset(owners), record)
    return found


class AdapterHost:
    """The adapters of one served model, a flow each, as its folder has them.

    Args:
        settings: where they lie.
        open_folder: opens the folder for uploads; called when it is first needed.
        make_flow: a flow for ``model:adapter`` from an adapter's name and what decoders call it, with its owners.
    """

    def __init__(
        self,
        settings: Adapters,
        *,
        open_folder: Callable[[], AdapterFolder],
        make_flow: Callable[[str, str, frozenset[str] | None], ChatFlow],
    ) -> None:
        self.settings = settings
        self.open_folder = open_folder
        self.found = look(settings)
        self._make_flow = make_flow
        self._flows = {name: self._flow(name, found) for name, found in self.found.items()}

    @property
    def flows(self) -> dict[str, ChatFlow]:
        """By the names that clients use."""
        return {flow.card.name: flow for flow in self._flows.values()}

    async def refresh(self) -> bool:
        """Look again. Returns whether anything changed; where nothing can be seen just now, nothing does."""
        try:
            found = await blocking(look, self.settings)
        except OSError:
            logger.warning("the folder of adapters cannot be read", exc_info=True)
            return False
        if found == self.found:
            return False
        kept = {name: flow for name, flow in self._flows.items() if found.get(name) == self.found[name]}
        self._flows = {name: kept.get(name) or self._flow(name, each) for name, each in found.items()}
        self.found = found
        return True

    def _flow(self, name: str, found: Found) -> ChatFlow:
        return self._make_flow(name, found.called(name), found.owners)


def catalog_of(settings: Adapters) -> AdapterCatalog:
    folder = None if settings.folder is None else Path(settings.folder)
    return AdapterCatalog(folder, {name: Path(path) for name, path in settings.paths.items()})


def open_adapter_folder(model: Model, config: ModelConfig) -> AdapterFolder:
    """Where the adapters of a model are uploaded to.

    Raises:
        ConfigError: its settings name no folder, or one that is not there.
    """
    settings = model.adapters
    if settings is None or settings.folder is None:
        raise ConfigError("the model has no folder of adapters", param="adapters.folder")
    check = partial(check_adapter, config=config, max_rank=settings.max_rank, dtype=torch_dtype(model.dtype))
    return AdapterFolder(Path(settings.folder), check, max_bytes=max_weights_bytes(config, settings.max_rank))


def open_shelf(settings: Adapters, model: LanguageModel, config: ModelConfig) -> tuple[AdapterShelf, AdapterPool]:
    """The adapters of a decoder replica, none of them loaded. The pool's memory is taken here.

    Raises:
        ConfigError: a folder that the settings name is not there.
    """
    catalog = catalog_of(settings)
    if catalog.folder is not None and not catalog.folder.is_dir():
        raise ConfigError("adapters.folder is not a folder on this node", param="adapters.folder")
    pool = AdapterPool(model, config, num_ranks=settings.max_loaded * settings.max_rank)
    read = partial(read_adapter, config=config, max_rank=settings.max_rank, dtype=pool.dtype)
    return AdapterShelf(catalog, read, pool, max_loaded=settings.max_loaded, clock=SystemClock()), pool
