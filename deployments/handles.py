"""The flow's ports over Serve handles, and Ray's errors turned back into ours.

Small records travel over gRPC (one hop, half the cost of the object store); a call above 1 MiB goes through the
object store, since gRPC refuses messages over 4 MiB and is slower from about 1 MiB on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.context import _get_serve_request_context, _serve_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from omnilmm.errors import OmniError, Overloaded, ReplicaLost
from omnilmm.messages import Encoded, GenerateCall, PreparedImage, TokenBatch

_GRPC_BYTES = 1024 * 1024


@contextmanager
def our_errors(pool: str) -> Iterator[None]:
    """Inside, whatever Ray raises comes out as an OmniError; `pool` names who was called, for the message.

    Under the object store an error of the other side arrives wrapped in RayTaskError, under gRPC as itself.
    """
    try:
        yield
    except OmniError:
        raise
    except RayTaskError as wrapped:
        cause = wrapped.cause
        if isinstance(cause, OmniError):
            raise cause from None
        if isinstance(cause, (RayActorError, TaskCancelledError)) or isinstance(wrapped, RayActorError):
            raise ReplicaLost(f"A {pool} replica was lost.") from wrapped
        raise
    except RayActorError as lost:
        raise ReplicaLost(f"A {pool} replica was lost.") from lost
    except (BackPressureError, DeploymentUnavailableError) as full:
        raise Overloaded(f"The {pool} pool is at capacity.", retry_after=1.0) from full


@contextmanager
def _call_of_its_own() -> Iterator[None]:
    """Calls begun inside are told apart by Serve although one HTTP request makes them.

    Ray 2.60 names a call after the request that makes it, and of two of a name that look for a replica at the same
    moment it forgets one, which then waits for ever.
    """
    nameless = replace(_get_serve_request_context(), _internal_request_id="")
    token = _serve_request_context.set(nameless)  # type: ignore[arg-type]  # declared by its default, None
    try:
        yield
    finally:
        _serve_request_context.reset(token)


class ServeEncoder:
    """ports.Encoder over a handle to `deployments.vision.Vision`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(_by_reference=False)

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        with our_errors("vision"):
            with _call_of_its_own():
                encoding = self._handle.encode.remote(
                    picture, key=key, by_value=by_value, timeout_s=timeout_s, keep=keep
                )
            return await encoding


class ServeDecoder:
    """ports.Decoder over a handle to `deployments.decoder.Decoder`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, call: GenerateCall, *, affinity: str) -> AsyncGenerator[TokenBatch, None]:
        carried = sum(len(image.embedding.data) for image in call.images if image.embedding is not None)
        handle = self._handle.options(stream=True, session_id=affinity, _by_reference=carried > _GRPC_BYTES)
        with our_errors("decoder"):
            with _call_of_its_own():
                stream = cast(DeploymentResponseGenerator, handle.generate.remote(call))
            finished = False
            try:
                async for batch in stream:
                    yield batch
                finished = True
            finally:
                if not finished:
                    stream.cancel()
