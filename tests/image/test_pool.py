"""The decode pool under everything that can happen to a child process."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from picture_files import encode, exif_block, photo, png_header
from PIL import Image

from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import ImageError, Overloaded, PayloadTooLarge, StartupError
from omnilmm.image import jpeg
from omnilmm.image.pool import DecodePool, InlinePreparer
from omnilmm.image.process import DecodeProcess
from omnilmm.image.transform import prepare
from omnilmm.messages import PreparedImage
from omnilmm.ports import ImagePreparer

LIMITS = ImageLimits()
PICTURE = encode(photo(30, 20), "PNG")


@pytest.fixture
async def pool() -> AsyncIterator[DecodePool]:
    """One worker, so that everybody meets it."""
    async with DecodePool(LIMITS, num_workers=1, max_queue=4) as pool:
        yield pool
        pids = pool.worker_pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture(scope="module")
def slow() -> bytes:
    """Row I19: few bytes, many passes over all pixels."""
    plain = encode(Image.new("L", (4000, 4000), 77), "JPEG", progressive=True)
    last = [segment for segment in jpeg.segments(plain) if segment.marker == 0xDA][-1]
    return plain[: last.end] + plain[last.start : last.end] * 50 + plain[last.end :]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.001)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The worker hangs: it neither reads nor answers, but lives."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)


def submit(pool: ImagePreparer, policy: ImagePolicy, data: bytes = PICTURE) -> asyncio.Task[PreparedImage]:
    return asyncio.create_task(pool.prepare(data, policy=policy, param="p"))


async def in_work(pool: DecodePool, policy: ImagePolicy, data: bytes = PICTURE) -> asyncio.Task[PreparedImage]:
    """A call whose picture a worker has taken."""
    call = submit(pool, policy, data)
    await asyncio.sleep(0)
    await until(lambda: pool.num_waiting == 0)
    return call


async def test_both_preparers_give_what_the_functions_give(pool: DecodePool, safe: ImagePolicy) -> None:
    expected = prepare(PICTURE, policy=safe, limits=LIMITS, param="p")
    for preparer in (pool, InlinePreparer(LIMITS)):
        assert await submit(preparer, safe) == expected
        for data, code in ((png_header(30, 20), "image_parse_error"), (b"junk", "invalid_image_format")):
            with pytest.raises(ImageError) as refusal:
                await preparer.prepare(data, policy=safe, param="messages[2]")
            assert (refusal.value.code, refusal.value.param) == (code, "messages[2]")
        assert await submit(preparer, safe) == expected


async def test_a_picture_may_come_back_turned(pool: DecodePool, safe: ImagePolicy) -> None:
    data = encode(photo(30, 20), "JPEG", exif=b"Exif\0\0" + exif_block(6))
    answer = await pool.prepare(data, policy=safe, param="p")
    assert (answer.identity.width, answer.identity.height) == (20, 30)


async def test_a_header_is_refused_without_a_worker(safe: ImagePolicy) -> None:
    pool = DecodePool(LIMITS)
    for data in (b"", b"junk", png_header(50_000, 50_000)):
        with pytest.raises(ImageError):
            await pool.prepare(data, policy=safe, param="p")
    with pytest.raises(PayloadTooLarge):
        await pool.prepare(b"\xff\xd8\xff" + bytes(LIMITS.max_file_bytes), policy=safe, param="p")
    assert pool.worker_pids == ()
    await pool.close()


async def test_it_starts_with_the_first_picture(safe: ImagePolicy) -> None:
    pool = DecodePool(LIMITS, num_workers=2)
    assert pool.worker_pids == ()
    await asyncio.gather(*(submit(pool, safe) for _ in range(5)))
    assert len(set(pool.worker_pids)) == 2
    await pool.start()  # a second time does nothing
    assert len(set(pool.worker_pids)) == 2
    await pool.close()
    assert pool.worker_pids == ()


async def test_many_at_once_get_their_own_pictures(safe: ImagePolicy) -> None:
    files = [encode(photo(20 + index, 15 + index % 7), "PNG") for index in range(60)]
    async with DecodePool(LIMITS, num_workers=2, max_queue=60) as pool:
        answers = await asyncio.gather(*(submit(pool, safe, data) for data in files))
    assert answers == [prepare(data, policy=safe, limits=LIMITS, param="p") for data in files]


async def test_a_hanging_worker_is_killed_and_replaced(safe: ImagePolicy) -> None:
    async with DecodePool(LIMITS.resolve(decode_timeout_s=0.2), num_workers=1) as pool:
        (pid,) = pool.worker_pids
        with stopped(pid):
            with pytest.raises(ImageError) as refusal:
                await pool.prepare(PICTURE, policy=safe, param="p")
            assert (refusal.value.code, refusal.value.param) == ("image_parse_error", "p")
            await until(lambda: len(pool.worker_pids) == 1 and pool.worker_pids != (pid,))
            assert not psutil.pid_exists(pid)


async def test_a_picture_that_takes_too_long(slow: bytes, safe: ImagePolicy) -> None:
    async with DecodePool(LIMITS.resolve(decode_timeout_s=0.1), num_workers=1) as pool:
        (pid,) = pool.worker_pids
        with pytest.raises(ImageError) as refusal:
            await pool.prepare(slow, policy=safe, param="p")
        assert refusal.value.code == "image_parse_error"
        await until(lambda: not psutil.pid_exists(pid))


async def test_a_worker_that_dies_costs_one_call_only(pool: DecodePool, safe: ImagePolicy) -> None:
    (pid,) = pool.worker_pids
    with stopped(pid):
        victim = await in_work(pool, safe)
        waiting = submit(pool, safe)
        await until(lambda: pool.num_waiting == 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ImageError) as refusal:
            await victim
        assert refusal.value.code == "image_parse_error"
        assert await waiting == prepare(PICTURE, policy=safe, limits=LIMITS, param="p")
    assert pool.worker_pids != (pid,)


async def test_a_worker_that_died_idle_costs_nothing(pool: DecodePool, safe: ImagePolicy) -> None:
    (pid,) = pool.worker_pids
    os.kill(pid, signal.SIGKILL)
    await until(lambda: pool.worker_pids == ())
    assert await submit(pool, safe)
    assert pool.worker_pids not in ((), (pid,))


async def test_a_caller_that_leaves_is_let_go_at_once(pool: DecodePool, safe: ImagePolicy) -> None:
    with stopped(pool.worker_pids[0]):
        call = await in_work(pool, safe)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    # The worker goes on, finishes the picture nobody wants, and the next answer is the next picture's.
    other = encode(photo(9, 9), "PNG")
    assert await submit(pool, safe, other) == prepare(other, policy=safe, limits=LIMITS, param="p")


async def test_a_picture_nobody_waits_for_does_not_keep_a_worker(pool: DecodePool, safe: ImagePolicy) -> None:
    (pid,) = pool.worker_pids
    with stopped(pid):
        call = await in_work(pool, safe)
        call.cancel()
        assert await submit(pool, safe)  # long before decode_timeout_s
        assert pool.worker_pids != (pid,)


async def test_waiting_calls_that_leave_are_skipped(pool: DecodePool, slow: bytes, safe: ImagePolicy) -> None:
    (pid,) = pool.worker_pids
    with stopped(pid):
        first = await in_work(pool, safe)
        waiting = [submit(pool, safe, slow) for _ in range(3)]
        await until(lambda: pool.num_waiting == 3)
        for call in waiting:
            call.cancel()
    assert await first
    assert await submit(pool, safe)
    assert pool.worker_pids == (pid,)  # none of the slow ones was begun and given up


async def test_callers_that_come_and_go_never_mix_answers(safe: ImagePolicy) -> None:
    dice = random.Random(7)
    files = [encode(photo(40 + index, 30), "PNG") for index in range(80)]
    async with DecodePool(LIMITS, num_workers=2, max_queue=80) as pool:
        calls = [submit(pool, safe, data) for data in files]
        for call in dice.sample(calls, 40):
            await asyncio.sleep(dice.choice((0, 0.001)))
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for data, outcome in zip(files, outcomes, strict=True):
        assert isinstance(outcome, asyncio.CancelledError) or outcome == prepare(
            data, policy=safe, limits=LIMITS, param="p"
        )
    assert sum(isinstance(outcome, PreparedImage) for outcome in outcomes) >= 40


async def test_the_queue_is_bounded(pool: DecodePool, safe: ImagePolicy) -> None:
    with stopped(pool.worker_pids[0]):
        calls = [await in_work(pool, safe), *(submit(pool, safe) for _ in range(4))]
        await until(lambda: pool.num_waiting == 4)
        with pytest.raises(Overloaded) as refusal:
            await pool.prepare(PICTURE, policy=safe, param="p")
        assert (refusal.value.status, refusal.value.retry_after) == (503, 1.0)
    assert len(await asyncio.gather(*calls)) == 5


async def test_closing_leaves_no_process_and_no_waiter(safe: ImagePolicy) -> None:
    before = set(psutil.Process().children())
    pool = DecodePool(LIMITS, num_workers=2)
    await pool.start()
    children = set(psutil.Process().children()) - before
    assert {child.pid for child in children} == set(pool.worker_pids)
    for child in children:
        child.suspend()
    calls = [submit(pool, safe) for _ in range(6)]
    await until(lambda: pool.num_waiting == 4)
    await pool.close()
    for call in calls:
        with pytest.raises(Overloaded):
            await call
    assert not any(child.is_running() for child in children)
    with pytest.raises(Overloaded):
        await pool.prepare(PICTURE, policy=safe, param="p")
    await pool.close()


async def test_a_caller_that_leaves_during_the_start(safe: ImagePolicy) -> None:
    before = set(psutil.Process().children())
    pool = DecodePool(LIMITS, num_workers=2)
    impatient = submit(pool, safe)
    await until(lambda: len(set(psutil.Process().children()) - before) > 0)
    impatient.cancel()
    assert await submit(pool, safe)
    assert len(set(psutil.Process().children()) - before) == 2
    await pool.close()
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize("leaving", [True, False])
async def test_a_start_that_half_fails(leaving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One child is ready, the other is not: neither may stay."""
    before = set(psutil.Process().children())
    pool = DecodePool(LIMITS, num_workers=2)
    start, calls = DecodeProcess.start, iter("ab")

    async def start_one_only(limits: ImageLimits) -> DecodeProcess:
        if next(calls) == "a":
            return await start(limits)
        await until(lambda: len(pool.worker_pids) == 1)
        if leaving:
            starting.cancel()
            await asyncio.sleep(600)
        raise StartupError("no")

    monkeypatch.setattr(DecodeProcess, "start", start_one_only)
    starting = asyncio.create_task(pool.start())
    with pytest.raises(asyncio.CancelledError if leaving else StartupError):
        await starting
    assert pool.worker_pids == ()
    assert set(psutil.Process().children()) <= before


async def test_children_that_cannot_start(monkeypatch: pytest.MonkeyPatch, safe: ImagePolicy) -> None:
    for executable in ("/bin/false", "/nonexistent/python"):
        monkeypatch.setattr(sys, "executable", executable)
        pool = DecodePool(LIMITS)
        with pytest.raises(StartupError):
            await pool.start()
        with pytest.raises(Overloaded):
            await pool.prepare(PICTURE, policy=safe, param="p")
        assert pool.worker_pids == ()
        await pool.close()


async def test_a_worker_that_cannot_be_replaced(
    pool: DecodePool, safe: ImagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    await until(lambda: pool.worker_pids == ())
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        with pytest.raises(Overloaded):
            await pool.prepare(PICTURE, policy=safe, param="p")
    assert await submit(pool, safe)


LIAR = """#!{python}
import struct, sys
def frame(text, payload=b"", claimed=None):
    size = len(payload) if claimed is None else claimed
    sys.stdout.buffer.write(struct.pack("<4sIQ", b"OLI1", len(text), size) + text + payload)
    sys.stdout.buffer.flush()
frame(b"{{}}")
sys.stdin.buffer.read(1)
{lie}
"""


@pytest.mark.parametrize(
    "lie",
    [
        "sys.stdout.buffer.write(b'x' * 1000)",
        "frame(b'{}', claimed=2**60)\nsys.stdin.buffer.read()",
        "frame(b'{}', bytes(32 * 32 * 3))",
        'frame(b\'{"code": "root", "message": "x"}\')',
        'frame(b\'{"digest": "%s", "width": 9, "height": 9}\' % (b"00" * 32), bytes(32 * 32 * 3))',
        "frame(b'[' * 4000)",
        "frame(b'{}', bytes(10), claimed=3072)",
    ],
)
async def test_a_child_that_lies_is_not_believed(
    lie: str, tmp_path: Path, safe: ImagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = tmp_path / "liar"
    liar.write_text(LIAR.format(python=sys.executable, lie=lie))
    liar.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(liar))
    async with DecodePool(LIMITS, num_workers=1) as pool:
        with pytest.raises(ImageError) as refusal:
            await pool.prepare(PICTURE, policy=safe, param="p")
    assert refusal.value.code == "image_parse_error"
    assert "too long" not in refusal.value.message  # it is found at once


ORPHANS = """
import asyncio, os, signal
from omnilmm.image import jpeg
from omnilmm.image.pool import DecodePool

async def main():
    async with DecodePool(num_workers=2) as pool:
        os.kill(pool.worker_pids[0], signal.SIGSTOP)  # this one cannot read the end of its pipe
        print(*pool.worker_pids, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal at the parent's death")
def test_no_orphan_outlives_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while any(is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
