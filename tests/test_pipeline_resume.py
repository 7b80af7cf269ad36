"""A decoder that dies in the middle of an answer is followed by another one, and the reader sees no seam.

Two engines over the same weights stand for two replicas: neither has the other's keys and values, and whichever is
called may die after any token. The cluster's own version, with SIGKILL, is in e2e/test_resume.py.
"""

import json
import random
from collections import Counter
from contextlib import aclosing
from dataclasses import replace

import pytest

from omnilmm.cache.key import KeyRing
from omnilmm.config import EngineConfig, ImageLimits
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.errors import ReplicaLost
from omnilmm.flow import ChatFlow
from omnilmm.messages import (
    ChatRequest,
    Conversation,
    Delta,
    Finished,
    Grammar,
    GrammarKind,
    ImagePart,
    TextPart,
    Turn,
)
from omnilmm.observe import Silent
from omnilmm.pipeline import LocalDecoder, LocalEncoder, Pipeline, SystemClock, start_engine
from omnilmm.retries import Retries, RetryBudget

NUM_SEEDS = 50
NUM_TOKENS = 16
ROOM = EngineConfig(num_blocks=512)


class DyingReplicas:
    """ports.Decoder over several engines, called in turn. `deaths` says after how many tokens of its answer a
    request's calls die, one after another; a request without an entry is left alone."""

    def __init__(self, replicas):
        self.replicas = replicas
        self.deaths = {}
        self.num_calls = Counter()

    async def generate(self, call, *, affinity):
        replica = self.replicas[self.num_calls[call.request_id] % len(self.replicas)]
        self.num_calls[call.request_id] += 1
        deaths = self.deaths.get(call.request_id, [])
        dies_at = deaths.pop(0) if deaths else None
        num_tokens = len(call.emitted)
        async with aclosing(replica.generate(call, affinity=affinity)) as batches:
            async for batch in batches:
                if dies_at is not None and num_tokens + len(batch.ids) > dies_at:
                    told = batch.ids[: max(0, dies_at - num_tokens)]
                    if told:
                        yield replace(batch, ids=told, finish=None)
                    raise ReplicaLost("gone")
                num_tokens += len(batch.ids)
                yield batch


@pytest.fixture
async def house(data, monkeypatch):
    """A flow over two replicas. Nothing bounds its retries in sum: that has tests of its own."""
    monkeypatch.setattr(Retries, "resume_reserve", 4.0 * NUM_SEEDS)
    loaded = Pipeline.load(str(data / "minicpm-v-tiny"), dtype="float32", device="cpu", engine=ROOM)
    async with loaded as pipeline:
        grammars = GrammarCompiler(pipeline.card.template.tokenizer, vocab_size=pipeline.card.vocab_size)
        room = ROOM.resolve(max_context=pipeline.config.max_context)
        other = start_engine(pipeline.language, room, Silent(), grammars=grammars)
        replicas = DyingReplicas([LocalDecoder(loop, pipeline.store) for loop in (pipeline.engine, other)])
        flow = ChatFlow(
            pipeline.card,
            preparer=pipeline.preparer,
            store=pipeline.store,
            encoder=LocalEncoder(pipeline.encoder, pipeline.store),
            decoder=replicas,
            keys=KeyRing(b"a secret of thirty-two bytes.... "),
            limits=ImageLimits(),
            observer=Silent(),
            clock=SystemClock(),
            retries=RetryBudget(reserve=4.0 * NUM_SEEDS),
        )
        yield flow, replicas
        other.stop()


async def ask(flow, request):
    deltas = [event async for event in flow.answer(request)]
    assert isinstance(deltas[-1], Finished)
    return "".join(event.text for event in deltas if isinstance(event, Delta)), deltas[-1]


def request(name, picture, **changes):
    parts = (ImagePart(picture, "p"), TextPart("What is this?"))
    conversation = Conversation((Turn("user", parts),))
    return ChatRequest(name, conversation, max_tokens=NUM_TOKENS, **({"ignore_eos": True} | changes))


def sampled(seed):
    draws = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": seed}
    return draws | {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}


def structured(seed):
    schema = {"type": "object", "properties": {"seen": {"type": "string", "maxLength": 20}}, "required": ["seen"]}
    return sampled(seed) | {"grammar": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), "ignore_eos": False}


STYLES = {
    "greedy": lambda seed: {"temperature": 0.0, "repetition_penalty": 1.0},
    "sampled": sampled,
    "structured": structured,
}


@pytest.mark.parametrize("style", STYLES)
async def test_an_answer_is_the_same_wherever_and_however_often_its_decoder_dies(house, data, style):
    """One after another: matrix products round differently in company, and a draw may then fall the other way."""
    flow, replicas = house
    picture = (data / "images" / "coins_gray.png").read_bytes()
    draw = random.Random(style)
    undisturbed = {}
    for seed in range(NUM_SEEDS):
        wish = STYLES[style](seed)
        if str(wish) not in undisturbed:
            undisturbed[str(wish)] = await ask(flow, request(f"whole {seed}", picture, **wish))
        text, whole = undisturbed[str(wish)]
        num_tokens = whole.usage.completion_tokens
        deaths = sorted(draw.choices(range(num_tokens), k=draw.choice((1, 2))))
        name = f"{seed}, dying after {deaths}"
        replicas.deaths[name] = list(deaths)
        same_text, resumed = await ask(flow, request(name, picture, **wish))
        assert (name, same_text) == (name, text)
        assert replicas.num_calls[name] == 1 + len(deaths)
        assert resumed.finish == whole.finish
        assert resumed.usage.completion_tokens == num_tokens
        assert (num_tokens == NUM_TOKENS) or "grammar" in wish
