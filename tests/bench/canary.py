"""Whether pictures hold up the router's event loop: a canary that wants to run every 5 ms, alone and among pictures.

    python tests/bench/canary.py [--rate 200] [--seconds 10] [--workers 1]

Pictures (JPEG, 640 x 480) arrive as data URIs at a fixed rate, whatever becomes of them, and go the way of a request:
parsed, digested, checked by their headers, decoded in a child process. What the decode queue refuses is counted: a
refusal is an answer too. The goal is a p99 of the canary below three times the p99 without pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from collections import Counter

from multiturn import picture

from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import OmniError
from omnilmm.image.pool import DecodePool
from omnilmm.image.source import check_picture, read_image_url

EVERY_S = 0.005
POLICY = ImagePolicy(448, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LIMITS = ImageLimits()


async def sing(seconds: float) -> list[float]:
    """How late each turn of the canary was, in milliseconds, in order of size."""
    late = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        due = time.perf_counter() + EVERY_S
        await asyncio.sleep(EVERY_S)
        late.append(1000 * (time.perf_counter() - due + EVERY_S))
    return sorted(late)


async def arrive(pool: DecodePool, urls: list[str], rate: float, seconds: float) -> Counter[str]:
    fates: Counter[str] = Counter()

    async def take(url: str) -> None:
        try:
            data = read_image_url(url, param="", limits=LIMITS)
            hashlib.sha256(data).digest()
            check_picture(data, LIMITS)
            await pool.prepare(data, policy=POLICY, param="")
            fates["decoded"] += 1
        except OmniError as error:
            fates[type(error).__name__] += 1

    async with asyncio.TaskGroup() as group:
        begun = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
            group.create_task(take(urls[number % len(urls)]))
    return fates


async def measure(options: argparse.Namespace) -> None:
    urls = [picture(number) for number in range(50)]
    async with DecodePool(LIMITS, num_workers=options.workers) as pool:
        alone = await sing(options.seconds)
        among, fates = await asyncio.gather(sing(options.seconds), arrive(pool, urls, options.rate, options.seconds))
    print(f"canary every {1000 * EVERY_S:.0f} ms, {options.workers} decode workers")
    for name, turns in (("alone", alone), (f"{options.rate:.0f} pictures/s", among)):
        p50, p99 = turns[len(turns) // 2], turns[int(0.99 * len(turns))]
        print(f"{name:16} p50 {p50:6.2f} ms   p99 {p99:6.2f} ms   longest {turns[-1]:6.2f} ms")
    print(f"p99 ratio {among[int(0.99 * len(among))] / alone[int(0.99 * len(alone))]:.2f}    {dict(fates)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--workers", type=int, default=1)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
