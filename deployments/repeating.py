"""Refusals that still hold are said again where the next request comes in: in Serve's proxy.

A tenant whose line is full has it full a moment later too. To hear so from a router costs a call through Serve, a
hundred times what the answer is worth, and the engine's cores pay for it. So the router marks such a refusal with the
model and for how long it lasts (half a second at most), and this middleware says it again to whoever asks with the same
key, at the same path, for the same model. What a router has not refused, nobody is refused here: others' requests,
requests for other models, and bodies too large to be read in passing go to the router as ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnilmm.errors import QueueFull

MARK = "x-omnilmm-lasts"
"""The header between router and proxy; no client sees it behind one of ours."""
MAX_LASTS_S = 1.0
MAX_BODY_BYTES = 64 * 1024
"""Of a request that is read here. What is longer is likely to have pictures, and goes to the router."""
MAX_ANSWER_BYTES = 4096
MAX_REMEMBERED = 1024
_OWN_HEADERS = frozenset({b"x-request-id", MARK.encode(), b"date", b"server"})

logger = logging.getLogger("ray.serve")

Asked = tuple[bytes, str]
"""Who asks (a digest, never the key itself), and the path."""


def mark_of(full: QueueFull) -> str:
    """What the header says: the model, and for how many seconds the refusal lasts."""
    return json.dumps({"model": full.model, "seconds": round(full.lasts_s, 4)})


@dataclass(frozen=True, slots=True)
class _Refusal:
    ends_at: float
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class RepeatedRefusals:
    """ASGI middleware.

    Args:
        app: what answers.
        note_repeated: called with the model for each refusal that is said again.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        note_repeated: Callable[[str], None] = lambda model: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._note_repeated = note_repeated
        self._clock = clock
        self._refusals: OrderedDict[Asked, dict[str, _Refusal]] = OrderedDict()  # by model; oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        asked = _asked(scope)
        if self._lasting(asked):
            model, receive = await _read_ahead(receive)
            refusal = self._lasting(asked).get(model)
            if refusal is not None:
                await _say(refusal, scope, send)
                self._note_repeated(model)
                return
        await self._app(scope, receive, self._listening(asked, send))

    def _lasting(self, asked: Asked) -> dict[str, _Refusal]:
        """What lasts of the refusals of this kind, by model."""
        refusals = self._refusals.get(asked)
        if refusals is None:
            return {}
        now = self._clock()
        for model in [model for model, refusal in refusals.items() if refusal.ends_at <= now]:
            del refusals[model]
        if not refusals:
            del self._refusals[asked]
        return refusals

    def _listening(self, asked: Asked, send: Send) -> Send:
        """Pass an answer on; one that is marked is remembered, without the mark."""
        begun: tuple[str, _Refusal] | None = None

        async def listen(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = _begun(message, self._clock())
                if begun is not None:
                    message = {**message, "headers": [pair for pair in message["headers"] if not _is_mark(pair[0])]}
            elif begun is not None and message["type"] == "http.response.body":
                model, refusal = begun
                body = refusal.body + message.get("body", b"")
                begun = (model, _Refusal(refusal.ends_at, refusal.status, refusal.headers, body))
                if len(body) > MAX_ANSWER_BYTES:
                    begun = None
                elif not message.get("more_body", False):
                    self._remember(asked, *begun)
            await send(message)

        return listen

    def _remember(self, asked: Asked, model: str, refusal: _Refusal) -> None:
        refusals = self._refusals.pop(asked, {})
        self._refusals[asked] = refusals | {model: refusal}
        if len(self._refusals) > MAX_REMEMBERED:
            self._refusals.popitem(last=False)


def _asked(scope: Scope) -> Asked:
    keys = [value for name, value in scope["headers"] if name == b"authorization"]
    client = scope.get("client")
    who = keys or [client[0].encode() if client else b""]  # an open server knows people by their address
    return hashlib.sha256(b"\n".join(who)).digest(), scope["path"]


async def _read_ahead(receive: Receive) -> tuple[str, Receive]:
    """The model that a request names ("" if that cannot be told), and its body to be received once more."""
    messages: list[Message] = []
    body, is_whole = bytearray(), False
    while not is_whole and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        is_whole = not message.get("more_body", False)  # nothing comes after a disconnect either
    left = iter(messages)

    async def again() -> Message:
        return next(left, None) or await receive()

    return _model_of(bytes(body)) if is_whole else "", again


def _model_of(body: bytes) -> str:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, str) else ""


async def _say(refusal: _Refusal, scope: Scope, send: Send) -> None:
    named = (value for name, value in scope["headers"] if name == b"x-request-id")
    request_id = next(named, None) or secrets.token_hex(16).encode()
    headers = [*refusal.headers, (b"x-request-id", request_id)]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body})


def _begun(message: Message, now: float) -> tuple[str, _Refusal] | None:
    """The model and the beginning of a refusal that is marked."""
    value = next((value for name, value in message["headers"] if _is_mark(name)), None)
    if value is None:
        return None
    try:
        mark = json.loads(value)
        model, seconds = str(mark["model"]), min(MAX_LASTS_S, float(mark["seconds"]))
    except (ValueError, KeyError, TypeError):
        logger.warning("an answer has a mark that cannot be read")
        return None
    kept = tuple((name, value) for name, value in message["headers"] if name.lower() not in _OWN_HEADERS)
    return model, _Refusal(now + seconds, message["status"], kept, b"")


def _is_mark(name: bytes) -> bool:
    return name.lower() == MARK.encode()
