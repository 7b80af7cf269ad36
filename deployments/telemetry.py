"""Events of omnilmm.observe as Ray Serve metrics. Serve adds application, deployment and replica to each series.

Label values come from closed sets: model names of the configuration, HTTP statuses, tiers, sources. Tenants and
request ids never become labels; they are in the logs.
"""

from __future__ import annotations

import logging
from typing import assert_never

from ray.serve.metrics import Counter, Gauge, Histogram

from omnilmm.observe import (
    BatchEncoded,
    CacheAsked,
    Event,
    ImageResolved,
    PrefillDone,
    RequestFinished,
    Retried,
    StepRun,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

logger = logging.getLogger("ray.serve")


class ServeObserver:
    """An omnilmm Observer that feeds ray.serve.metrics. Safe to call from any thread; never raises."""

    def __init__(self) -> None:
        self.requests = _counter("omnilmm_requests", "Requests finished.", "model", "status")
        self.request_seconds = Histogram(
            "omnilmm_request_seconds", "Whole requests.", boundaries=list(_SECONDS), tag_keys=("model",)
        )
        self.ttft = Histogram(
            "omnilmm_time_to_first_token_seconds",
            "From arrival to the first token.",
            boundaries=list(_SECONDS),
            tag_keys=("model",),
        )
        self.token_seconds = Histogram(
            "omnilmm_time_per_output_token_seconds",
            "Mean gap between the tokens of a request.",
            boundaries=list(_TOKEN_SECONDS),
            tag_keys=("model",),
        )
        self.prompt_tokens = _counter("omnilmm_prompt_tokens", "Prompt tokens, pictures included.", "model")
        self.cached_tokens = _counter("omnilmm_cached_tokens", "Prompt tokens found in KV.", "model")
        self.output_tokens = _counter("omnilmm_output_tokens", "Tokens generated.", "model")
        self.images = _counter("omnilmm_images", "Pictures by where their vectors came from.", "model", "source")
        self.image_seconds = Histogram(
            "omnilmm_image_seconds",
            "Time to have a picture's vectors.",
            boundaries=list(_SECONDS),
            tag_keys=("source",),
        )
        self.encodes = _counter("omnilmm_encodes", "Pictures run through the vision tower.")
        self.encode_seconds = Histogram("omnilmm_encode_batch_seconds", "Vision batches.", boundaries=list(_SECONDS))
        self.encode_batch = Histogram(
            "omnilmm_encode_batch_size", "Pictures in a vision batch.", boundaries=list(_SIZES)
        )
        self.queue_seconds = Histogram(
            "omnilmm_queue_seconds", "Waiting before work began.", boundaries=list(_SECONDS), tag_keys=("pool",)
        )
        self.cache = _counter("omnilmm_cache_lookups", "Keys asked for in a tier.", "tier", "outcome")
        self.cache_bytes = _counter("omnilmm_cache_bytes", "Bytes moved from or to a tier.", "tier")
        self.step_seconds = Histogram("omnilmm_step_seconds", "Engine steps.", boundaries=list(_TOKEN_SECONDS))
        self.step_sequences = Histogram("omnilmm_step_sequences", "Sequences in a step.", boundaries=list(_SIZES))
        self.kv_used = Gauge("omnilmm_kv_blocks_used", "KV blocks held by running sequences.")
        self.kv_total = Gauge("omnilmm_kv_blocks", "KV blocks in all.")
        self.waiting = Gauge("omnilmm_sequences_waiting", "Sequences not yet running.")
        self.retries = _counter("omnilmm_retries", "Calls sent again after a replica was lost.", "stage")

    def emit(self, event: Event) -> None:
        try:
            self._note(event)
        except Exception:
            logger.exception("a metric could not be noted")

    def _note(self, event: Event) -> None:
        match event:
            case RequestFinished():
                model = {"model": event.model}
                self.requests.inc(tags=model | {"status": str(event.status)})
                self.request_seconds.observe(event.seconds, tags=model)
                if event.ttft_s is not None:
                    self.ttft.observe(event.ttft_s, tags=model)
                if event.completion_tokens > 1:
                    self.token_seconds.observe(event.tokens_seconds / (event.completion_tokens - 1), tags=model)
                _add(self.prompt_tokens, event.prompt_tokens, model)
                _add(self.cached_tokens, event.cached_tokens, model)
                _add(self.output_tokens, event.completion_tokens, model)
            case ImageResolved():
                self.images.inc(tags={"model": event.model, "source": event.source.value})
                self.image_seconds.observe(event.seconds, tags={"source": event.source.value})
            case BatchEncoded():
                self.encodes.inc(event.size)
                self.encode_seconds.observe(event.seconds)
                self.encode_batch.observe(event.size)
                self.queue_seconds.observe(event.queue_s, tags={"pool": "vision"})
            case StepRun():
                self.step_seconds.observe(event.seconds)
                self.step_sequences.observe(event.num_sequences)
                self.kv_used.set(event.blocks_used)
                self.kv_total.set(event.blocks_total)
                self.waiting.set(event.num_waiting)
            case PrefillDone():
                self.queue_seconds.observe(event.queue_s, tags={"pool": "decode"})
            case CacheAsked():
                self.cache.inc(tags={"tier": event.tier, "outcome": event.outcome})
                _add(self.cache_bytes, event.num_bytes, {"tier": event.tier})
            case Retried():
                self.retries.inc(tags={"stage": event.stage})
            case _:
                assert_never(event)


def _counter(name: str, description: str, *tag_keys: str) -> Counter:
    return Counter(name, description, tag_keys=tag_keys)  # type: ignore[arg-type]  # Ray's hint says exactly one


def _add(counter: Counter, amount: int, tags: dict[str, str]) -> None:
    if amount > 0:  # Ray refuses to add nothing
        counter.inc(amount, tags=tags)
