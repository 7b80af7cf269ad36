"""The original projects' interface: `OmniLMMChat`, `img2base64`, and one `process` call per round.

    from omnilmm.chat import OmniLMMChat, img2base64

    chat_model = OmniLMMChat("openbmb/OmniLMM-12B")
    im_64 = img2base64("./assets/worldmap_ck.jpg")
    msgs = [{"role": "user", "content": "What is interesting about this image?"}]
    answer = chat_model.process({"image": im_64, "question": json.dumps(msgs)})

A folder or hub id runs in this process over `omnilmm.pipeline`; an http:// or https:// address talks to a running
cluster. Answers are drawn with the sampling of the original of the family, or greedily on request.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import httpx

from omnilmm.api.sse import DONE_DATA, EventReader
from omnilmm.config import EngineConfig, InputHandling
from omnilmm.errors import (
    IMAGE_CODES,
    DeadlineExceeded,
    Forbidden,
    ImageError,
    InvalidRequest,
    NotFound,
    OmniError,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    Unauthorized,
    UnsupportedMediaType,
)
from omnilmm.messages import ChatRequest, Conversation, Delta, Finished, ImagePart, TextPart, Turn

if TYPE_CHECKING:
    from omnilmm.pipeline import Pipeline, Progress

IMAGE_DECODE_ERROR = "Image decode error"
"""What the originals answer to bytes that are no picture; kept under original input handling."""


def img2base64(file_name: str | Path) -> bytes:
    """The file's bytes in standard base64, as `process` takes them."""
    return base64.b64encode(Path(file_name).read_bytes())


class OmniLMMChat:
    """A chat about one picture.

    Args:
        model_path: checkpoint folder, hub id, or the address of a running cluster.
        model: name of the model to ask a cluster for; its first one if not given. Not for local use.
        api_key: key for a cluster that wants one. Not for local use.
        dtype: "bfloat16" (as the checkpoints are stored), "float32" or "float16". Local use.
        device: "auto", "cpu" or "cuda". Local use.
        input_handling: "safe" or "original". Local use.
        progress: told bytes loaded and in all. Local use.

    Not for use inside a running event loop: await `omnilmm.pipeline` there.
    """

    def __init__(
        self,
        model_path: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        dtype: str = "bfloat16",
        device: str = "auto",
        input_handling: InputHandling | str = InputHandling.SAFE,
        engine: EngineConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._backend: _Backend
        if model_path.startswith(("http://", "https://")):
            self._backend = _Cluster(model_path, model, api_key)
        else:
            if model is not None or api_key is not None:
                raise InvalidRequest("`model` and `api_key` are for a running cluster, not for a checkpoint.")
            from omnilmm.pipeline import Pipeline  # torch comes with it, which a client of a cluster can do without

            self._backend = _Local(
                Pipeline.load(
                    model_path,
                    dtype=dtype,
                    device=device,
                    input_handling=InputHandling(input_handling),
                    engine=engine,
                    progress=progress,
                )
            )

    def process(
        self,
        input: Mapping[str, Any],
        *,
        greedy: bool = False,
        num_beams: int = 1,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> str:
        """The answer to the last question.

        Args:
            input: {"image": base64 of a picture file (bytes or str), "question": JSON list of {"role", "content"}
                messages}. The picture belongs to the first message. Without "image" the chat is about words only.
            greedy: take the likeliest token each time instead of sampling.
            num_beams: more than 1 searches with so many beams instead, as the original of OmniLMM-3B does (with 3)
                when told not to sample. For a local checkpoint.
            max_tokens: at most this many; the original's 1024 if not given.
            seed: makes a sampled answer repeatable.

        Raises:
            ImageError: the picture cannot be used (under original handling "Image decode error" is the answer).
            InvalidRequest: the question is not such a list, or too long.
        """
        try:
            if num_beams > 1:
                picture, messages = _picture(input.get("image")), _messages(input.get("question"))
                return self._backend.search(picture, messages, num_beams=num_beams, max_tokens=max_tokens)
            return "".join(self.stream(input, greedy=greedy, max_tokens=max_tokens, seed=seed)).strip()
        except ImageError:
            if self._backend.handling is InputHandling.ORIGINAL:
                return IMAGE_DECODE_ERROR
            raise

    chat = process

    def stream(
        self,
        input: Mapping[str, Any],
        *,
        greedy: bool = False,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer piece by piece; arguments and errors as in `process`."""
        picture = _picture(input.get("image"))
        messages = _messages(input.get("question"))
        yield from self._backend.stream(picture, messages, _Wishes(greedy, max_tokens, seed))

    def close(self) -> None:
        """Free the model, or the connection."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _picture(image: object) -> bytes | None:
    if image is None:
        return None
    if not isinstance(image, (bytes, str)):
        raise ImageError("The picture must be base64 as bytes or str.", param="image", code="invalid_base64_image")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("The picture is not valid base64.", param="image", code="invalid_base64_image") from None


def _messages(question: object) -> list[dict[str, str]]:
    try:
        messages = json.loads(question) if isinstance(question, (str, bytes)) else question
    except json.JSONDecodeError:
        raise InvalidRequest("The question is not JSON.", param="question") from None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("The question must be a list of messages.", param="question")
    for i, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") not in ("system", "user", "assistant")
            or not isinstance(message.get("content"), str)
        ):
            raise InvalidRequest("A message is {role: system|user|assistant, content: str}.", param=f"question[{i}]")
    return messages


_Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Wishes:
    """How an answer shall be made; the arguments of `process` under their names."""

    greedy: bool
    max_tokens: int | None
    seed: int | None


class _Backend(Protocol):
    @property
    def handling(self) -> InputHandling | None: ...

    def stream(self, picture: bytes | None, messages: _Messages, wishes: _Wishes) -> Iterator[str]: ...

    def search(self, picture: bytes | None, messages: _Messages, *, num_beams: int, max_tokens: int | None) -> str: ...

    def close(self) -> None: ...


class _Local:
    """A pipeline driven step by step from synchronous code, on an event loop of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._runner = asyncio.Runner()

    @property
    def handling(self) -> InputHandling:
        return self._pipeline.card.handling

    def stream(self, picture: bytes | None, messages: _Messages, wishes: _Wishes) -> Iterator[str]:
        request = ChatRequest(
            request_id=f"chat-{secrets.token_hex(8)}",
            conversation=_conversation(picture, messages),
            max_tokens=wishes.max_tokens,
            temperature=0.0 if wishes.greedy else None,
            repetition_penalty=1.0 if wishes.greedy else None,
            seed=wishes.seed,
        )
        answer = self._pipeline.answer(request)
        try:
            while (event := self._runner.run(_next(answer))) is not None:
                if isinstance(event, Delta):
                    yield event.text
        finally:
            self._runner.run(answer.aclose())

    def search(self, picture: bytes | None, messages: _Messages, *, num_beams: int, max_tokens: int | None) -> str:
        conversation = _conversation(picture, messages)
        return self._runner.run(self._pipeline.search(conversation, num_beams=num_beams, max_tokens=max_tokens))

    def close(self) -> None:
        self._runner.run(self._pipeline.aclose())
        self._runner.close()


async def _next(answer: AsyncGenerator[Delta | Finished, None]) -> Delta | Finished | None:
    return await anext(answer, None)


def _conversation(picture: bytes | None, messages: _Messages) -> Conversation:
    turns = []
    waiting = picture
    for message in messages:
        parts: list[TextPart | ImagePart] = [TextPart(message["content"])]
        if waiting is not None and message["role"] == "user":
            parts.insert(0, ImagePart(waiting, "image"))
            waiting = None
        turns.append(Turn(message["role"], tuple(parts)))  # type: ignore[arg-type]
    return Conversation(tuple(turns))


class _Cluster:
    """A running cluster, over its OpenAI-style HTTP interface."""

    handling = None

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(300.0, connect=10.0))
        self._model = model

    def stream(self, picture: bytes | None, messages: _Messages, wishes: _Wishes) -> Iterator[str]:
        body: dict[str, Any] = {"model": self._model_name(), "messages": _openai(picture, messages), "stream": True}
        if wishes.greedy:
            body |= {"temperature": 0.0, "repetition_penalty": 1.0}
        if wishes.max_tokens is not None:
            body["max_tokens"] = wishes.max_tokens
        if wishes.seed is not None:
            body["seed"] = wishes.seed
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error_of(response)
            reader = EventReader()
            for received in response.iter_bytes():
                for event in reader.feed(received):
                    if event.data == DONE_DATA:
                        return
                    chunk = json.loads(event.data)
                    if "error" in chunk:
                        raise OmniError(chunk["error"]["message"], code=chunk["error"].get("code"))
                    yield from (choice["delta"].get("content") or "" for choice in chunk["choices"])
        raise OmniError("the stream ended before its end")

    def search(self, picture: bytes | None, messages: _Messages, *, num_beams: int, max_tokens: int | None) -> str:
        raise InvalidRequest("Beam search needs a local checkpoint; a cluster samples or decodes greedily.")

    def _model_name(self) -> str:
        if self._model is None:
            response = self._http.get("/v1/models")
            if response.status_code != 200:
                raise _error_of(response)
            self._model = str(response.json()["data"][0]["id"])
        return self._model

    def close(self) -> None:
        self._http.close()


def _openai(picture: bytes | None, messages: _Messages) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    waiting = picture
    for message in messages:
        content: Any = message["content"]
        if waiting is not None and message["role"] == "user":
            # the server looks at the bytes, not at the declared type
            url = "data:image/png;base64," + base64.b64encode(waiting).decode("ascii")
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": message["content"]}]
            waiting = None
        result.append({"role": message["role"], "content": content})
    return result


def _error_of(response: httpx.Response) -> OmniError:
    """The server's error as one of ours, by its status."""
    try:
        error = response.json()["error"]
    except (json.JSONDecodeError, KeyError, TypeError):
        error = {"message": f"the server answered {response.status_code}", "param": None, "code": None}
    kinds = (
        PayloadTooLarge,
        UnsupportedMediaType,
        Unauthorized,
        Forbidden,
        NotFound,
        RateLimited,
        Overloaded,
        DeadlineExceeded,
    )
    by_status: dict[int, type[OmniError]] = {kind.status: kind for kind in kinds} | {400: InvalidRequest}
    kind = ImageError if error.get("code") in IMAGE_CODES else by_status.get(response.status_code, OmniError)
    return kind(error["message"], param=error.get("param"), code=error.get("code"))
