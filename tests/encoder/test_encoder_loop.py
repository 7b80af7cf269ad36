"""The vision loop: batches form while one runs, and one bad picture harms nobody else."""

import asyncio
import threading

import pytest

from omnilmm.config import EncoderConfig
from omnilmm.encoder.loop import EncoderLoop
from omnilmm.errors import DeadlineExceeded, OmniError, Overloaded, ReplicaLost
from omnilmm.messages import Embedding, PixelIdentity, PreparedImage
from omnilmm.observe import Silent


def picture(n: int) -> PreparedImage:
    return PreparedImage(PixelIdentity(bytes([n]) * 32, 1, 1), 1, bytes([n] * 3))


class FakeTower:
    """Answers with the picture's own byte; can be held at a gate; picture 13 raises, picture 14 is an error."""

    def __init__(self):
        self.batches = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, pictures):
        self.entered.set()
        self.gate.wait(10)
        numbers = [p.square[0] for p in pictures]
        self.batches.append(numbers)
        if 13 in numbers:
            raise RuntimeError("the tower fell")
        return [
            OmniError("not finite") if n == 14 else Embedding("float32", (1, 1), bytes([n, 0, 0, 0])) for n in numbers
        ]


@pytest.fixture
def tower():
    return FakeTower()


@pytest.fixture
def loop(tower):
    owner = EncoderLoop(tower, EncoderConfig(max_batch=4, max_queue=6), Silent())
    owner.start()
    yield owner
    tower.gate.set()
    owner.stop()


async def first_held(loop, tower):
    tower.gate.clear()
    first = asyncio.create_task(loop.encode(picture(1), timeout_s=10))
    await asyncio.to_thread(tower.entered.wait, 10)
    return first


async def test_a_batch_gathers_while_another_runs(loop, tower):
    first = await first_held(loop, tower)
    others = [asyncio.create_task(loop.encode(picture(n), timeout_s=10)) for n in range(2, 7)]
    await asyncio.sleep(0)
    tower.gate.set()
    results = await asyncio.gather(first, *others)
    assert [r.data[0] for r in results] == [1, 2, 3, 4, 5, 6]
    assert tower.batches == [[1], [2, 3, 4, 5], [6]]
    assert (loop.stats().num_pictures, loop.stats().num_batches, loop.stats().num_waiting) == (6, 3, 0)


@pytest.mark.parametrize("bad", [13, 14])
async def test_one_bad_picture_fails_alone(loop, tower, bad):
    first = await first_held(loop, tower)
    tasks = [asyncio.create_task(loop.encode(picture(n), timeout_s=10)) for n in (5, bad, 6)]
    await asyncio.sleep(0)
    tower.gate.set()
    good_before, failed, good_after = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    assert isinstance(failed, OmniError)
    assert (good_before.data[0], good_after.data[0]) == (5, 6)


async def test_a_lone_picture_starts_at_once(loop, tower):
    """No timer: nothing but the tower itself stands between a picture and its vectors."""
    for n in range(5):
        await loop.encode(picture(n), timeout_s=10)
    assert tower.batches == [[0], [1], [2], [3], [4]]


async def test_pictures_go_one_by_one_where_a_batch_was_seen_to_save_nothing(loop, tower):
    for size in (1, 2, 4):
        loop._sizes.note(size, 1000.0 * size)
    first = await first_held(loop, tower)
    others = [asyncio.create_task(loop.encode(picture(n), timeout_s=10)) for n in (2, 3, 4)]
    await asyncio.sleep(0)
    tower.gate.set()
    await asyncio.gather(first, *others)
    assert tower.batches == [[1], [2], [3], [4]]


async def test_a_full_queue_refuses(loop, tower):
    first = await first_held(loop, tower)
    waiting = [asyncio.create_task(loop.encode(picture(2), timeout_s=10)) for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refusal:
        await loop.encode(picture(3), timeout_s=10)
    assert refusal.value.retry_after
    tower.gate.set()
    await asyncio.gather(first, *waiting)


async def test_a_cancelled_or_late_picture_is_never_encoded(loop, tower):
    first = await first_held(loop, tower)
    cancelled = asyncio.create_task(loop.encode(picture(7), timeout_s=10))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(DeadlineExceeded):
        await loop.encode(picture(8), timeout_s=0.01)
    tower.gate.set()
    await first
    await loop.encode(picture(9), timeout_s=10)
    assert tower.batches == [[1], [9]]


async def test_stopping_finishes_what_waits_and_refuses_what_comes(tower):
    owner = EncoderLoop(tower, EncoderConfig(), Silent())
    owner.start()
    first = await first_held(owner, tower)
    second = asyncio.create_task(owner.encode(picture(2), timeout_s=10))
    await asyncio.sleep(0)
    tower.gate.set()
    await asyncio.to_thread(owner.stop)
    assert [r.data[0] for r in await asyncio.gather(first, second)] == [1, 2]
    with pytest.raises(ReplicaLost):
        await owner.encode(picture(3), timeout_s=10)
    assert not owner.is_healthy
