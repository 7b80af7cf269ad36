"""``/metrics``: what one router has seen, in Prometheus' text format.

Ray exports the metrics of every process of the cluster on a port of its own per node (`deployments.telemetry`); that
is what a Prometheus should scrape. This page is for whoever has only the HTTP port: the counters of the router replica
that happens to answer, named by the label `replica`. It is the operator's: an open server shows it to its own machine,
a server with keys to an admin's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

from omnilmm.api.openapi import metrics_operation
from omnilmm.observe import CacheAsked, Event, ImageResolved, Observer, RequestFinished, Retried
from omnilmm.tenancy.keys import AdminKeys, KeyBook

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class MetricsPage:
    """An omnilmm Observer that keeps counters of its own. Label values come from closed sets."""

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._replica = replica
        self._requests = self._counter("omnilmm_requests", "Requests finished.", "model", "status")
        self._prompt_tokens = self._counter("omnilmm_prompt_tokens", "Prompt tokens, pictures included.", "model")
        self._cached_tokens = self._counter("omnilmm_cached_tokens", "Prompt tokens found in KV.", "model")
        self._output_tokens = self._counter("omnilmm_output_tokens", "Tokens generated.", "model")
        self._images = self._counter("omnilmm_images", "Pictures by where their vectors came from.", "model", "source")
        self._cache = self._counter("omnilmm_cache_lookups", "Keys asked for in a tier.", "tier", "outcome")
        self._retries = self._counter("omnilmm_retries", "Calls sent again after a replica was lost.", "stage")
        self._seconds = self._histogram("omnilmm_request_seconds", "Whole requests.")
        self._ttft = self._histogram("omnilmm_time_to_first_token_seconds", "From arrival to the first token.")

    def emit(self, event: Event) -> None:
        match event:
            case RequestFinished(model=model):
                self._requests.labels(self._replica, model, str(event.status)).inc()
                self._seconds.labels(self._replica, model).observe(event.seconds)
                if event.ttft_s is not None:
                    self._ttft.labels(self._replica, model).observe(event.ttft_s)
                self._prompt_tokens.labels(self._replica, model).inc(event.prompt_tokens)
                self._cached_tokens.labels(self._replica, model).inc(event.cached_tokens)
                self._output_tokens.labels(self._replica, model).inc(event.completion_tokens)
            case ImageResolved():
                self._images.labels(self._replica, event.model, event.source.value).inc()
            case CacheAsked():
                self._cache.labels(self._replica, event.tier, event.outcome).inc()
            case Retried():
                self._retries.labels(self._replica, event.stage).inc()
            case _:
                pass  # of the other pools, which have no page

    def render(self) -> bytes:
        """All counters as text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(name, description, ("replica", *labels), registry=self._registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, ("replica", "model"), buckets=_SECONDS, registry=self._registry)


class Audience:
    """One Observer that tells several."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def emit(self, event: Event) -> None:
        for observer in self._observers:
            observer.emit(event)


class MetricsService(Protocol):
    keys: KeyBook
    admins: AdminKeys
    metrics: MetricsPage


def metrics_routes(service: MetricsService) -> APIRouter:
    """The route, with its own lock: a tenant's key does not open it."""

    def operator(request: Request) -> None:
        peer = request.client.host if request.client else None
        authorization = request.headers.getlist("authorization")
        if service.keys.is_open:
            service.keys.authenticate(authorization, peer)
        else:
            service.admins.authenticate(authorization, peer, service.keys)

    routes = APIRouter(dependencies=[Depends(operator)])

    @routes.get("/metrics", openapi_extra=metrics_operation(), response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes
