"""Adapters as models of their own: ``base:adapter`` is the base's flow with every call to the decoder naming one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

from deployments.settings import Adapters
from omnilmm.engine.shelf import AdapterShelf
from omnilmm.errors import ConfigError, NotFound
from omnilmm.flow import ChatFlow
from omnilmm.messages import GenerateCall, TokenBatch
from omnilmm.models.adapter_files import AdapterCatalog, read_adapter
from omnilmm.models.adapters import AdapterPool
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.pipeline import SystemClock
from omnilmm.ports import Decoder
from omnilmm.tenancy.tenant import Tenant


class AdapterDecoder:
    """ports.Decoder that has one adapter answer, for its owners only."""

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
        stream = self._decoder.generate(replace(call, adapter=self._adapter), affinity=affinity)
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


def catalog_of(settings: Adapters) -> AdapterCatalog:
    folder = None if settings.folder is None else Path(settings.folder)
    return AdapterCatalog(folder, {name: Path(path) for name, path in settings.paths.items()})


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
