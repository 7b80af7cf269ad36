"""Places: whoever comes late finds room, and nobody gets more than is left."""

import asyncio
from contextlib import ExitStack

import pytest

from omnilmm.errors import Overloaded, QueueFull
from omnilmm.tenancy.places import ENDS_PER_S, MAX_LASTS_S, Places


def fill(places: Places, tenant: str, held: ExitStack) -> int:
    """Take as many as there are to be had."""
    count = 0
    while True:
        try:
            held.enter_context(places.take(tenant))
        except Overloaded:
            return count
        count += 1


def test_one_tenant_gets_two_thirds_and_the_next_two_thirds_of_the_rest():
    places = Places(64)
    with ExitStack() as held:
        assert [fill(places, tenant, held) for tenant in "abcd"] == [43, 14, 5, 2]
        places.check_integrity()
    assert places.num_free == 64


@pytest.mark.parametrize("num_tenants", [1, 2, 8])
def test_in_the_long_run_the_greedy_have_equal_shares(num_tenants):
    places = Places(90)
    tenants = [f"tenant {i}" for i in range(num_tenants)]
    held = {tenant: ExitStack() for tenant in tenants}
    counts = dict.fromkeys(tenants, 0)
    for _ in range(400):  # each gives one back and takes what it can get, in turn
        for tenant in tenants:
            held[tenant].close()
            counts[tenant] = fill(places, tenant, held[tenant])
    assert max(counts.values()) - min(counts.values()) <= 2
    assert places.num_free >= 90 // (2 * num_tenants + 1) - 1  # for the next one to come
    for stack in held.values():
        stack.close()
    places.check_integrity()
    assert places.num_free == 90


def test_a_refusal_says_when_to_come_again():
    places = Places(1)
    with places.take("a"), pytest.raises(Overloaded) as refusal, places.take("b"):
        pass
    assert refusal.value.retry_after == 1
    with places.take("b"):
        assert places.num_free == 0


@pytest.mark.parametrize(("num_places", "seconds"), [(1, 0.0), (3, 2 / ENDS_PER_S), (3000, MAX_LASTS_S)])
def test_a_refusal_lasts_for_as_long_as_all_that_is_held_takes_to_end(num_places, seconds):
    places = Places(num_places)
    with ExitStack() as held:
        fill(places, "a", held)
        refused = "b" if num_places == 1 else "a"
        with pytest.raises(QueueFull) as full, places.take(refused):
            pass
    assert full.value.lasts_s == pytest.approx(seconds)


async def test_that_it_is_about_to_stop_is_no_full_queue():
    places = Places(8)
    await places.drain(0.0)
    with pytest.raises(Overloaded) as refusal, places.take("a"):
        pass
    assert not isinstance(refusal.value, QueueFull)


def test_a_place_is_given_back_however_the_answer_ends():
    places = Places(2)
    with pytest.raises(KeyError), places.take("a"):
        raise KeyError
    assert places.num_free == 2


async def test_drained_means_nobody_holds_any_and_nobody_gets_any():
    places = Places(8)
    with places.take("a"):
        assert not await places.drain(0.0)
        draining = asyncio.create_task(places.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded), places.take("b"):
            pass
        assert not draining.done()
    assert await draining
    assert await places.drain(60.0)
    assert places.is_closing
