"""What a picture takes in the cache, and a pool that is told not to keep it."""

from types import SimpleNamespace

import pytest

from omnilmm.cache.store import open_store
from omnilmm.config import CacheConfig
from omnilmm.messages import ChatRequest, Conversation, Embedding, Finished, ImagePart, TextPart, Turn
from omnilmm.observe import Silent
from omnilmm.pipeline import LocalEncoder, Pipeline, SystemClock

VECTORS = Embedding("float32", (2, 3), bytes(24))


@pytest.fixture
async def store():
    made = open_store(CacheConfig(), secret=bytes(32), observer=Silent(), clock=SystemClock(), sole=True)
    yield made
    made.check_integrity()
    await made.aclose()


class Loop:
    async def encode(self, picture, *, timeout_s):
        return VECTORS


@pytest.mark.parametrize("by_value", [True, False])
async def test_a_pool_keeps_what_it_may(store, by_value):
    encoder = LocalEncoder(Loop(), store)
    asked = {"by_value": by_value, "timeout_s": 1.0}
    thrown = await encoder.encode(SimpleNamespace(), key="a", keep=False, **asked)
    assert (thrown.embedding, thrown.stored, thrown.kept_bytes) == (VECTORS, False, 0)
    kept = await encoder.encode(SimpleNamespace(), key="b", **asked)
    assert kept.kept_bytes == 24
    for put in list(encoder._puts):
        await put
    assert await store.get("a") is None
    assert await store.get("b") == VECTORS


@pytest.mark.parametrize(("model", "dtype"), [("minicpm-v-tiny", "float32"), ("omnilmm-12b-tiny", "bfloat16")])
async def test_the_card_knows_what_a_picture_takes(data, model, dtype):
    picture = next((data / "images").glob("*.jpg")).read_bytes()
    parts = (ImagePart(picture, "p"), TextPart("What?"))
    request = ChatRequest("r", Conversation((Turn("user", parts),)), max_tokens=2)
    async with Pipeline.load(str(data / model), dtype=dtype, device="cpu") as pipeline:
        *_, end = [event async for event in pipeline.answer(request)]
        assert isinstance(end, Finished)
        assert end.usage.kept_bytes == pipeline.card.vector_bytes > 0
