"""Calls to the pools that one HTTP request makes: Serve has to be able to tell them apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import pytest
from ray.serve._private.default_impl import (
    create_dynamic_handle_options,
    create_init_handle_options,
    get_request_metadata,
)
from ray.serve.context import _get_serve_request_context, _set_request_context, _unset_request_context

from deployments.handles import ServeDecoder, ServeEncoder
from omnilmm.messages import Encoded, GenerateCall, PixelIdentity, PreparedImage, Prompt, Sampling, TokenBatch

NAME = "the name of the HTTP request"


@pytest.fixture(autouse=True)
def request_being_served() -> Iterator[None]:
    """As in a replica that answers a request."""
    _set_request_context(request_id="chatcmpl-1", _internal_request_id=NAME)
    yield
    _unset_request_context()


class NamingHandle:
    """A handle that answers nothing, and writes down what Ray would call each call."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.generate = self.encode = self

    def options(self, **options: Any) -> Self:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        metadata = get_request_metadata(create_init_handle_options(), create_dynamic_handle_options())
        assert metadata.request_id == "chatcmpl-1"
        self.names.append(metadata.internal_request_id)
        return self._encoded() if kwargs else self._batches()

    async def _encoded(self) -> Encoded:
        return Encoded(None, stored=True, seconds=0.0)

    async def _batches(self) -> AsyncIterator[TokenBatch]:
        yield TokenBatch()


async def test_every_answer_is_a_call_of_its_own() -> None:
    handle = NamingHandle()
    decoder = ServeDecoder(handle)  # type: ignore[arg-type]
    call = GenerateCall("chatcmpl-1", Prompt((1,), (), ()), (), Sampling(max_tokens=1))
    for _ in range(2):
        assert [batch async for batch in decoder.generate(call, affinity="conversation")] == [TokenBatch()]
    assert len({*handle.names, NAME}) == 3
    assert _get_serve_request_context()._internal_request_id == NAME


async def test_every_picture_is_a_call_of_its_own() -> None:
    handle = NamingHandle()
    encoder = ServeEncoder(handle)  # type: ignore[arg-type]
    picture = PreparedImage(PixelIdentity(b"", 1, 1), 1, bytes(3))
    for _ in range(2):
        await encoder.encode(picture, key="key", by_value=False, timeout_s=1.0)
    assert len({*handle.names, NAME}) == 3
    assert _get_serve_request_context()._internal_request_id == NAME
