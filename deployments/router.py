"""The ingress deployment: owns one flow per served model and answers HTTP through `deployments.http`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments.adapters import AdapterDecoder, AdapterHost, open_adapter_folder
from deployments.asking import Ledger
from deployments.departures import Departures
from deployments.handles import ServeDecoder, ServeEncoder, our_errors
from deployments.hosting import Hosted, find_hosted
from deployments.http import make_app
from deployments.limits import ClusterGovernor
from deployments.metrics_page import Audience, MetricsPage
from deployments.records import Records
from deployments.settings import AppSettings, Model
from deployments.storage import Storage
from deployments.stores import locate, open_keys, open_store
from deployments.telemetry import ServeObserver
from omnilmm.card import ModelCard
from omnilmm.errors import OmniError
from omnilmm.flow import ChatFlow
from omnilmm.image.pool import DecodePool
from omnilmm.image.reader import ImageReader
from omnilmm.image.remote import RemoteFetcher
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.pipeline import NoEncoder, SystemClock, read_card
from omnilmm.ports import Decoder as DecoderPort
from omnilmm.retries import RetryBudget
from omnilmm.tenancy.governor import Governor
from omnilmm.tenancy.lines import Lines
from omnilmm.tenancy.places import Places
from omnilmm.tenancy.tenant import Tenant

PING_TIMEOUT_S = 2.0
LAST_BYTES_S = 0.5
"""An answer's place is given back a moment before its last bytes have reached the client."""
PING_EVERY_S = 1.0
ANSWERING_SHARE = 0.75
"""How much of what Serve lets into a router at a time may be answers. The rest is for what is quickly done, refusals
first of all: those that Serve itself gives are plain text."""
LOOK_EVERY_S = 2.0
"""How often a router looks for models of other applications."""
ROUTER_MEMORY_BYTES = 64 * 1024**2
"""What a router keeps of pictures: mostly what a repeated file shows, and vectors while Redis is away."""

logger = logging.getLogger("ray.serve")

Pools = dict[str, dict[str, DeploymentHandle]]


class Router:
    """Validates, recognises pictures, has them encoded and answered, and turns tokens into text.

    Args:
        settings: the whole application's.
        fingerprints: digest of the encoder's weights, by model name.
        pools: handles "vision" (absent for a text-only model) and "decoder", by model name.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: AppSettings, fingerprints: dict[str, str], pools: Pools
    ) -> None:
        self.max_body_bytes = settings.router.max_body_bytes
        self.request_timeout_s = settings.router.request_timeout_s
        self.keys = settings.key_book()
        self.admins = settings.admin.book()
        self.limits = settings.limits.config()
        remote = settings.remote_images.policy(self.limits)
        self._records = await Records.open(settings.database_url, self.keys)
        self.ledger: Ledger = self._records.recorder
        self.usage_ledger, self.directory = self._records.ledger, self._records.directory
        self.idempotency = self._records.idempotency
        self._storage = await Storage.open(
            self._records.database, settings.files_folder, max_tenant_bytes=settings.files.max_tenant_bytes
        )
        self.files, self.desk, self.batch_endpoints = self._storage.files, self._storage.desk, self._storage.endpoints
        self.max_upload_bytes = settings.files.max_upload_bytes
        self.images = ImageReader(
            self.limits, remote=RemoteFetcher(remote) if remote is not None else None, files=self.files
        )
        self.governor: Governor = await _govern(settings)
        self.places = Places(max(1, int(ANSWERING_SHARE * settings.router.max_ongoing_requests)))
        self.started = int(time.time())
        self.metrics = MetricsPage(replica=uuid.uuid4().hex[:12])
        self._observer = Audience([ServeObserver(), self.metrics])
        self.lines = Lines(self._observer)
        self._num_routers = max(1, settings.router.autoscaling.min_replicas)
        self._sizes: dict[str, int] = {}  # of the lines in front of decoders, by model
        memory_bytes = min(ROUTER_MEMORY_BYTES, settings.cache.memory_bytes)  # 0 there means: nothing is remembered
        self._store = await open_store(settings.cache, self._observer, memory_bytes=memory_bytes)
        self._cache_keys = await open_keys(settings.cache)
        self._preparer = DecodePool(self.limits, num_workers=settings.router.decode_workers)
        await self._preparer.start()
        self._retries = RetryBudget()
        self._pinged = float("-inf")
        self.adapters: dict[str, AdapterHost] = {}
        self._own = {
            model.name: self._base_flow(model, fingerprints[model.name], pools[model.name]) for model in settings.models
        }
        self._own_decoders = [handles["decoder"] for handles in pools.values()]
        self._hosted: dict[str, Hosted] = {}
        self.flows: dict[str, ChatFlow] = {}
        self._serve(self._own)
        self._storage.start(self, self.keys, self.erase_picture)
        self._departures = Departures(self.keys, self.directory, self.desk, self.erase_picture)
        self._departures.start()
        self._adopting = asyncio.get_running_loop().create_task(self._adopt(), name="models of other applications")

    async def _adopt(self) -> None:
        """Take up models of other applications when they serve, and let go of them when they end."""
        while True:
            try:
                self._offer(await find_hosted(self._hosted))
                await self.refresh_adapters()
            except Exception:  # Serve's controller restarts, say: what is served stays served
                logger.warning("could not look for models of other applications", exc_info=True)
            await asyncio.sleep(LOOK_EVERY_S)

    def _offer(self, hosted: dict[str, Hosted]) -> None:
        """Serve exactly our own models and `hosted`. Answers under way keep the flow they began with."""
        if hosted == self._hosted:
            return
        bases = dict(self._own)
        for app, other in hosted.items():
            name = other.model.name
            if name in bases:
                logger.error("the application %s serves a model %s, which is served already", app, name)
            elif other == self._hosted.get(app) and name in self.flows:
                bases[name] = self.flows[name]
            else:
                bases[name] = self._base_flow(other.model, other.fingerprint, other.pools())
        self._hosted = hosted
        self._serve(bases)

    def _serve(self, bases: Mapping[str, ChatFlow]) -> None:
        """Serve these models and their adapters, and nothing else."""
        self.lines.resize({name: self._sizes[name] for name in bases})
        self.adapters = {name: host for name, host in self.adapters.items() if name in bases}
        flows = dict(bases)
        for host in self.adapters.values():
            flows |= host.flows
        self.flows = flows

    async def refresh_adapters(self) -> None:
        """Serve the adapters that are in the models' folders now."""
        changed = [await host.refresh() for host in (*self.adapters.values(),)]
        if any(changed):
            self._serve({name: flow for name, flow in self.flows.items() if ":" not in name})

    def _base_flow(self, model: Model, fingerprint: str, pools: Mapping[str, DeploymentHandle]) -> ChatFlow:
        """The model's own flow. If it has adapters, `adapters` has theirs afterwards."""
        folder = resolve_checkpoint(model.path)
        config = read_model_config(folder)
        card = read_card(
            model.name,
            folder,
            config,
            dtype=model.dtype,
            handling=model.input_handling,
            fingerprint=fingerprint,
            max_context=model.context(config.max_context),
        )
        decoder = ServeDecoder(pools["decoder"])
        self._sizes[model.name] = model.decoder.num_held(self._num_routers)

        def adapted(name: str, called: str, owners: frozenset[str] | None) -> ChatFlow:
            owned = AdapterDecoder(decoder, called, owners)
            return self._flow(replace(card, name=f"{model.name}:{name}"), owned, pools)

        self.adapters.pop(model.name, None)
        if model.adapters is not None:
            open_folder = partial(open_adapter_folder, model, config)
            self.adapters[model.name] = AdapterHost(model.adapters, open_folder=open_folder, make_flow=adapted)
        return self._flow(card, decoder, pools)

    def _flow(self, card: ModelCard, decoder: DecoderPort, pools: Mapping[str, DeploymentHandle]) -> ChatFlow:
        return ChatFlow(
            card,
            preparer=self._preparer,
            store=self._store,
            encoder=ServeEncoder(pools["vision"]) if "vision" in pools else NoEncoder(),
            decoder=decoder,
            keys=self._cache_keys,
            limits=self.limits,
            observer=self._observer,
            clock=SystemClock(),
            retries=self._retries,
        )

    async def erase_picture(self, tenant: Tenant, data: bytes) -> None:
        """Forget what every model made of a tenant's picture, in every tier.

        Raises:
            Overloaded: a tier could not be reached.
        """
        for flow in self.flows.values():
            await flow.forget(data, scope=tenant.scope)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self, is_patient=True)

    async def is_ready(self) -> bool:
        """Whether the decoder pool of every model of our own application answers.

        A vision pool may be asleep: it wakes when it is needed. Models of other applications come and go.
        """
        if self.places.is_closing:
            return False
        if time.monotonic() - self._pinged < PING_EVERY_S:
            return True
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                with our_errors("decoder"):
                    await asyncio.gather(*map(self._ping, self._own_decoders))
        except (TimeoutError, OmniError):
            return False
        self._pinged = time.monotonic()
        return True

    async def drain(self, timeout_s: float) -> bool:
        """Begin no more answers, and wait for those under way: whether all of them came to their end."""
        is_done = await self.places.drain(timeout_s)
        await asyncio.sleep(LAST_BYTES_S)
        return is_done

    async def stats(self) -> dict[str, object]:
        return {"pid": os.getpid(), "retry_balance": self._retries.balance}

    async def _ping(self, decoder: DeploymentHandle) -> Any:
        return await decoder.ping.remote()

    async def __del__(self) -> None:
        self._adopting.cancel()
        await self._departures.aclose()
        await self._storage.aclose()
        await self.images.aclose()
        await self._preparer.close()
        await self._store.aclose()
        await self.governor.aclose()
        await self._records.aclose()


async def _govern(settings: AppSettings) -> ClusterGovernor:
    """The tenants' limits, shared by all routers through the cache's Redis."""
    cache = settings.cache
    url, _ = await locate(cache)
    governor = ClusterGovernor(
        url,
        clock=SystemClock(),
        timeout_s=cache.timeout_s,
        num_routers=settings.router.autoscaling.max_replicas,
        cache_ttl_s=cache.ttl_s,
        password_file=None if cache.redis_password_file is None else Path(cache.redis_password_file),
    )
    governor.start()
    return governor
