"""Adapters through the whole engine: the merged model's tokens, whatever else is in a step."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilmm.config import EngineConfig
from omnilmm.engine.engine import Engine
from omnilmm.engine.loop import EngineLoop
from omnilmm.engine.runner import ModelRunner
from omnilmm.engine.shelf import RETRY_BROKEN_S, AdapterShelf
from omnilmm.errors import NotFound, OmniError, Overloaded
from omnilmm.messages import GenerateCall, Prompt, Sampling
from omnilmm.models.adapter_files import CONFIG_FILE, AdapterCatalog, AdapterWeights, read_adapter
from omnilmm.models.adapters import AdapterPool
from omnilmm.models.config import read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.weights import load_language_model
from omnilmm.training.config import LoraConfig
from omnilmm.training.lora import Adapter

DATA = Path(__file__).parents[1] / "data"
FAMILIES = ["omnilmm-12b-tiny", "minicpm-v-tiny"]
NAMES = ("a", "b", "c")
RANK, TOKENS = 3, 12
CONFIG = EngineConfig(num_blocks=64, block_size=4, max_step_tokens=48, max_sequences=8, max_context=128)


def make_adapter(folder: Path, name: str) -> Adapter:
    torch.manual_seed(ord(name[0]))
    adapter = Adapter(read_model_config(folder), LoraConfig(r=RANK, lora_alpha=9.0))
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.3)
    return adapter.requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return DATA / request.param


@pytest.fixture
def shelved(folder: Path, tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).mkdir()
        make_adapter(folder, name).save(tmp_path / name, base="")
    return tmp_path


def ask(prompt: int, adapter: str | None = None, **fields: Any) -> GenerateCall:
    ids = tuple(5 + (17 * prompt + 7 * index) % 90 for index in range(9 + prompt))
    return GenerateCall("r", Prompt(ids, (), ()), (), Sampling(max_tokens=TOKENS), adapter=adapter, **fields)


@cache
def merged(folder: Path, name: str | None) -> LanguageModel:
    model = load_language_model(folder, read_model_config(folder), dtype="float32")
    if name is not None:
        make_adapter(folder, name).merge_into(model)
    return model


def expected(folder: Path, call: GenerateCall, name: str | None) -> tuple[int, ...]:
    """What the merged model says, in an engine of its own without adapters."""
    engine = Engine(ModelRunner(merged(folder, name), CONFIG), CONFIG)
    engine.submit(replace(call, adapter=None))
    ids: list[int] = []
    while not engine.is_empty:
        for output in engine.step():
            ids += output.batch.ids  # type: ignore[union-attr]
    return tuple(ids)


class House:
    """A loop with a shelf over one folder."""

    def __init__(self, folder: Path, shelved: Path, *, max_loaded: int = 3, num_ranks: int = 9, **room: int) -> None:
        config = read_model_config(folder)
        model = load_language_model(folder, config, dtype="float32")
        self.now = 100.0
        self.reads: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.pool = AdapterPool(model, config, num_ranks=num_ranks)
        read = partial(read_adapter, config=config, max_rank=4, dtype=torch.float32)

        def noted(place: Path) -> AdapterWeights:
            assert self.may_read.wait(30)
            self.reads.append(place.name)
            return read(place)

        self.shelf = AdapterShelf(AdapterCatalog(shelved), noted, self.pool, max_loaded=max_loaded, clock=self)
        engine_config = CONFIG.resolve(**room)
        self.engine = Engine(ModelRunner(model, engine_config, adapters=self.pool), engine_config)
        self.loop = EngineLoop(self.engine, adapters=self.shelf)

    def monotonic(self) -> float:
        return self.now

    async def answer(self, call: GenerateCall) -> tuple[int, ...]:
        ids: list[int] = []
        async with aclosing(self.loop.generate(call, fetch=_never)) as batches:
            async for batch in batches:
                ids += batch.ids
        return tuple(ids)

    async def settle(self) -> None:
        """Until the thread has let go of everything that has ended."""
        assert await self.loop.drain(30)

    def close(self) -> None:
        self.may_read.set()
        self.loop.stop()
        assert self.shelf.num_users == 0
        self.shelf.check_integrity()


async def _never(key: str) -> None:
    raise AssertionError("there is no picture")


@pytest.fixture
def house(folder: Path, shelved: Path) -> Iterator[House]:
    house = House(folder, shelved)
    house.loop.start()
    yield house
    house.close()


async def test_mixed_in_one_batch_each_has_its_merged_model_s_tokens(house: House, folder: Path) -> None:
    calls = [ask(prompt, name) for prompt in (0, 1) for name in (None, *NAMES)]
    answers = await asyncio.gather(*map(house.answer, calls))
    assert list(answers) == [expected(folder, call, call.adapter) for call in calls]
    assert len(set(answers[:4])) == 4  # or nothing was tested
    assert sorted(house.reads) == [*NAMES]


async def test_preempted_and_resumed_they_go_on_with_the_same_tokens(folder: Path, shelved: Path) -> None:
    house = House(folder, shelved, num_blocks=12)
    house.loop.start()
    calls = [ask(prompt, name) for prompt in (0, 1, 2) for name in ("a", None, "b")]
    whole = [expected(folder, call, call.adapter) for call in calls]
    answers = await asyncio.gather(*map(house.answer, calls))
    assert house.loop.stats().num_preemptions > 0
    assert list(answers) == whole
    resumed = replace(calls[0], emitted=whole[0][:5])
    assert await house.answer(resumed) == whole[0][5:]
    house.close()


async def test_more_adapters_than_room_take_turns(folder: Path, shelved: Path) -> None:
    house = House(folder, shelved, max_loaded=1, num_ranks=RANK)
    house.loop.start()
    for name in ("a", "b", "a", "c", "a", "a"):
        assert await house.answer(ask(0, name)) == expected(folder, ask(0), name)
    assert house.reads == ["a", "b", "a", "c", "a"]
    house.close()


async def test_one_in_use_is_never_put_away(folder: Path, shelved: Path) -> None:
    house = House(folder, shelved, max_loaded=1)
    held = house.shelf.admit("a", read_a(folder, shelved), house.shelf.take_room(RANK))
    house.loop.start()
    with pytest.raises(Overloaded):
        await house.answer(ask(0, "b"))
    assert house.shelf.names() == ("a",)
    house.shelf.release(held)
    assert await house.answer(ask(0, "b")) == expected(folder, ask(0), "b")
    house.close()


def read_a(folder: Path, shelved: Path) -> AdapterWeights:
    return read_adapter(shelved / "a", read_model_config(folder), max_rank=4, dtype=torch.float32)


async def test_an_unknown_one_is_not_found(house: House, folder: Path) -> None:
    for name in ("d", "../a", "a/", "a@" + "0" * 16, ""):
        with pytest.raises(NotFound) as caught:
            await house.answer(ask(0, name))
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert await house.answer(ask(0)) == expected(folder, ask(0), None)


async def test_a_broken_one_is_told_to_the_operator_alone(
    house: House, folder: Path, shelved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = (shelved / "b" / CONFIG_FILE).read_text()
    (shelved / "b" / CONFIG_FILE).write_text(good.replace('"r": 3', '"r": 1000000'))
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            with pytest.raises(OmniError) as caught:
                await house.answer(ask(0, "b"))
            assert caught.value.status == 500
    assert [record.getMessage() for record in caplog.records] == [
        f"the adapter b cannot be used: The adapter's {CONFIG_FILE}: r must be from 1 to 4."
    ]
    assert await house.answer(ask(0, "a")) == expected(folder, ask(0), "a")
    (shelved / "b" / CONFIG_FILE).write_text(good)
    house.now += RETRY_BROKEN_S
    assert await house.answer(ask(0, "b")) == expected(folder, ask(0), "b")


async def test_a_changed_one_shares_no_block_with_what_it_was(folder: Path, shelved: Path) -> None:
    house = House(folder, shelved, max_loaded=1)
    house.loop.start()
    assert await house.answer(ask(0, "a")) == expected(folder, ask(0), "a")
    make_adapter(folder, "b").save(shelved / "a", base="")
    await house.answer(ask(0, "c"))  # puts it away
    assert await house.answer(ask(0, "a")) == expected(folder, ask(0), "b")
    house.close()


async def test_a_caller_that_leaves_while_it_is_read_holds_nothing(house: House, folder: Path) -> None:
    house.may_read.clear()
    leaving = asyncio.create_task(house.answer(ask(0, "a")))
    await asyncio.sleep(0)
    others = house.answer(ask(0))
    assert await others == expected(folder, ask(0), None)  # steps go on while an adapter is read
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    house.may_read.set()
    assert await house.answer(ask(0, "a")) == expected(folder, ask(0), "a")


async def test_without_a_shelf_there_are_no_adapters(folder: Path) -> None:
    loop = EngineLoop(Engine(ModelRunner(merged(folder, None), CONFIG), CONFIG))
    loop.start()
    with pytest.raises(NotFound):
        await anext(loop.generate(ask(0, "a"), fetch=_never))
    loop.stop()
