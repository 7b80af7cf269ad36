"""How shapes, colours, sizes and places are called in English and in Chinese, and which of them a text names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum

from omnilmm.training.scenes import COLOURS, SHAPES, SIZES


class Language(StrEnum):
    ENGLISH = "en"
    CHINESE = "zh"


CHINESE_SHAPES: Mapping[str, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "heart": "心形",
    "diamond": "菱形",
    "cross": "十字形",
    "ring": "圆环",
}
CHINESE_COLOURS: Mapping[str, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "white": "白色",
}
CHINESE_SIZES: Mapping[str, str] = {"small": "小", "large": "大"}

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""The nine parts of a picture, row by row."""

ENGLISH_PLACES: Mapping[str, str] = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "centre": "in the centre",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
CHINESE_PLACES: Mapping[str, str] = {
    "top left": "左上角",
    "top": "上方",
    "top right": "右上角",
    "left": "左边",
    "centre": "中间",
    "right": "右边",
    "bottom left": "左下角",
    "bottom": "下方",
    "bottom right": "右下角",
}

RELATIONS = ("left", "right", "above", "below")
ENGLISH_RELATIONS: Mapping[str, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
CHINESE_RELATIONS: Mapping[str, str] = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE_NUMBERS = "零一二三四五六七八九"
DIGITS = range(10)


# -- what a text names ----------------------------------------------------------------------------------

_ENGLISH: Mapping[str, str] = {
    **{shape: f"shape {shape}" for shape in SHAPES},
    **{f"{shape}s": f"shape {shape}" for shape in SHAPES},
    "crosses": "shape cross",
    **{colour: f"colour {colour}" for colour in COLOURS},
    **{size: f"size {size}" for size in SIZES},
    "big": "size large",
    "little": "size small",
    **{word: f"place {word}" for word in ("left", "right", "top", "bottom", "centre")},
    "above": "place top",
    "upper": "place top",
    "below": "place bottom",
    "lower": "place bottom",
    "middle": "place centre",
    "center": "place centre",
    "yes": "yes",
    "no": "no",
    "not": "no",
    "nothing": "no",
    **{NUMBER_WORDS[number]: f"number {number}" for number in DIGITS if number},
    "zero": "number 0",
}
_CHINESE: Mapping[str, str] = {  # where one word begins like another, the longer one comes first
    **{word: f"shape {shape}" for shape, word in CHINESE_SHAPES.items()},
    **{word: f"colour {colour}" for colour, word in CHINESE_COLOURS.items()},
    **{word: f"size {size}" for size, word in CHINESE_SIZES.items()},
    "左": "place left",
    "右": "place right",
    "上": "place top",
    "下": "place bottom",
    "中间": "place centre",
    "中央": "place centre",
    "没有": "no",
    "不是": "no",
    "不在": "no",
    "不": "no",
    "是的": "yes",
    "有的": "yes",
    "对": "yes",
    "两个": "number 2",
    **{f"{CHINESE_NUMBERS[number]}个": f"number {number}" for number in DIGITS},
    "一个": "one",  # as in "there is a circle": says nothing about how many
}
_CHINESE_NAMES = re.compile(r"\d+|[A-Z]+|" + "|".join(_CHINESE))
_ENGLISH_NAMES = re.compile(r"other one|[A-Za-z]+|\d+")


def named(text: str, language: Language) -> Iterator[str]:
    """Everything the text names, in order, each in the words of the dictionaries above: "colour red", "shape ring",
    "number 3", "place left", "yes", "no". Letters in capitals are "word STOP". What means nothing here is left out.
    """
    if language is Language.ENGLISH:
        for match in _ENGLISH_NAMES.finditer(text):
            yield from _english(match.group())
        return
    for match in _CHINESE_NAMES.finditer(text):
        word = match.group()
        if word.isascii():
            yield from _english(word)
        elif _CHINESE[word] != "one":
            yield _CHINESE[word]


def _english(word: str) -> Iterator[str]:
    if word.isdigit():
        yield f"number {word}"
    elif word.isupper() and word not in ("A", "I"):
        yield f"word {word}"
    elif word.lower() in _ENGLISH:
        yield _ENGLISH[word.lower()]


def chinese_words() -> tuple[str, ...]:
    """Every Chinese word above."""
    tables = (CHINESE_SHAPES, CHINESE_COLOURS, CHINESE_PLACES, CHINESE_RELATIONS)
    return tuple(dict.fromkeys((*(word for table in tables for word in table.values()), *_CHINESE)))
