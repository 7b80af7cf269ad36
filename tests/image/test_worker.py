"""The child process: what it loads, what it gives up, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict

import numpy as np
import psutil
import pytest
from picture_files import encode, photo, png_file, png_header

from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import ImageError
from omnilmm.image.process import DecodeProcess, ProcessLost
from omnilmm.image.transform import prepare

PICTURE = encode(photo(30, 20), "PNG")
SIZES = frozenset({(30, 20)})
LIMITS = ImageLimits(decode_memory_bytes=256 * 1024**2)


@pytest.fixture
async def child() -> AsyncIterator[DecodeProcess]:
    process = await DecodeProcess.start(LIMITS)
    yield process
    await process.close()


def test_it_loads_nothing_heavy() -> None:
    code = "import sys, omnilmm.image.worker; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "PIL" in loaded
    assert not {"torch", "numpy", "ray", "transformers", "pydantic", "asyncio", "pickle"} & set(loaded)


async def test_it_answers_like_the_functions_it_calls(child: DecodeProcess, safe: ImagePolicy) -> None:
    expected = prepare(PICTURE, policy=safe, limits=LIMITS, param="")
    assert await child.ask(PICTURE, safe, SIZES) == expected
    with pytest.raises(ImageError) as refusal:
        await child.ask(png_header(30, 20), safe, SIZES)
    assert refusal.value.code == "image_parse_error"
    assert await child.ask(PICTURE, safe, SIZES) == expected


async def test_a_big_file_goes_through(child: DecodeProcess, safe: ImagePolicy) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8)
    data = png_file(noise)
    assert len(data) > 17_000_000
    answer = await child.ask(data, safe, frozenset({(3000, 2000)}))
    assert answer == prepare(data, policy=safe, limits=LIMITS, param="")


async def test_what_it_gives_up(child: DecodeProcess, safe: ImagePolicy) -> None:
    await child.ask(PICTURE, safe, SIZES)
    process = psutil.Process(child.pid)
    assert process.rlimit(psutil.RLIMIT_AS) == (LIMITS.decode_memory_bytes,) * 2
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_NOFILE)[0] <= 64
    soft, _ = process.rlimit(psutil.RLIMIT_CPU)
    assert LIMITS.decode_timeout_s <= soft <= LIMITS.decode_timeout_s + 5
    assert process.num_fds() <= 8
    assert set(process.environ()) == {"PYTHONPATH"}
    # What a library prints must not get between the frames, nor into our logs.
    assert {os.readlink(f"/proc/{child.pid}/fd/{number}") for number in (1, 2)} == {os.devnull}


async def test_the_cpu_allowance_is_renewed(child: DecodeProcess, safe: ImagePolicy) -> None:
    """The limit counts from the child's start; without renewal an old child would die of it."""
    process = psutil.Process(child.pid)
    psutil.Process(child.pid).rlimit(psutil.RLIMIT_CPU, (3600, resource.RLIM_INFINITY))
    await child.ask(PICTURE, safe, SIZES)
    assert process.rlimit(psutil.RLIMIT_CPU)[0] < 3600


async def test_out_of_memory_is_an_answer(child: DecodeProcess, safe: ImagePolicy) -> None:
    with pytest.raises(ImageError) as refusal:
        await child.ask(png_file(np.zeros((6000, 6000, 1), np.uint8), colour=0), safe, frozenset({(6000, 6000)}))
    assert refusal.value.code == "image_too_large"
    assert await child.ask(PICTURE, safe, SIZES)


async def test_an_answer_of_another_size_is_not_believed(child: DecodeProcess, safe: ImagePolicy) -> None:
    with pytest.raises(ProcessLost):
        await child.ask(PICTURE, safe, frozenset({(31, 20)}))


async def test_a_dead_child_is_noticed(child: DecodeProcess, safe: ImagePolicy) -> None:
    assert child.is_alive
    psutil.Process(child.pid).kill()
    with pytest.raises(ProcessLost):
        await child.ask(PICTURE, safe, SIZES)
    async with asyncio.timeout(30):
        while child.is_alive:  # noqa: ASYNC110 - the kernel sets no event
            await asyncio.sleep(0.001)


def test_it_leaves_when_the_pipe_is_closed() -> None:
    command = [sys.executable, "-m", "omnilmm.image.worker", json.dumps(asdict(LIMITS)), str(psutil.Process().pid)]
    done = subprocess.run(command, input=b"half a head", capture_output=True, timeout=60, check=True)
    assert done.stdout.startswith(b"OLI1")
    assert done.stderr == b""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal at the parent's death")
def test_it_does_not_start_for_a_parent_that_is_gone() -> None:
    command = [sys.executable, "-m", "omnilmm.image.worker", json.dumps(asdict(LIMITS)), "1"]
    assert subprocess.run(command, input=b"", capture_output=True, timeout=60, check=False).returncode == 1


async def test_ctrl_c_is_for_the_parent_alone(child: DecodeProcess) -> None:
    assert os.getsid(child.pid) == child.pid
