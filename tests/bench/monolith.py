"""What one would write first: the original chat.py behind HTTP. One process, one request at a time, nothing remembered.

Every request decodes and encodes every picture of its conversation and computes the whole prompt anew, as
OmniLMMChat.chat of the original does; only that tokens are sent as they come, which the original does not. The model
code and the weights are the product's own, so what differs is the arrangement and nothing else.

    python tests/bench/monolith.py CHECKPOINT --port 8001 --dtype bfloat16 --threads 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

from omnilmm.config import ImageLimits, InputHandling
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.image.data_uri import read_data_uri
from omnilmm.image.transform import prepare
from omnilmm.messages import Conversation, Embedding, ImagePart, TextPart, Turn
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import read_model_config
from omnilmm.models.merge import merge_pictures
from omnilmm.models.weights import load_encoder, load_language_model
from omnilmm.prompt.detokenize import Detokenizer
from omnilmm.prompt.template import load_template


class Chat:
    """The model, and one answer after another."""

    def __init__(self, folder: Path, dtype: str) -> None:
        config = read_model_config(folder)
        policy = config.image_policy(InputHandling.SAFE)
        assert policy is not None
        self._policy = policy
        self._encoder = VisionEncoder(load_encoder(folder, config, dtype=dtype), policy)
        self._model = load_language_model(folder, config, dtype=dtype)
        self._template = load_template(config.family, folder, num_image_tokens=config.num_image_tokens)
        self.num_encodes = 0

    @torch.inference_mode()
    def answer(self, conversation: Conversation, max_tokens: int) -> Iterator[str]:
        """Greedy, `max_tokens` long, in pieces."""
        prompt = self._template.render(conversation, InputHandling.SAFE)
        embeds = merge_pictures(self._model, prompt.ids, prompt.spans, [self._see(p) for p in conversation.images])
        attend = DenseAttend(self._model.config.num_layers)
        words = Detokenizer(self._template.tokenizer, skip_special=self._template.skip_special)
        position = 0
        for _ in range(max_tokens):
            positions = torch.arange(position, position + len(embeds))
            hidden = self._model(embeds, positions, attend)[-1:]
            position += len(embeds)
            drawn = self._model.logits(hidden).argmax(dim=-1)  # (1,)
            yield words.push([int(drawn)])
            embeds = self._model.embed(drawn)
        yield words.flush()

    def _see(self, part: ImagePart) -> Embedding:
        self.num_encodes += 1
        embedding = self._encoder.encode(
            [prepare(part.data, policy=self._policy, limits=ImageLimits(), param=part.param)]
        )[0]
        assert isinstance(embedding, Embedding)
        return embedding


def read_conversation(messages: list[dict]) -> Conversation:
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append(Turn(message["role"], tuple(map(read_part, parts))))
    return Conversation(tuple(turns))


def read_part(part: dict) -> TextPart | ImagePart:
    if part["type"] == "text":
        return TextPart(part["text"])
    return ImagePart(read_data_uri(part["image_url"]["url"], param="", limits=ImageLimits()), "")


def make_handler(chat: Chat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._begin("application/json")
            self.wfile.write(json.dumps({"num_encodes": chat.num_encodes}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._begin("text/event-stream")
            for text in chat.answer(read_conversation(body["messages"]), body["max_tokens"]):
                if text:
                    self._send({"choices": [{"index": 0, "delta": {"content": text}}]})
            self.wfile.write(b"data: [DONE]\n\n")

        def _begin(self, media_type: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.end_headers()

        def _send(self, event: dict) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


class Server(HTTPServer):
    request_queue_size = 128  # who comes meanwhile waits here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Server(("127.0.0.1", options.port), make_handler(Chat(options.checkpoint, options.dtype))).serve_forever()


if __name__ == "__main__":
    main()
