"""The decoder pool's replica: a shell around the engine loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncGenerator
from functools import partial

from deployments.adapters import open_shelf
from deployments.settings import Cache, Model
from deployments.stores import open_store
from deployments.telemetry import ServeObserver
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.errors import ReplicaLost
from omnilmm.messages import GenerateCall, Prompt, Sampling, TokenBatch
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.models.device import apart, pick_device, use_threads
from omnilmm.models.packed import load_for_decoding
from omnilmm.pipeline import LocalDecoder, start_engine
from omnilmm.prompt.tokens import load_tokenizer


class Decoder:
    """Generates tokens for every router. Sees no pixel, and of text only what a grammar needs: how tokens are spelt."""

    async def __init__(self, model: Model, cache: Cache) -> None:  # type: ignore[misc]  # Serve awaits it
        folder = resolve_checkpoint(model.path)
        config = read_model_config(folder)
        use_threads(model.decoder.torch_threads)
        observer = ServeObserver()
        language = load_for_decoding(
            folder,
            config,
            dtype=model.dtype,
            weight_dtype=model.decoder.weight_dtype,
            device=pick_device(model.device),
        )
        room = model.decoder.engine_config(model.context(config.max_context))
        grammars = GrammarCompiler(load_tokenizer(folder), vocab_size=config.language.vocab_size)
        self._drain_s = model.decoder.drain_s
        adapters = None if model.adapters is None else apart(partial(open_shelf, model.adapters, language, config))
        self._loop = start_engine(language, room, observer, grammars=grammars, adapters=adapters, owns_cores=True)
        self._store = await open_store(cache, observer)
        self._decoder = LocalDecoder(self._loop, self._store)
        await self._rehearse(config.bos_id)

    async def _rehearse(self, bos_id: int) -> None:
        """Ready means rehearsed: one short answer before the first real one."""
        call = GenerateCall("rehearsal", Prompt((bos_id,), (), ()), (), Sampling(max_tokens=2))
        async for _ in self._decoder.generate(call, affinity=""):
            pass

    async def generate(self, call: GenerateCall) -> AsyncGenerator[TokenBatch, None]:
        async for batch in self._decoder.generate(call, affinity=""):
            yield batch

    async def stats(self) -> dict[str, object]:
        return {"pid": os.getpid(), **dataclasses.asdict(self._loop.stats())}

    async def ping(self) -> None:
        """Answers when the replica can serve; the router asks it before it says ready."""
        self.check_health()

    def check_health(self) -> None:
        if not self._loop.is_healthy:
            raise ReplicaLost("The engine loop has stopped.")

    async def __del__(self) -> None:
        await self._loop.drain(self._drain_s)
        self._loop.stop()
        await self._store.aclose()
