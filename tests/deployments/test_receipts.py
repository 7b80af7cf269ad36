"""Receipts are exact: whatever becomes of a request, what it took is told once, and equal to the counters."""

from __future__ import annotations

import asyncio
import base64
import io
from collections import Counter
from contextlib import aclosing
from dataclasses import replace

import pytest
from http_fakes import ANSWER, Decoder, client_of, error_of, make_card, make_flow, make_service
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from deployments.asking import answer_document, ask, caller_of
from deployments.metrics_page import MetricsPage
from omnilmm.api.endpoints import ENDPOINTS
from omnilmm.database import Database
from omnilmm.errors import OmniError, Overloaded, ReplicaLost
from omnilmm.messages import ImageSource, Priority
from omnilmm.tenancy.tenant import Tenant, TenantLimits
from omnilmm.tenancy.usage import Ledger

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
ACME = Tenant("acme", "acme", key_id="")
PATH = "/v1/chat/completions"


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(*colours, model="m"):
    parts = [{"type": "image_url", "image_url": {"url": picture(colour)}} for colour in colours]
    content = [*parts, {"type": "text", "text": "What?"}]
    return {"model": model, "messages": [{"role": "user", "content": content}]}


@pytest.fixture(scope="module")
def card(data):
    return replace(make_card(data, "m"), max_context=900)


class House:
    """A model, and an adapter of it, behind one decoder and one page of counters."""

    def __init__(self, card):
        self.page = MetricsPage("r")
        self.decoder = Decoder()
        cards = (card, replace(card, name="m:a"))
        self.flows = {each.name: make_flow(each, self.decoder, self.page) for each in cards}
        self.service = make_service(self.flows, metrics=self.page)
        self.receipts = self.service.ledger.receipts

    @property
    def next_call(self):
        return len(self.decoder.calls)

    def asking(self, document, tenant=ACME, **options):
        body = ENDPOINTS[PATH](document)
        return ask(
            self.service, body, tenant, caller_of(self.service, tenant, request_id="r"), endpoint=PATH, **options
        )

    async def finish(self, document, **options):
        async with aclosing(self.asking(document, **options)) as told:
            return [event async for event in told]

    async def fail(self, document):
        with pytest.raises(OmniError) as caught:
            await self.finish(document)
        return caught.value.status

    async def leave(self, document, num_events):
        """Take so many events, the admission among them, and go; further answers never get beyond their first token."""
        for i in range(4):
            self.decoder.gates[self.next_call + i] = asyncio.Event()
        async with aclosing(self.asking(document)) as told:
            for _ in range(num_events):
                await anext(told)
        self.decoder.gates.clear()

    async def leave_waiting(self, document, entered):
        """Go while waiting for something."""
        task = asyncio.create_task(self.finish(document))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def counters(self):
        found = Counter()
        for family in text_string_to_metric_families(self.page.render().decode()):
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    labels = sample.labels
                    key = (sample.name.removeprefix("omnilmm_").removesuffix("_total"), labels.get("model", ""))
                    found[(*key, labels.get("source", ""))] += round(sample.value)
        return found


def sums(receipts):
    """The receipts under the names of the counters."""
    found = Counter()
    for receipt in receipts:
        model = f"{receipt.model}:{receipt.adapter}" if receipt.adapter else receipt.model
        found["prompt_tokens", model, ""] += receipt.prompt_tokens
        found["cached_tokens", model, ""] += receipt.cached_tokens
        found["output_tokens", model, ""] += receipt.completion_tokens
        for source in ImageSource:
            found["images", model, source.value] += getattr(receipt, f"images_{source.value}")
    return found


def agreeing(counters, receipts):
    names = {"prompt_tokens", "cached_tokens", "output_tokens", "images"}
    return +Counter({key: value for key, value in counters.items() if key[0] in names}), +sums(receipts)


async def test_mixed_traffic_adds_up_to_the_last_token(card, tmp_path):
    house = House(card)
    decoder, other = house.decoder, CHAT | {"model": "m:a"}
    await house.finish(CHAT)
    await house.finish(shown("red", "blue", "red"))
    await house.finish(shown("red") | {"n": 3})
    await house.finish({**shown("green"), "model": "m:a", "n": 2})
    decoder.failures[house.next_call] = (3, ReplicaLost("gone"))  # resumed
    await house.finish(other)
    decoder.failures |= {house.next_call + i: (2 + i, ReplicaLost("gone")) for i in range(3)}
    assert await house.fail(CHAT) == 503  # resumed, and lost for good with four tokens out
    decoder.failures[house.next_call] = (0, Overloaded("full"))
    assert await house.fail(shown("white")) == 503  # its picture was encoded, and nothing else
    decoder.failures[house.next_call] = (2, ValueError("unforeseen"))
    with pytest.raises(ValueError, match="unforeseen"):
        await house.finish(CHAT)
    assert await house.fail(CHAT | {"max_tokens": 10_000}) == 400  # refused by the flow
    await house.leave(CHAT, 1)
    await house.leave(CHAT, 2)
    await house.leave(shown("black"), 2)
    await house.leave(CHAT | {"n": 3}, 3)
    decoder.entered.clear()
    decoder.failures[house.next_call] = (0, ReplicaLost("gone"))
    await house.leave_waiting(shown("grey"), decoder.entered)
    await answer_document(house.service, PATH, other, tenant=ACME, request_id="r", batch_id="batch_1")

    assert len(house.receipts) == 15
    counted, told = agreeing(house.counters(), house.receipts)
    assert counted == told
    assert told["output_tokens", "m", ""] > 30
    assert told["images", "m", "encoded"] == 6

    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    ledger = Ledger(database)
    ledger.write(house.receipts)
    ledger.check_integrity()
    database.close()
    statuses = Counter(receipt.status for receipt in house.receipts)
    assert statuses == {200: 6, 503: 2, 500: 1, 400: 1, 499: 5}
    for flow in house.flows.values():
        flow._gatherer._store.check_integrity()
    house.service.governor.check_integrity()
    house.service.keys.presence.check_integrity()


async def test_lone_requests_are_counted_alike_too(card):
    """The counter counts answers, the receipts requests: without `n` that is the same, status by status."""
    house = House(card)
    await house.finish(CHAT)
    await house.leave(CHAT, 2)
    house.decoder.failures[house.next_call] = (1, ValueError("unforeseen"))
    with pytest.raises(ValueError, match="unforeseen"):
        await house.finish(CHAT)
    await house.fail(CHAT | {"max_tokens": 10_000})
    text = house.page.render().decode()
    counted = {
        int(sample.labels["status"]): round(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "omnilmm_requests_total"
    }
    assert counted == Counter(receipt.status for receipt in house.receipts) == {200: 1, 499: 1, 500: 1, 400: 1}


async def test_a_client_that_leaves_pays_for_the_tokens_until_then(card):
    house = House(card)
    whole = await house.finish(CHAT)
    await house.leave(CHAT, 2)
    finished, left = house.receipts
    assert (left.status, left.completion_tokens) == (499, 1)
    assert left.prompt_tokens == finished.prompt_tokens == whole[-1].prompt_tokens > 0
    assert finished.completion_tokens == len(ANSWER) + 1


async def test_who_leaves_before_the_first_token_has_read_no_prompt(card):
    house = House(card)
    await house.leave(CHAT, 1)
    (receipt,) = house.receipts
    assert (receipt.status, receipt.prompt_tokens, receipt.completion_tokens) == (499, 0, 0)


async def test_the_adapter_has_a_column_of_its_own(card):
    house = House(card)
    await house.finish(CHAT | {"model": "m:a"})
    await house.finish(CHAT)
    assert [(receipt.model, receipt.adapter) for receipt in house.receipts] == [("m", "a"), ("m", "")]


async def test_a_line_s_receipt_names_its_batch(card):
    house = House(card)
    await answer_document(house.service, PATH, CHAT, tenant=ACME, request_id="r", batch_id="batch_7")
    await house.finish(CHAT)
    assert [receipt.batch_id for receipt in house.receipts] == ["batch_7", ""]


async def test_names_that_clients_make_up_are_kept_nowhere(card):
    house = House(card)
    async with client_of(house.service) as http:
        for number in range(50):
            for model in (f"x{number}", f"m:x{number}", f"m:a:{number}", "m:*"):
                refused = await http.post(PATH, json=CHAT | {"model": model})
                assert error_of(refused)[:2] == (404, "model_not_found")
    assert house.receipts == []
    assert house.counters() == Counter()


# -- the cache ----------------------------------------------------------------------------------------


async def test_a_tenant_over_its_bytes_is_answered_and_not_remembered(card):
    house = House(replace(card, vector_bytes=4))
    small = Tenant("acme", "acme", limits=TenantLimits(cache_bytes=16))
    for colour in ("red", "blue", "green", "red", "green"):
        await house.finish(shown(colour), tenant=small)
    assert [(receipt.images_encoded, receipt.images_cache) for receipt in house.receipts] == [
        (1, 0),
        (1, 0),
        (1, 0),  # answered, but there was no more room
        (0, 1),
        (1, 0),
    ]
    await house.finish(shown("white", "black", "grey"), tenant=Tenant("b", "b", limits=TenantLimits(cache_bytes=16)))
    assert house.receipts[-1].images_encoded == 3


async def test_lines_of_a_batch_are_held_by_the_bytes_and_by_nothing_else(card):
    house = House(replace(card, vector_bytes=4))
    small = Tenant("acme", "acme", limits=TenantLimits(cache_bytes=8, requests_per_min=1))
    for colour in ("red", "blue", "blue", "red"):
        await answer_document(house.service, PATH, shown(colour), tenant=small, request_id="r", batch_id="b")
    assert [receipt.images_encoded for receipt in house.receipts] == [1, 1, 1, 0]


async def test_who_leaves_while_a_picture_is_encoded_has_it_counted(card):
    """The pool goes on, and stores it all the same."""
    house = House(replace(card, vector_bytes=4))
    small = Tenant("acme", "acme", limits=TenantLimits(cache_bytes=8))
    encoder = house.flows["m"]._gatherer._encoder
    entered, encode = asyncio.Event(), encoder.encode

    async def held(*args, **options):
        entered.set()
        await asyncio.Event().wait()

    encoder.encode = held
    task = asyncio.create_task(house.finish(shown("red"), tenant=small))
    await entered.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    encoder.encode = encode
    for _ in range(2):
        await house.finish(shown("blue"), tenant=small)
    assert [receipt.images_encoded for receipt in house.receipts] == [0, 1, 1]


async def test_who_leaves_before_anything_was_encoded_takes_no_room(card):
    house = House(replace(card, vector_bytes=4))
    small = Tenant("acme", "acme", limits=TenantLimits(cache_bytes=8))
    told = house.asking(shown("red"), tenant=small)
    await anext(told)
    await told.aclose()
    for _ in range(2):
        await house.finish(shown("blue"), tenant=small)
    assert [receipt.images_encoded for receipt in house.receipts] == [0, 1, 0]


async def test_a_patient_tenant_has_limits_of_its_own_too(card):
    """Priority `batch` is a place in the queue; it does not turn requests into lines of a batch."""
    house = House(card)
    patient = Tenant("acme", "acme", priority=Priority.BATCH, limits=TenantLimits(requests_per_min=1))
    await house.finish(CHAT, tenant=patient)
    with pytest.raises(OmniError) as refused:
        await house.finish(CHAT, tenant=patient)
    assert refused.value.status == 429
