"""Answers are judged by what they say."""

from __future__ import annotations

import pytest

from omnilmm.training.scenes_check import Exchange, Kind, is_right, says_yes
from omnilmm.training.scenes_words import Language, named

EN, ZH = Language.ENGLISH, Language.CHINESE


def exchange(kind: Kind, language: Language, required: set[str], *allowed: str) -> Exchange:
    return Exchange(kind, language, "?", "", frozenset(required), frozenset({*required, *allowed}))


@pytest.mark.parametrize(
    ("text", "language", "names"),
    [
        ("There are two red circles.", EN, ["number 2", "colour red", "shape circle"]),
        ("The other one is BIG.", EN, ["word BIG"]),
        ("The other one is big.", EN, ["size large"]),
        ("A cross, no crosses; 47", EN, ["shape cross", "no", "shape cross", "number 47"]),
        ("左上角有一个大的红色圆形", ZH, ["place left", "place top", "size large", "colour red", "shape circle"]),
        ("没有三角形。", ZH, ["no", "shape triangle"]),
        ("有3个圆环", ZH, ["number 3", "shape ring"]),
        ("有三个圆环", ZH, ["number 3", "shape ring"]),
        ("单词是STOP。", ZH, ["word STOP"]),
        ("", EN, []),
    ],
)
def test_what_a_text_names(text: str, language: Language, names: list[str]) -> None:
    assert [*named(text, language)] == names


@pytest.mark.parametrize(
    ("judged", "right", "wrong"),
    [
        (
            exchange(Kind.COLOUR, EN, {"colour red"}, "shape circle"),
            ["Red.", "The circle is red.", "red"],
            ["Blue.", "Red and blue.", "The square is red.", "", "It is round."],
        ),
        (
            exchange(Kind.COLOUR, ZH, {"colour red"}, "shape circle"),
            ["红色。", "圆形是红色的。"],
            ["蓝色。", "红色和蓝色。", "Red."],
        ),
        (exchange(Kind.COUNT, EN, {"number 3"}, "shape star"), ["3", "Three stars."], ["4", "3 or 4", "no stars"]),
        (exchange(Kind.EXISTS, EN, {"yes"}, "shape star"), ["Yes.", "Yes, a star."], ["No.", "Yes. No.", "A star."]),
        (exchange(Kind.EXISTS, ZH, {"yes"}, "shape star"), ["是的。", "有星形。"], ["没有。", "没有星形。"]),
        (exchange(Kind.EXISTS, ZH, {"no"}, "shape star"), ["没有星形。", "没有。"], ["有。", "是的，有星形。"]),
        (exchange(Kind.RELATION, ZH, {"no"}), ["不是。", "不在。"], ["是的。"]),
        (exchange(Kind.READ, EN, {"word STOP"}), ["STOP", "The word is STOP."], ["SHOP", "STOPS", "stop", "ST OP"]),
        (exchange(Kind.READ, EN, {"number 047"}), ["047"], ["47", "0 4 7"]),
    ],
)
def test_right_and_wrong_answers(judged: Exchange, right: list[str], wrong: list[str]) -> None:
    assert all(is_right(judged, answer) for answer in right)
    assert not any(is_right(judged, answer) for answer in wrong)


def test_descriptions_are_judged_phrase_by_phrase() -> None:
    circle = frozenset({"size large", "colour red", "shape circle", "place top", "place left"})
    star = frozenset({"size small", "colour blue", "shape star", "place right"})
    judged = Exchange(Kind.DESCRIBE, EN, "?", "", frozenset(), frozenset(), (circle, star))
    good = "There is a large red circle at the top left and a small blue star on the right."
    assert is_right(judged, good)
    assert is_right(judged, "On the right a small blue star, at the top left a large red circle.")
    assert not is_right(judged, good.replace("red", "blue").replace("blue star", "red star"))
    assert not is_right(judged, "There is a large red circle at the top left.")
    assert not is_right(judged, good.replace("star", "star, a small blue star on the right"))


def test_whatever_does_not_deny_says_yes() -> None:
    judged = exchange(Kind.EXISTS, EN, {"no"}, "shape star")
    assert says_yes(judged, "Yes, there is a star.")
    assert says_yes(judged, "The star is red.")
    assert not says_yes(judged, "There is no star.")
