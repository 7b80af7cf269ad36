"""The counters of one router, as text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics_page import Audience, MetricsPage
from omnilmm.messages import ImageSource
from omnilmm.observe import CacheAsked, ImageResolved, RequestFinished, Retried, StepRun


def samples(page: MetricsPage) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(page.render().decode())
    return {(s.name, tuple(sorted(s.labels.values()))): s.value for family in families for s in family.samples}


def test_events_become_counters():
    page = MetricsPage("r1")
    finished = RequestFinished("m", 200, 2.0, 0.5, 70, 5, 3, 1.0)
    for event in (finished, finished, RequestFinished("m", 429, 0.1, None, 0, 0, 0, 0.0)):
        page.emit(event)
    page.emit(ImageResolved("m", ImageSource.CACHE, 0.1))
    page.emit(CacheAsked("redis", "hit", 10))
    page.emit(Retried("decode"))
    page.emit(StepRun(1, 1, 0.1, 1, 2, 0))  # of a decoder: not on this page
    found = samples(page)
    assert found["omnilmm_requests_total", ("200", "m", "r1")] == 2
    assert found["omnilmm_requests_total", ("429", "m", "r1")] == 1
    assert found["omnilmm_prompt_tokens_total", ("m", "r1")] == 140
    assert found["omnilmm_output_tokens_total", ("m", "r1")] == 10
    assert found["omnilmm_cached_tokens_total", ("m", "r1")] == 6
    assert found["omnilmm_images_total", ("cache", "m", "r1")] == 1
    assert found["omnilmm_cache_lookups_total", ("hit", "r1", "redis")] == 1
    assert found["omnilmm_retries_total", ("decode", "r1")] == 1
    assert found["omnilmm_request_seconds_count", ("m", "r1")] == 3
    assert found["omnilmm_time_to_first_token_seconds_sum", ("m", "r1")] == 1.0


def test_pages_do_not_share_their_counters():
    one, other = MetricsPage("a"), MetricsPage("b")
    Audience([one]).emit(Retried("encode"))
    assert ("omnilmm_retries_total", ("a", "encode")) in samples(one)
    assert not [key for key in samples(other) if key[0] == "omnilmm_retries_total"]


def test_an_audience_tells_everybody():
    pages = [MetricsPage("a"), MetricsPage("b")]
    Audience(pages).emit(Retried("encode"))
    assert all(any(name == "omnilmm_retries_total" for name, _ in samples(page)) for page in pages)
