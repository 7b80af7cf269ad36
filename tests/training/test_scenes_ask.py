"""Questions have one right answer, which is the one that is taught."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from omnilmm.training.scenes import Scene, Split, is_held_out
from omnilmm.training.scenes_ask import ask
from omnilmm.training.scenes_check import Exchange, Kind, is_right
from omnilmm.training.scenes_make import make_scene
from omnilmm.training.scenes_words import Language, named

TALKS = [
    (scene, talk)
    for index in range(500)
    for scene in (make_scene(Split.TRAIN, 3, index),)
    for talk in ask(scene, Split.TRAIN, 3, index, num=6)
]
EXCHANGES = [(scene, exchange) for scene, talk in TALKS for exchange in talk]


def of(kind: Kind) -> list[tuple[Scene, Exchange]]:
    return [(scene, exchange) for scene, exchange in EXCHANGES if exchange.kind is kind]


def test_the_same_questions_come_again() -> None:
    scene = make_scene(Split.TEST, 0, 1)
    assert ask(scene, Split.TEST, 0, 1, num=4) == ask(scene, Split.TEST, 0, 1, num=4)
    assert ask(scene, Split.TEST, 0, 1, num=4) != ask(scene, Split.TEST, 9, 1, num=4)


def test_the_answer_that_is_taught_is_right() -> None:
    wrong = [exchange for _, exchange in EXCHANGES if not is_right(exchange, exchange.answer)]
    assert wrong == []


def test_no_other_answer_of_its_kind_is_right() -> None:
    """Answers to other questions of a kind are right only if they say the same."""
    by_kind: dict[tuple[Kind, Language], list[Exchange]] = defaultdict(list)
    for _, exchange in EXCHANGES:
        by_kind[exchange.kind, exchange.language].append(exchange)
    for exchanges in by_kind.values():
        for exchange, other in zip(exchanges, exchanges[1:] + exchanges[:1], strict=True):
            if is_right(exchange, other.answer):
                assert exchange.required <= {*named(other.answer, other.language)} | {"yes"}
            elif exchange.required != other.required:
                assert not is_right(exchange, "")


def test_every_kind_is_asked_in_both_languages_equally_often() -> None:
    counts = Counter((exchange.kind, exchange.language) for _, exchange in EXCHANGES)
    for kind in Kind:
        english, chinese = counts[kind, Language.ENGLISH], counts[kind, Language.CHINESE]
        assert min(english, chinese) > 20, kind
        assert 0.6 < english / chinese < 1.7, kind


@pytest.mark.parametrize("kind", [Kind.EXISTS, Kind.RELATION])
def test_yes_and_no_are_equally_frequent(kind: Kind) -> None:
    answers = [exchange.says_yes for _, exchange in of(kind) if exchange.says_yes is not None]
    assert abs(sum(answers) - len(answers) / 2) < 1.3 * len(answers) ** 0.5  # 2.6 standard deviations


def test_existence_is_what_is_in_the_scene() -> None:
    for scene, exchange in of(Kind.EXISTS):
        asked = {*named(exchange.question, exchange.language)}
        there = any(asked <= {f"shape {t.shape}", f"colour {t.colour}"} for t in scene.things)
        assert exchange.says_yes == there, exchange


def test_counts_are_those_of_the_scene() -> None:
    for scene, exchange in of(Kind.COUNT) + of(Kind.COUNT_MANY):
        asked = {*named(exchange.question, exchange.language)}
        num = sum(asked <= {f"shape {t.shape}", f"colour {t.colour}"} for t in scene.things)
        assert exchange.required == ({f"number {num}"} if num else {"no"})
        assert (exchange.kind is Kind.COUNT_MANY) == (num > 5)


def test_colours_and_sizes_are_those_of_the_only_thing_of_that_shape() -> None:
    for kind, attribute in ((Kind.COLOUR, "colour"), (Kind.SIZE, "size")):
        for scene, exchange in of(kind):
            names = {*named(exchange.question, exchange.language)}
            (thing,) = [t for t in scene.things if f"shape {t.shape}" in names]
            assert exchange.required == {f"{attribute} {getattr(thing, attribute)}"}


def test_what_is_read_is_what_is_written() -> None:
    for scene, exchange in of(Kind.READ):
        assert scene.writing is not None
        assert scene.writing.text in exchange.answer


def test_it_is_asked_about_absent_things_as_if_they_were_there() -> None:
    for scene, exchange in of(Kind.ABSENT):
        names = {*named(exchange.question, exchange.language)}
        assert not any(f"shape {t.shape}" in names for t in scene.things)
        assert exchange.required == {"no"}


def test_training_never_mentions_a_pair_that_is_held_out() -> None:
    for _, exchange in EXCHANGES:
        if exchange.kind is Kind.DESCRIBE:
            continue
        names = [*named(exchange.question, exchange.language)]
        for first, second in pairwise(names):
            if first.startswith("colour ") and second.startswith("shape "):
                assert not is_held_out(first.removeprefix("colour "), second.removeprefix("shape "))


def test_unseen_combinations_are_what_is_asked_about() -> None:
    asked = Counter[bool]()
    for index in range(150):
        scene = make_scene(Split.COMBINATIONS, 1, index)
        rare = {f"shape {t.shape}" for t in scene.things if is_held_out(t.colour, t.shape)}
        for talk in ask(scene, Split.COMBINATIONS, 1, index, num=4):
            if talk[0].kind in (Kind.COLOUR, Kind.WHERE, Kind.SIZE) and len(talk) == 1:
                asked[bool({*named(talk[0].question, talk[0].language)} & rare)] += 1
    assert asked[True] > 20
    assert asked[False] == 0


def test_follow_ups_come_second_and_mean_nothing_alone() -> None:
    pairs = [talk for _, talk in TALKS if len(talk) == 2]
    assert len(pairs) > 200
    assert all(talk[0].kind is not Kind.FOLLOW_UP and talk[1].kind is Kind.FOLLOW_UP for talk in pairs)
    assert {len(talk) for _, talk in TALKS} == {1, 2}
    openings = {talk[0].question for _, talk in TALKS}
    assert not {talk[1].question for talk in pairs} & openings
