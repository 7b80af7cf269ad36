"""The whole product in one process: the flow over local objects. Library, quickstart, and oracle for the cluster."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from omnilmm.cache.key import KeyRing
from omnilmm.cache.store import TieredStore, open_store
from omnilmm.card import ModelCard
from omnilmm.config import CacheConfig, EncoderConfig, EngineConfig, ImageLimits, InputHandling
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.encoder.loop import EncoderLoop
from omnilmm.engine.engine import Engine
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.engine.loop import EngineLoop
from omnilmm.engine.runner import ModelRunner
from omnilmm.engine.shelf import AdapterShelf
from omnilmm.flow import ChatFlow
from omnilmm.image.pool import InlinePreparer
from omnilmm.messages import (
    ChatRequest,
    Conversation,
    Delta,
    Embedding,
    Encoded,
    Finished,
    GenerateCall,
    ImagePart,
    PreparedImage,
    TokenBatch,
)
from omnilmm.models.adapters import AdapterPool
from omnilmm.models.beam import beam_search
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.device import apart, pick_device
from omnilmm.models.merge import merge_pictures
from omnilmm.models.packed import WeightDtype, load_for_decoding
from omnilmm.models.weights import encoder_fingerprint, load_encoder
from omnilmm.observe import Observer, Silent
from omnilmm.ports import EmbeddingStore, Flight, Lease
from omnilmm.prompt.detokenize import answer_text
from omnilmm.prompt.template import load_template
from omnilmm.retries import Deadline

SEARCH_TIMEOUT_S = 300.0
ENOUGH_ON_CPU = 64
"""Tokens of prompts from which more of them in the same step are not computed any faster."""

Progress = Callable[[int, int], None]
"""Told bytes loaded so far and in all."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()


class LocalEncoder:
    """ports.Encoder over an encoder loop in this process. Puts what it makes into the store."""

    def __init__(self, loop: EncoderLoop, store: EmbeddingStore) -> None:
        self._loop = loop
        self._store = store
        self._puts: set[asyncio.Task[bool]] = set()

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        begun = time.monotonic()
        embedding = await self._loop.encode(picture, timeout_s=timeout_s)
        seconds = time.monotonic() - begun
        if not keep:
            return Encoded(embedding, stored=False, seconds=seconds)
        kept_bytes = len(embedding.data)
        if by_value:  # the caller does not trust the store: do not let it wait for one
            put = asyncio.get_running_loop().create_task(self._store.put(key, embedding, seconds=seconds))
            self._puts.add(put)
            put.add_done_callback(self._puts.discard)
            return Encoded(embedding, stored=False, seconds=seconds, kept_bytes=kept_bytes)
        stored = await self._store.put(key, embedding, seconds=seconds)
        return Encoded(None if stored else embedding, stored=stored, seconds=seconds, kept_bytes=kept_bytes)


class LocalDecoder:
    """ports.Decoder over an engine loop in this process, which fetches vectors from the store."""

    def __init__(self, loop: EngineLoop, store: EmbeddingStore) -> None:
        self._loop = loop
        self._store = store

    async def generate(self, call: GenerateCall, *, affinity: str) -> AsyncGenerator[TokenBatch, None]:
        deadline = Deadline(SystemClock(), call.timeout_s)
        fetched_bytes = 0

        async def fetch(key: str) -> Embedding | None:
            nonlocal fetched_bytes
            embedding = await self._find(key, deadline)
            fetched_bytes += 0 if embedding is None else len(embedding.data)
            return embedding

        async with aclosing(self._loop.generate(call, fetch=fetch)) as batches:
            async for batch in batches:
                if batch.prefill is not None:
                    batch = replace(batch, prefill=replace(batch.prefill, fetched_bytes=fetched_bytes))  # noqa: PLW2901
                yield batch

    async def _find(self, key: str, deadline: Deadline) -> Embedding | None:
        """The vectors from the store; if somebody is making them, wait for those. None if nobody has or makes them."""
        embedding = await self._store.get(key)
        if embedding is not None or not self._store.is_shared:
            return embedding
        answer = (await self._store.lookup([key]))[key]
        if isinstance(answer, Lease):  # nobody makes them, and a decoder cannot
            await answer.abandon()
            return None
        if isinstance(answer, Flight):
            encoded = await answer.wait(deadline.remaining())
            if encoded is None or encoded.embedding is not None:
                return encoded.embedding if encoded else None
        return await self._store.get(key)


def read_card(
    name: str,
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str,
    handling: InputHandling,
    fingerprint: str,
    max_context: int,
) -> ModelCard:
    """What the flow must know of the checkpoint in `folder`; reads its tokenizer but no weights."""
    number_bytes = 4 if dtype == "float32" else 2
    return ModelCard(
        name=name,
        family=config.family,
        fingerprint=fingerprint,
        dtype=dtype,
        handling=handling,
        policy=config.image_policy(handling) if config.vision is not None else None,
        max_context=max_context,
        vocab_size=config.language.vocab_size,
        template=load_template(config.family, folder, num_image_tokens=config.num_image_tokens),
        vector_bytes=0 if config.vision is None else config.num_image_tokens * config.language.hidden * number_bytes,
    )


def start_engine(
    model: LanguageModel,
    config: EngineConfig,
    observer: Observer,
    *,
    grammars: GrammarCompiler | None = None,
    adapters: tuple[AdapterShelf, AdapterPool] | None = None,
    owns_cores: bool = False,
) -> EngineLoop:
    """An engine loop over a loaded language model, started. The caller stops it.

    Without `grammars`, calls with a grammar are refused; without `adapters`, calls with one. With `owns_cores`, the
    engine's threads stay on a core each: for a process whose main work this is.
    """
    shelf, pool = adapters or (None, None)
    if config.enough_step_tokens is None and model.embedding.weight.device.type == "cpu":
        config = config.resolve(enough_step_tokens=ENOUGH_ON_CPU)
    engine = Engine(apart(lambda: ModelRunner(model, config, adapters=pool, owns_cores=owns_cores)), config)
    loop = EngineLoop(engine, grammars=grammars, adapters=shelf, observer=observer)
    loop.start()
    return loop


@dataclass(slots=True)
class Pipeline:
    """One model, loaded. Use as an async context manager, or call `aclose`.

    `flow.answer(request)` streams an answer.
    """

    card: ModelCard
    config: ModelConfig
    language: LanguageModel
    flow: ChatFlow
    engine: EngineLoop
    encoder: EncoderLoop | None
    store: TieredStore
    preparer: InlinePreparer

    @classmethod
    def load(
        cls,
        path_or_hub_id: str,
        *,
        name: str | None = None,
        dtype: str = "bfloat16",
        weight_dtype: WeightDtype | None = None,
        device: str = "auto",
        input_handling: InputHandling = InputHandling.SAFE,
        engine: EngineConfig | None = None,
        cache: CacheConfig | None = None,
        limits: ImageLimits | None = None,
        observer: Observer | None = None,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Load a checkpoint folder or hub id and start its loops. `weight_dtype` is that of the language model's
        matrices, if not `dtype`.

        Raises:
            CheckpointError: what is wrong with the files, by name.
            ConfigError: the device does not have the dtype asked for.
        """
        observer = observer or Silent()
        folder = resolve_checkpoint(path_or_hub_id)
        config = read_model_config(folder)
        engine = (engine or EngineConfig()).resolve(max_context=config.max_context)
        cache = cache or CacheConfig()
        secret = secrets.token_bytes(32)  # nothing here outlives the process
        store = open_store(cache, secret=secret, observer=observer, clock=SystemClock(), sole=True)
        handling = InputHandling(input_handling)
        fingerprint = encoder_fingerprint(folder, config) if config.vision is not None else ""
        card = read_card(
            name or folder.name,
            folder,
            config,
            dtype=dtype,
            handling=handling,
            fingerprint=fingerprint,
            max_context=min(config.max_context, engine.num_blocks * engine.block_size),
        )
        vision = None
        if card.policy is not None:
            place = pick_device(device)
            tower = apart(lambda: load_encoder(folder, config, dtype=dtype, device=place, progress=progress))
            vision = EncoderLoop(VisionEncoder(tower, card.policy), EncoderConfig(), observer)
            vision.start()
        language = load_for_decoding(
            folder, config, dtype=dtype, weight_dtype=weight_dtype, device=pick_device(device), progress=progress
        )
        grammars = GrammarCompiler(card.template.tokenizer, vocab_size=card.vocab_size)
        loop = start_engine(language, engine, observer, grammars=grammars)
        limits = limits or ImageLimits()
        preparer = InlinePreparer(limits)
        flow = ChatFlow(
            card,
            preparer=preparer,
            store=store,
            encoder=LocalEncoder(vision, store) if vision is not None else NoEncoder(),
            decoder=LocalDecoder(loop, store),
            keys=KeyRing(secret),
            limits=limits,
            observer=observer,
            clock=SystemClock(),
        )
        return cls(card, config, language, flow, loop, vision, store, preparer)

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta | Finished, None]:
        return self.flow.answer(request)

    async def search(self, conversation: Conversation, *, num_beams: int, max_tokens: int | None = None) -> str:
        """The answer of beam search, the originals' way when they do not sample. Nothing else runs meanwhile.

        Raises:
            InvalidRequest and its kin: as for `answer`.
        """
        defaults = self.card.template.defaults
        room = self.card.max_context - (max_tokens or 1)
        prompt = self.card.template.render(conversation, self.card.handling, max_tokens=room)
        embeddings = [await self._vectors_of(part) for part in conversation.images]
        ids, _ = beam_search(
            self.language,
            merge_pictures(self.language, prompt.ids, prompt.spans, embeddings),
            num_beams=num_beams,
            max_tokens=min(max_tokens or defaults.max_tokens, self.card.max_context - len(prompt.ids)),
            eos_ids=self.card.template.eos_ids,
            repetition_penalty=(defaults.beams or defaults).repetition_penalty,
            bos_id=self.config.bos_id,
        )
        return answer_text(self.card.template.tokenizer, ids, self.card.family)

    async def _vectors_of(self, part: ImagePart) -> Embedding:
        assert self.encoder is not None
        assert self.card.policy is not None
        prepared = await self.preparer.prepare(part.data, policy=self.card.policy, param=part.param)
        return await self.encoder.encode(prepared, timeout_s=SEARCH_TIMEOUT_S)

    async def aclose(self) -> None:
        if self.encoder is not None:
            self.encoder.stop()
        self.engine.stop()
        await self.store.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class NoEncoder:
    """The encoder of a text-only model: its template refuses pictures long before anyone asks."""

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        raise AssertionError("a text-only model was asked to encode a picture")
