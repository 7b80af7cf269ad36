"""From a checked body to its answers, without HTTP: the door for the routes and for the lines of a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from deployments.adapters import served_to
from deployments.choices import Begin, Event, side_by_side
from deployments.receipts import Account, receipt_of
from omnilmm.api.choices import choices_of
from omnilmm.api.endpoints import ENDPOINTS, Body
from omnilmm.api.fields import Caller
from omnilmm.api.responses import Answer, Heading
from omnilmm.errors import DeadlineExceeded, InvalidRequest, OmniError, QueueFull
from omnilmm.flow import ChatFlow
from omnilmm.image.reader import ImageReader
from omnilmm.image.source import located, picture_size
from omnilmm.messages import ChatRequest, Delta, Finished, Priority, Usage
from omnilmm.prompt.template import NUM_IMAGE_TOKENS
from omnilmm.tenancy.governor import Estimate, Governor
from omnilmm.tenancy.keys import KeyBook, Tenant
from omnilmm.tenancy.lines import Lines
from omnilmm.tenancy.places import Places
from omnilmm.tenancy.tenant import TenantLimits
from omnilmm.tenancy.usage import Receipt

logger = logging.getLogger("ray.serve")


class Ledger(Protocol):
    """Where receipts go: `omnilmm.tenancy.recorder.UsageRecorder`."""

    def check_room(self) -> None:
        """Raises Overloaded when no more receipts can be taken."""
        ...

    def record(self, receipt: Receipt) -> None: ...


class LoggedReceipts:
    """A ledger for servers without a database: receipts are lines of the log."""

    def check_room(self) -> None:
        return None

    def record(self, receipt: Receipt) -> None:
        logger.info("receipt", extra={"ray_serve_extra_fields": asdict(receipt)})


class AskService(Protocol):
    """What asking needs of the router."""

    flows: dict[str, ChatFlow]
    images: ImageReader
    governor: Governor
    places: Places
    lines: Lines
    ledger: Ledger
    keys: KeyBook
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request was let in: headers for its response."""

    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Told:
    """Something of answer `index`."""

    index: int
    event: Event


async def ask(
    service: AskService, body: Body, tenant: Tenant, caller: Caller, *, endpoint: str, batch_id: str | None = None
) -> AsyncGenerator[Admitted | Told | Usage, None]:
    """Admitted, then what the answers say as they say it, then what they took. Closing it frees everything.

    Lines of a batch (`batch_id` is then not None) do not count against the limits per minute: a batch takes what is
    left over. However it ends, a request that was admitted has a receipt of what it took until then.

    Raises:
        Unauthorized: the tenant or its key was revoked meanwhile.
        OmniError: with `param` as this body has it. The first answer to fail fails all.
    """
    begun = time.monotonic()
    service.ledger.check_room()
    with _in_terms_of(body), ExitStack() as room:
        tenant.check_model(body.model, served_to(tenant, service.flows))
        flow = service.flows[body.model]
        if batch_id is None:
            _make_room(service, room, tenant, body.model, caller.priority)
        files = await service.images.read_all(body.pictures(), tenant=tenant.name)
        prompts = body.to_requests(caller, files)
        limited = tenant if batch_id is None else replace(tenant, limits=_limits_of_lines(tenant.limits))
        permit = await service.governor.admit(limited, _estimate(flow, prompts, body.num_choices))
        account = Account(body.num_choices)
        receipt = receipt_of(
            account,
            service.ledger.record,
            tenant=tenant,
            model=body.model,
            request_id=caller.request_id,
            batch_id=batch_id,
        )
        with permit, receipt, service.keys.visit(tenant) as visit:
            try:
                visit.pause()
                yield Admitted(permit.headers)
                visit.resume()
                asked = prompts if permit.may_cache else [replace(prompt, may_cache=False) for prompt in prompts]
                choices = [choice for prompt in asked for choice in choices_of(prompt, body.num_choices)]
                ends_at = begun + caller.timeout_s
                begin: list[Begin] = [
                    partial(_begin, flow, choice, ends_at, account.of(i)) for i, choice in enumerate(choices)
                ]
                async with aclosing(side_by_side(begin, per_prompt=body.num_choices)) as told:
                    async for index, event in told:
                        visit.pause()
                        yield Told(index, event)
                        visit.resume()
            finally:
                usage = account.total()
                permit.note_kept(usage.kept_bytes)
            permit.settle(usage)
        _log(body, tenant, usage, endpoint, time.monotonic() - begun)
        yield usage


async def answer_document(
    service: AskService,
    endpoint: str,
    document: Mapping[str, object],
    *,
    tenant: Tenant,
    request_id: str,
    batch_id: str = "",
) -> Mapping[str, Any]:
    """What POSTing this document to the endpoint would answer, as a line of a batch: behind whatever is online.

    Raises:
        OmniError: what it would be refused with; a stream is.
    """
    body = ENDPOINTS[endpoint](document)
    if body.stream:
        raise InvalidRequest("A line of a batch cannot ask for a stream.", param="stream", code="unsupported_value")
    caller = caller_of(service, tenant, request_id=request_id, priority=Priority.BATCH)
    async with aclosing(ask(service, body, tenant, caller, endpoint=endpoint, batch_id=batch_id)) as told:
        return await gather(service, body, caller, told)


def caller_of(
    service: AskService,
    tenant: Tenant,
    *,
    request_id: str,
    session: str | None = None,
    priority: Priority | None = None,
) -> Caller:
    return Caller(
        request_id=request_id,
        tenant=tenant.name,
        scope=tenant.scope,
        weight=tenant.weight,
        priority=tenant.priority if priority is None else priority,
        timeout_s=service.request_timeout_s,
        session=session,
    )


async def gather(
    service: AskService, body: Body, caller: Caller, told: AsyncGenerator[Admitted | Told | Usage, None]
) -> Mapping[str, Any]:
    """The whole response, once all answers are there."""
    deltas: dict[int, list[Delta]] = {}
    answers: dict[int, Answer] = {}
    async for event in told:
        match event:
            case Told(index, Delta() as delta):
                deltas.setdefault(index, []).append(delta)
            case Told(index, Finished() as end):
                pieces = deltas.pop(index, [])
                answers[index] = Answer.collect(pieces, end.finish, logprobs=body.wants_logprobs)
            case Usage():
                rendering = body.rendering(heading_of(service, body, caller))
                return rendering.whole([answers[index] for index in sorted(answers)], event)
    raise AssertionError("answers end with their usage")


def heading_of(service: AskService, body: Body, caller: Caller) -> Heading:
    fingerprint = service.flows[body.model].card.fingerprint[:12]
    return Heading(caller.request_id, body.model, int(time.time()), f"fp_{fingerprint}")


async def _begin(
    flow: ChatFlow, request: ChatRequest, deadline: float, account: Callable[[Usage], None]
) -> AsyncGenerator[Event, None]:
    """One answer, with what is left of the request's time."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("The request ran out of its time.")
    async with aclosing(flow.answer(replace(request, timeout_s=left), account=account)) as answer:
        async for event in answer:
            yield event


def _estimate(flow: ChatFlow, prompts: Sequence[ChatRequest], num_choices: int) -> Estimate:
    """What the request may take, by the length of its words and the headers of its pictures.

    Raises:
        ImageError: a picture has no header to go by.
    """
    card = flow.card
    images = [image for prompt in prompts for image in prompt.conversation.images]
    pixels = 0
    for image in images:
        with located(image.param):
            width, height = picture_size(image.data)
        pixels += width * height
    longest = min(card.template.defaults.max_tokens, card.max_context)
    return Estimate.of(
        text_bytes=sum(map(_num_text_bytes, prompts)),
        image_tokens=len(images) * NUM_IMAGE_TOKENS,
        max_tokens=sum(longest if prompt.max_tokens is None else prompt.max_tokens for prompt in prompts),
        pixels=pixels,
        num_answers=num_choices,
        cache_bytes=len(images) * card.vector_bytes,
    )


def _num_text_bytes(request: ChatRequest) -> int:
    if isinstance(request.raw, tuple):
        return 3 * len(request.raw)
    texts = [turn.text for turn in request.conversation.turns] if request.raw is None else [request.raw]
    return sum(len(text.encode()) for text in texts)


def _limits_of_lines(limits: TenantLimits) -> TenantLimits:
    """What of a tenant's limits holds for the lines of its batches."""
    return TenantLimits(cache_bytes=limits.cache_bytes)


def _make_room(service: AskService, room: ExitStack, tenant: Tenant, model: str, priority: Priority) -> None:
    """Take what a request holds until `room` is closed, before anything of it is looked at: that is most of its cost.

    Raises:
        Overloaded: see `Places.take` and `Lines.enter`.
    """
    begun = time.monotonic()
    try:
        room.enter_context(service.places.take(tenant.name))
        room.enter_context(service.lines.enter(tenant.name, model, priority))
    except QueueFull:
        service.lines.note_refused(model, time.monotonic() - begun)
        raise


@contextmanager
def _in_terms_of(body: Body) -> Iterator[None]:
    """Errors of the flow speak of chat completions; outside they speak of this body."""
    try:
        yield
    except OmniError as error:
        error.param = body.place(error.param)
        if isinstance(error, QueueFull):
            error.model = body.model
        raise


def _log(body: Body, tenant: Tenant, usage: Usage, endpoint: str, seconds: float) -> None:
    fields = {
        "endpoint": endpoint,
        "tenant": tenant.name,
        "model": body.model,
        "stream": bool(body.stream),
        "choices": body.num_choices,
        "seconds": round(seconds, 4),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "images": [image.source.value for image in usage.images],
    }
    logger.info("answered", extra={"ray_serve_extra_fields": fields})
