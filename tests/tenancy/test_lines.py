"""Lines in front of decoders: refused at the door what they would refuse, and what they refused a moment ago."""

from contextlib import ExitStack

import pytest

from omnilmm.errors import Overloaded, QueueFull
from omnilmm.messages import Priority
from omnilmm.observe import RequestFinished
from omnilmm.tenancy import lines as lines_module
from omnilmm.tenancy.lines import Lines
from omnilmm.tenancy.places import ENDS_PER_S, MAX_LASTS_S

ONLINE, BATCH = Priority.ONLINE, Priority.BATCH


class Heard:
    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    lines = Lines(Heard(), clock=clock)
    lines.resize({"m": 9, "other": 9})
    yield lines
    lines.check_integrity()


def fill(lines: Lines, held: ExitStack, tenant: str = "a", model: str = "m", priority: Priority = ONLINE) -> int:
    """Enter as often as one may."""
    for count in range(5000):
        try:
            held.enter_context(lines.enter(tenant, model, priority))
        except QueueFull:
            return count
    raise AssertionError("there is no bound")


def refused_by_decoder(lines: Lines, tenant: str = "a", model: str = "m", priority: Priority = ONLINE) -> QueueFull:
    full = QueueFull("The decode queue is full.", retry_after=1.0)
    with pytest.raises(QueueFull) as seen, lines.enter(tenant, model, priority):
        raise full
    assert seen.value is full
    return full


def test_a_line_is_shared_by_the_rule_of_places(lines):
    with ExitStack() as held:
        assert [fill(lines, held, tenant) for tenant in "abc"] == [6, 2, 1]
    with ExitStack() as held:
        assert fill(lines, held) == 6, "whoever left has given back what it held"


def test_models_and_classes_have_lines_of_their_own_and_adapters_their_bases(lines):
    with ExitStack() as held:
        assert fill(lines, held, model="m:adapter") == 6
        assert fill(lines, held, model="m") == 0
        assert fill(lines, held, model="other") == 6
        assert fill(lines, held, priority=BATCH) == 6


def test_what_a_decoder_said_is_remembered_for_that_tenant_and_line_alone(lines, clock):
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(lines.enter("a", "m", ONLINE))
        full = refused_by_decoder(lines)
        assert full.lasts_s == pytest.approx(5 / ENDS_PER_S)
        clock.now += 0.4 * full.lasts_s
        with pytest.raises(QueueFull) as again, lines.enter("a", "m:adapter", ONLINE):
            pass
        assert again.value.lasts_s == pytest.approx(0.6 * full.lasts_s), "repeating it makes it no longer"
        for tenant, model, priority in (("b", "m", ONLINE), ("a", "other", ONLINE), ("a", "m", BATCH)):
            with lines.enter(tenant, model, priority):
                pass
        clock.now += 0.61 * full.lasts_s
        with lines.enter("a", "m", ONLINE):
            pass


def test_no_refusal_lasts_longer_than_the_most(clock):
    lines = Lines(Heard(), clock=clock)
    lines.resize({"m": 3000})
    with ExitStack() as held:
        assert fill(lines, held) == 2000
        with pytest.raises(QueueFull) as full, lines.enter("a", "m", ONLINE):
            pass
        assert full.value.lasts_s == MAX_LASTS_S


def test_other_failures_are_not_remembered(lines):
    for failure in (Overloaded("busy", retry_after=1.0), KeyError()):
        with pytest.raises(type(failure)), lines.enter("a", "m", ONLINE):
            raise failure
    with lines.enter("a", "m", ONLINE):
        pass


def test_a_line_of_another_size_begins_anew_and_the_others_stay(lines):
    with ExitStack() as held:
        assert fill(lines, held) == 6
        assert fill(lines, held, model="other") == 6
        lines.resize({"m": 3, "other": 9})
        assert fill(lines, held) == 2
        assert fill(lines, held, model="other") == 0


def test_memory_is_bounded(lines, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_REMEMBERED", 3)
    for tenant in "abcde":
        refused_by_decoder(lines, tenant)
    lines.check_integrity()
    with lines.enter("a", "m", ONLINE):
        pass
    with pytest.raises(QueueFull), lines.enter("e", "m", ONLINE):
        pass


def test_refusals_at_the_door_are_counted_as_others_are():
    heard = Heard()
    Lines(heard).note_refused("m", 0.25)
    assert heard.events == [RequestFinished("m", 503, 0.25, None, 0, 0, 0, 0.0)]
