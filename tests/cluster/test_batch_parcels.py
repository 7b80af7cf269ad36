"""What is packed into a parcel, and what is handed out of it again."""

import io

import pytest
from PIL import Image

from cluster.batch_parcels import (
    Carried,
    CarriedPixels,
    CarriedVectors,
    Made,
    Opened,
    digest_of,
    embedding_of,
    file_name,
    pack,
    shorten,
)
from omnilmm.batch.order import Place
from omnilmm.batch.sources import CHAT, Row
from omnilmm.cache.store import open_store
from omnilmm.config import CacheConfig, ImagePolicy
from omnilmm.errors import ImageError, NotFound, ReplicaLost
from omnilmm.gathering import Picture
from omnilmm.messages import Embedding, ImagePart, PixelIdentity
from omnilmm.observe import Silent
from omnilmm.pipeline import SystemClock

CAT, DOG, BROKEN = b"a cat's file", b"a dog's file", b"no picture at all"
POLICY = ImagePolicy(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def made(data, key):
    picture = Picture(ImagePart(data, ""), PixelIdentity(digest_of(data)[::-1], 8, 6), key=key, encode_s=0.25)
    return Made(picture, Embedding("float32", (2, 3), key.encode() * 4))


MADE = {digest_of(CAT): made(CAT, "cat..."), digest_of(DOG): made(DOG, "dog...")}


def opened(number, *files):
    return Opened(Row(number, f"r{number}", CHAT, Place(b"", b"", b"", ""), dict), b"{}", files)


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def carried():
    return Carried()


@pytest.fixture
async def store():
    opened = open_store(CacheConfig(), secret=bytes(32), observer=Silent(), clock=SystemClock(), sole=True)
    yield opened
    opened.check_integrity()
    await opened.aclose()


def test_a_parcel_holds_what_its_lines_need_and_nothing_twice():
    parcel = pack([opened(1, CAT), opened(2, CAT, BROKEN)], MADE, {"cat..."})
    assert [line["number"] for line in parcel["lines"]] == [1, 2]
    assert [file["data"] for file in parcel["files"]] == [CAT, BROKEN]
    assert [picture["file"] for picture in parcel["pictures"]] == [digest_of(CAT)]
    (vector,) = parcel["vectors"]
    assert (vector["key"], vector["is_fresh"], vector["seconds"]) == ("cat...", True, 0.25)
    assert embedding_of(vector) == MADE[digest_of(CAT)].embedding


def test_vectors_that_went_with_an_earlier_parcel_are_not_fresh():
    (vector,) = pack([opened(1, CAT)], MADE, frozenset())["vectors"]
    assert not vector["is_fresh"]


def test_files_of_one_picture_share_its_vectors():
    same = MADE | {digest_of(BROKEN): MADE[digest_of(CAT)]}
    parcel = pack([opened(1, CAT, BROKEN)], same, set())
    assert (len(parcel["files"]), len(parcel["pictures"]), len(parcel["vectors"])) == (2, 2, 1)


async def test_files_are_there_while_their_parcel_is(carried):
    parcel, same, other = (pack([opened(i, data)], MADE, set()) for i, data in enumerate((CAT, CAT, DOG)))
    with carried.holding(parcel):
        with carried.holding(same), carried.holding(other):
            assert await carried.read("anyone", file_name(DOG)) == DOG
        assert await carried.read("anyone", file_name(CAT)) == CAT
        with pytest.raises(NotFound):
            await carried.read("anyone", file_name(DOG))
    with pytest.raises(NotFound):
        await carried.read("anyone", file_name(CAT))
    assert carried.try_vector("cat...") is None
    assert carried.try_identity(CAT) is None


async def test_what_a_picture_shows_is_known_without_its_pixels(carried):
    pixels = CarriedPixels(carried)
    with carried.holding(pack([opened(1, CAT, BROKEN)], MADE, set())):
        prepared = await pixels.prepare(CAT, policy=POLICY, param="p")
        assert prepared.identity == MADE[digest_of(CAT)].picture.identity
        with pytest.raises(ImageError):
            await pixels.prepare(BROKEN, policy=POLICY, param="p")
        decoded = await pixels.prepare(png(), policy=POLICY, param="p")
    assert (decoded.identity.width, len(decoded.square)) == (8, 28 * 28 * 3)


@pytest.mark.parametrize("by_value", [False, True])
async def test_vectors_come_out_of_the_parcel(carried, store, by_value):
    vectors = CarriedVectors(carried, store)
    wanted = MADE[digest_of(CAT)].embedding
    with carried.holding(pack([opened(1, CAT)], MADE, {"cat..."})):
        encoded = await vectors.encode(None, key="cat...", by_value=by_value, timeout_s=1.0)
        assert (encoded.embedding, encoded.seconds) == (wanted if by_value else None, 0.25)
        assert await store.get("cat...") == wanted
        with pytest.raises(ReplicaLost):
            await vectors.encode(None, key="dog...", by_value=by_value, timeout_s=1.0)


def test_only_references_are_shortened():
    body = {"messages": [{"content": [{"text": "u"}, {"image_url": {"url": "u", "detail": "u"}}, {"image_url": "u"}]}]}
    (message,) = shorten(body, {"u": "file-1"})["messages"]
    assert message["content"] == [
        {"text": "u"},
        {"image_url": {"url": "file-1", "detail": "u"}},
        {"image_url": "file-1"},
    ]
