"""The vision pool's replica: a shell around the encoder loop."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

from deployments.settings import Cache, Model
from deployments.stores import open_encoder_store
from deployments.telemetry import ServeObserver
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.encoder.loop import EncoderLoop
from omnilmm.errors import ConfigError, ReplicaLost
from omnilmm.messages import Encoded, PixelIdentity, PreparedImage
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.models.device import apart, pick_device, use_threads
from omnilmm.models.weights import load_encoder
from omnilmm.pipeline import LocalEncoder


class Vision:
    """Encodes pictures for every router. Knows nothing of language."""

    async def __init__(self, model: Model, cache: Cache) -> None:  # type: ignore[misc]  # Serve awaits it
        folder = resolve_checkpoint(model.path)
        config = read_model_config(folder)
        policy = config.image_policy(model.input_handling)
        if policy is None:
            raise ConfigError(f"model {model.name!r} has no vision tower")
        use_threads(model.vision.torch_threads)
        device = pick_device(model.device)
        tower = apart(lambda: load_encoder(folder, config, dtype=model.dtype, device=device))
        core = VisionEncoder(tower, policy, model.vision.encoder_config())
        blank = bytes(3 * policy.side * policy.side)
        picture = PreparedImage(PixelIdentity(b"", policy.side, policy.side), policy.side, blank)
        apart(partial(core.encode, [picture]))  # rehearse
        observer = ServeObserver()
        self._store = await open_encoder_store(cache, observer, core.encode, policy.side)
        self._loop = EncoderLoop(core, model.vision.encoder_config(), observer)
        self._loop.start()
        self._encoder = LocalEncoder(self._loop, self._store)

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        return await self._encoder.encode(picture, key=key, by_value=by_value, timeout_s=timeout_s, keep=keep)

    async def stats(self) -> dict[str, object]:
        return {"pid": os.getpid(), **dataclasses.asdict(self._loop.stats())}

    def check_health(self) -> None:
        if not self._loop.is_healthy:
            raise ReplicaLost("The vision loop has stopped.")

    async def __del__(self) -> None:
        self._loop.stop()
        await self._store.aclose()
