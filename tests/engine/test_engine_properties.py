"""Whatever happens to an engine, its books are right and every sequence says what it would say alone (float32).

60 examples by default, always the same; `pytest tests/engine --hypothesis-profile=thorough` runs 2,000 random ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
from engine_fakes import (
    CONFIG,
    ComesLate,
    Driver,
    lone_run,
    make_call,
    make_driver,
    make_ids,
    make_model,
    make_vectors,
)
from grammar_fakes import ANY_OBJECT, RECORD, formed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnilmm.config import EngineConfig
from omnilmm.errors import ContextLengthExceeded, Overloaded
from omnilmm.messages import GenerateCall, Priority, Sampling

IS_THOROUGH = settings.get_current_profile_name() == "thorough"
PREFIXES = [make_ids(14, seed) for seed in (100, 101)]
LENGTHS = {"a": 5, "b": 2}
SAMPLINGS = [
    Sampling(0),
    Sampling(0, temperature=1.0, seed=3),
    Sampling(0, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.3, seed=4),
    Sampling(0, repetition_penalty=1.3, stop_ids=(7, 19, 23, 42), min_tokens=2, frequency_penalty=0.2),
    formed(RECORD, temperature=1.0, top_p=0.9, seed=6),
    formed(ANY_OBJECT, repetition_penalty=1.2, min_tokens=3),
]


@dataclass(frozen=True)
class Submit:
    call: GenerateCall
    with_vectors: bool


@dataclass(frozen=True)
class Abort:
    index: int


@dataclass(frozen=True)
class Supply:
    """Hand over one of the pictures that a sequence has asked for."""

    index: int


@dataclass(frozen=True)
class Steps:
    count: int


@dataclass(frozen=True)
class Yield:
    """A step during which a tenant is about to come, before the n-th layer: given up if it makes way for that one."""

    tenant: str
    num_asked: int


@st.composite
def calls(draw: st.DrawFn) -> GenerateCall:
    """Prompts that share beginnings, some with pictures in them, some half answered already."""
    prefix = draw(st.sampled_from(PREFIXES))[: draw(st.sampled_from([0, 5, 9, 14]))]
    tail = make_ids(draw(st.integers(1, 7)), draw(st.integers(0, 3)))
    num_tokens = len(prefix) + len(tail)
    pictures: list[tuple[str, int, int]] = []
    start = draw(st.integers(0, 4))
    while start < num_tokens - 1 and len(pictures) < 2 and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(LENGTHS)))
        if start + LENGTHS[key] < num_tokens:
            pictures.append((key, start, LENGTHS[key]))
        start += LENGTHS[key] + draw(st.integers(0, 3))
    call = make_call(
        (*prefix, *tail),
        max_tokens=draw(st.integers(1, 9)),
        pictures=pictures,
        sampling=draw(st.sampled_from(SAMPLINGS)),
        scope=draw(st.sampled_from(["x", "x", "x", "y"])),
        adapter=draw(st.sampled_from([None, None, None, "lora"])),
        tenant=draw(st.sampled_from("tuv")),
        weight=draw(st.sampled_from([1.0, 4.0])),
        priority=draw(st.sampled_from(Priority)),
    )
    num_emitted = draw(st.integers(0, 2))
    return replace(call, emitted=alone(call)[:num_emitted]) if num_emitted else call


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    return CONFIG.resolve(
        num_blocks=draw(st.integers(5, 24)),
        block_size=draw(st.integers(1, 6)),
        max_step_tokens=draw(st.sampled_from([1, 3, 8, 64])),
        max_sequences=draw(st.integers(1, 6)),
        max_waiting=draw(st.sampled_from([3, 64])),
    )


EVENTS = st.one_of(
    st.builds(Submit, calls(), st.booleans()),
    st.builds(Submit, calls(), st.just(True)),
    st.builds(Steps, st.integers(1, 6)),
    st.builds(Yield, st.sampled_from("tuv"), st.integers(1, 2)),
    st.builds(Abort, st.integers(0, 11)),
    st.builds(Supply, st.integers(0, 11)),
)


@cache
def alone(call: GenerateCall) -> tuple[int, ...]:
    return lone_run(the_model(), call)


@cache
def the_model():
    return make_model()


class Story:
    """Plays events on an engine and remembers what it must come to."""

    def __init__(self, config: EngineConfig) -> None:
        self.driver: Driver = make_driver(the_model(), config)
        self.calls: dict[int, GenerateCall] = {}
        self.supplied: dict[int, set[str]] = {}
        self.aborted: set[int] = set()

    def play(self, event: Submit | Abort | Supply | Steps | Yield) -> None:
        match event:
            case Submit(call, with_vectors):
                self.submit(call, with_vectors)
            case Abort(index) if index in self.calls:
                self.driver.engine.abort(index)
                self.driver.engine.check_integrity()
                self.aborted.add(index)
            case Supply(index) if index in self.calls:
                self.supply(index, at_most=1)
            case Steps(count):
                for _ in range(count):
                    self.driver.step()
            case Yield(tenant, num_asked):
                self.driver.step(ComesLate(make_call(4, tenant=tenant), num_asked=num_asked))

    def submit(self, call: GenerateCall, with_vectors: bool) -> None:
        bare = call if with_vectors else replace(call, images=tuple(replace(i, embedding=None) for i in call.images))
        try:
            sequence_id = self.driver.submit(bare)
        except (ContextLengthExceeded, Overloaded):
            return
        self.calls[sequence_id] = call
        self.supplied[sequence_id] = set()

    def supply(self, index: int, *, at_most: int = 99) -> None:
        waiting = [key for key in self.driver.answers[index].needed if key not in self.supplied[index]]
        for key in waiting[:at_most]:
            self.supplied[index].add(key)
            self.driver.engine.supply(index, key, make_vectors(key, LENGTHS[key]))

    def finish(self) -> None:
        """Supply what is asked for until nobody owes anything."""
        while True:
            self.driver.finish()
            before = {index: len(keys) for index, keys in self.supplied.items()}
            for index in self.calls:
                self.supply(index)
            if before == {index: len(keys) for index, keys in self.supplied.items()}:
                break

    def check(self) -> None:
        assert self.driver.engine.is_empty
        assert self.driver.engine.stats().blocks_used == 0
        for index, call in self.calls.items():
            answer = self.driver.answers[index]
            expected = alone(call)
            assert len(set(answer.needed)) == len(answer.needed), "a key was asked for twice"
            if index in self.aborted and answer.finish is None:
                assert answer.ids == expected[: len(answer.ids)]
            else:
                assert answer.finish is not None
                assert answer.ids == expected


@settings(
    max_examples=2000 if IS_THOROUGH else 60,
    derandomize=not IS_THOROUGH,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
@given(config=configs(), events=st.lists(EVENTS, min_size=4, max_size=24))
def test_books_are_right_and_tokens_exact(config, events):
    story = Story(config)
    for event in events:
        story.play(event)
    story.finish()
    story.check()


@pytest.mark.parametrize("num_blocks", [6, 9])
def test_the_story_teller_sees_pressure(num_blocks):
    """The property is worth something: such stories do preempt, share and wait for pictures."""
    story = Story(CONFIG.resolve(num_blocks=num_blocks, max_step_tokens=8))
    picture = {"pictures": [("a", 2, 5)], "max_tokens": 6}
    for seed in range(4):
        story.submit(make_call((*PREFIXES[0][:9], *make_ids(3, seed)), **picture), with_vectors=seed % 2 == 0)
    story.finish()
    story.check()
    stats = story.driver.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.cached_tokens > 0
    assert any(story.supplied.values())
