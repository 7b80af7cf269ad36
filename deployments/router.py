"""The ingress deployment: owns one flow per served model and answers HTTP through `deployments.http`."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments.handles import ServeDecoder, ServeEncoder, our_errors
from deployments.http import make_app
from deployments.settings import AppSettings, Model
from deployments.stores import open_keys, open_store
from deployments.telemetry import ServeObserver
from omnilmm.errors import OmniError
from omnilmm.flow import ChatFlow, RetryBudget
from omnilmm.image.pool import DecodePool
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.pipeline import NoEncoder, SystemClock, read_card

PING_TIMEOUT_S = 2.0
PING_EVERY_S = 1.0
ROUTER_MEMORY_BYTES = 64 * 1024**2
"""What a router keeps of pictures: mostly what a repeated file shows, and vectors while Redis is away."""

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
        self.limits = settings.limits.config()
        self.started = int(time.time())
        self._pools = pools
        self._observer = ServeObserver()
        self._store = await open_store(settings.cache, self._observer, memory_bytes=ROUTER_MEMORY_BYTES)
        self._cache_keys = await open_keys(settings.cache)
        self._preparer = DecodePool(self.limits, num_workers=settings.router.decode_workers)
        await self._preparer.start()
        self._retries = RetryBudget()
        self._pinged = float("-inf")
        self.flows = {model.name: self._flow(model, fingerprints[model.name]) for model in settings.models}

    def _flow(self, model: Model, fingerprint: str) -> ChatFlow:
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
        pools = self._pools[model.name]
        return ChatFlow(
            card,
            preparer=self._preparer,
            store=self._store,
            encoder=ServeEncoder(pools["vision"]) if "vision" in pools else NoEncoder(),
            decoder=ServeDecoder(pools["decoder"]),
            keys=self._cache_keys,
            limits=self.limits,
            observer=self._observer,
            clock=SystemClock(),
            retries=self._retries,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self)

    async def is_ready(self) -> bool:
        """Whether every model's decoder pool answers. A vision pool may be asleep: it wakes when it is needed."""
        if time.monotonic() - self._pinged < PING_EVERY_S:
            return True
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                with our_errors("decoder"):
                    await asyncio.gather(*(self._ping(pools["decoder"]) for pools in self._pools.values()))
        except (TimeoutError, OmniError):
            return False
        self._pinged = time.monotonic()
        return True

    async def stats(self) -> dict[str, object]:
        return {"pid": os.getpid(), "retry_balance": self._retries.balance}

    async def _ping(self, decoder: DeploymentHandle) -> Any:
        return await decoder.ping.remote()

    async def __del__(self) -> None:
        await self._preparer.close()
        await self._store.aclose()
