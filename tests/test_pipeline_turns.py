"""What later turns cost, with the real engine and encoder: no encoding, no vectors, only the new tokens."""

import asyncio

import pytest

from omnilmm.config import EngineConfig
from omnilmm.messages import ChatRequest, Conversation, Delta, Finished, ImagePart, ImageSource, TextPart, Turn
from omnilmm.pipeline import Pipeline

ROOM = EngineConfig(num_blocks=512)


@pytest.fixture
async def pipeline(data):
    loaded = Pipeline.load(str(data / "minicpm-v-tiny"), dtype="float32", device="cpu", engine=ROOM)
    async with loaded as running:
        yield running
        running.store.check_integrity()


@pytest.fixture
def picture(data):
    return (data / "images" / "coins_gray.png").read_bytes()


async def ask(pipeline, *turns):
    """The answer to a conversation given as tuples of texts and pictures, first the user's."""
    roles = ("user", "assistant")
    conversation = Conversation(
        tuple(
            Turn(roles[i % 2], tuple(ImagePart(p, "p") if isinstance(p, bytes) else TextPart(p) for p in parts))
            for i, parts in enumerate(turns)
        )
    )
    request = ChatRequest("r", conversation, max_tokens=6, temperature=0.0, ignore_eos=True)
    events = [event async for event in pipeline.answer(request)]
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events if isinstance(event, Delta)), events[-1].usage


def num_bytes(pipeline):
    return pipeline.config.num_image_tokens * pipeline.config.language.hidden * 4


async def test_from_the_second_turn_on_no_vector_is_moved(pipeline, picture):
    turns = [(picture, "What is this?")]
    told = []
    for question in ("And this?", "And that?", "And then?"):
        answer, usage = await ask(pipeline, *turns)
        told.append((usage.images[0].source, usage.embedding_bytes, usage.encode_s > 0))
        turns += [(answer,), (question,)]
    in_kv = (ImageSource.KV, 0, False)
    assert told == [(ImageSource.ENCODED, num_bytes(pipeline), True), in_kv, in_kv]
    assert pipeline.encoder.stats().num_pictures == 1


async def test_a_known_picture_in_another_conversation_moves_its_vectors_once(pipeline, picture):
    await ask(pipeline, (picture, "What is this?"))
    _, usage = await ask(pipeline, ("Hello.",), ("Hi.",), (picture, "What is this?"))
    assert (usage.images[0].source, usage.embedding_bytes) == (ImageSource.CACHE, num_bytes(pipeline))


async def test_vectors_evicted_between_the_lookup_and_the_fetch_are_made_again_unseen(pipeline, picture, monkeypatch):
    text, _ = await ask(pipeline, ("Hello.",), ("Hi.",), (picture, "What is this?"))
    lookup = pipeline.store.lookup

    async def look_and_evict(keys):
        found = await lookup(keys)
        for key in keys:
            pipeline.store._memory.take(key)
        monkeypatch.undo()
        return found

    monkeypatch.setattr(pipeline.store, "lookup", look_and_evict)
    _, usage = await ask(pipeline, ("Hey.",), ("Hi.",), (picture, "What is this?"))
    assert usage.images[0].source is ImageSource.ENCODED
    assert pipeline.encoder.stats().num_pictures == 2
    again, _ = await ask(pipeline, ("Hello.",), ("Hi.",), (picture, "What is this?"))
    assert again == text


async def test_what_comes_before_a_new_picture_is_computed_while_it_is_encoded(pipeline, picture, monkeypatch):
    turns = ("Hello there, my friend.",), ("Hi.",), (picture, "What is this?")
    gate = asyncio.Event()
    encode = pipeline.encoder.encode

    async def held(prepared, *, timeout_s):
        await gate.wait()
        return await encode(prepared, timeout_s=timeout_s)

    monkeypatch.setattr(pipeline.encoder, "encode", held)
    asking = asyncio.create_task(ask(pipeline, *turns))
    while not (stats := pipeline.engine.stats()).num_steps:
        await asyncio.sleep(0.002)
        assert not asking.done()
    assert (stats.num_running, stats.generated_tokens) == (1, 0)
    assert stats.last_step_tokens > 5
    gate.set()
    text, usage = await asking
    assert usage.images[0].source is ImageSource.ENCODED
    assert (await ask(pipeline, *turns))[0] == text
