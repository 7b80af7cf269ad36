"""How shapes, colours, sizes and places are called in English and in Chinese, and which of them a text names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum

from omnilmm.training.scenes import COLOURS, SHAPES, SIZES


class Language(StrEnum):
    ENGLISH = "en"
    CHINESE = "zh"


CHINESE_SHAPES: Mapping[str, str] = dict(
    zip(SHAPES, ("圆形", "正方形", "三角形", "星形", "心形", "菱形", "十字形", "圆环"), strict=True)
)
CHINESE_COLOURS: Mapping[str, str] = dict(
    zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色", "白色"), strict=True)
)
CHINESE_SIZES: Mapping[str, str] = dict(zip(SIZES, ("小", "大"), strict=True))

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""The nine parts of a picture, row by row."""

ENGLISH_PLACES: Mapping[str, str] = {
    **{place: f"at the {place}" for place in PLACES},
    "left": "on the left",
    "right": "on the right",
    "centre": "in the centre",
}
CHINESE_PLACES: Mapping[str, str] = dict(
    zip(PLACES, ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"), strict=True)
)

RELATIONS = ("left", "right", "above", "below")
ENGLISH_RELATIONS: Mapping[str, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
CHINESE_RELATIONS: Mapping[str, str] = dict(zip(RELATIONS, ("左边", "右边", "上面", "下面"), strict=True))

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE_NUMBERS = "零一二三四五六七八九"


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
    **{word: f"number {number}" for number, word in enumerate(NUMBER_WORDS) if number},
    "zero": "number 0",
}
_CHINESE: Mapping[str, str] = {
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
    **{f"{digit}个": f"number {number}" for number, digit in enumerate(CHINESE_NUMBERS)},
    "一个": "one",  # as in "there is a circle": says nothing about how many
}
_CHINESE_NAMES = re.compile("|".join(sorted(_CHINESE, key=len, reverse=True)))
_ENGLISH_NAMES = re.compile(r"other one|[A-Za-z]+|\d+")


def named(text: str, language: Language) -> Iterator[str]:
    """Everything the text names, in order, each in the words of the dictionaries above: "colour red", "shape ring",
    "number 3", "place left", "yes", "no". Letters in capitals are "word STOP". What means nothing here is left out.
    """
    if language is Language.ENGLISH:
        for match in _ENGLISH_NAMES.finditer(text):
            yield from _english(match.group())
        return
    for match in re.finditer(rf"\d+|[A-Z]+|{_CHINESE_NAMES.pattern}", text):
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
