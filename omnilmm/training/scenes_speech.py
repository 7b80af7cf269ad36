"""How questions and answers are put, in English and in Chinese. `{}` in a form is filled with a name."""

from __future__ import annotations

from dataclasses import dataclass

from omnilmm.training.scenes import SIZES, Thing
from omnilmm.training.scenes_words import (
    CHINESE_COLOURS,
    CHINESE_PLACES,
    CHINESE_RELATIONS,
    CHINESE_SHAPES,
    CHINESE_SIZES,
    ENGLISH_PLACES,
    ENGLISH_RELATIONS,
    Language,
)

Forms = tuple[str, ...]
Described = tuple[str, str, str, str]  # size, colour, shape, place


@dataclass(frozen=True, slots=True)
class Speech:
    """The forms of one language. Methods build what needs grammar."""

    language: Language
    what_is_there: Forms
    what_shape: Forms
    which_colour: Forms
    which_size: Forms
    where_is: Forms
    how_many: Forms
    is_there: Forms
    read_number: Forms
    read_word: Forms
    read_any: Forms
    describe: Forms
    and_the_other: Forms
    it_colour: Forms
    it_size: Forms
    it_where: Forms
    nothing: str

    @property
    def _is_english(self) -> bool:
        return self.language is Language.ENGLISH

    # -- names ----------------------------------------------------------------------------------------

    def the(self, shape: str) -> str:
        return f"the {shape}" if self._is_english else CHINESE_SHAPES[shape]

    def name(self, thing: Thing, by: str) -> str:
        """`by` is "shape" or "both"."""
        if by == "shape":
            return self.the(thing.shape)
        if self._is_english:
            return f"the {thing.colour} {thing.shape}"
        return f"{CHINESE_COLOURS[thing.colour]}的{CHINESE_SHAPES[thing.shape]}"

    def coloured(self, colour: str) -> str:
        return f"the {colour} shape" if self._is_english else f"{CHINESE_COLOURS[colour]}的图形"

    def a(self, colour: str | None, shape: str) -> str:
        """ "a red circle", "an orange ring", or without colour "a circle"."""
        if self._is_english:
            words = shape if colour is None else f"{colour} {shape}"
            return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        return CHINESE_SHAPES[shape] if colour is None else f"{CHINESE_COLOURS[colour]}的{CHINESE_SHAPES[shape]}"

    def many(self, by: str, value: str, *, num: int = 2) -> str:
        """Things of one shape, of one colour, or all, as they are counted."""
        if self._is_english:
            match by:
                case "shape":
                    return value if num == 1 else _plural(value)
                case "colour":
                    return f"{value} shape" if num == 1 else f"{value} shapes"
            return "shape" if num == 1 else "shapes"
        match by:
            case "shape":
                return CHINESE_SHAPES[value]
            case "colour":
                return f"{CHINESE_COLOURS[value]}的图形"
        return "图形"

    def side(self, relation: str) -> str:
        """What an answer names that tells this relation."""
        return f"place { {'above': 'top', 'below': 'bottom'}.get(relation, relation) }"

    # -- questions ------------------------------------------------------------------------------------

    def which_side(self, first: str, second: str, axis: tuple[str, str]) -> str:
        if self._is_english:
            options = "to the left or to the right of" if axis[0] == "left" else "above or below"
            return f"Is {first} {options} {second}?"
        return f"{first}在{second}的{CHINESE_RELATIONS[axis[0]]}还是{CHINESE_RELATIONS[axis[1]]}？"

    def is_it(self, first: str, second: str, relation: str) -> str:
        if self._is_english:
            return f"Is {first} {ENGLISH_RELATIONS[relation]} {second}?"
        return f"{first}在{second}的{CHINESE_RELATIONS[relation]}吗？"

    def and_shapes(self, shape: str) -> str:
        return f"And {_plural(shape)}?" if self._is_english else f"那{CHINESE_SHAPES[shape]}呢？"

    # -- answers --------------------------------------------------------------------------------------

    def there_is(self, colour: str | None, shape: str) -> str:
        return f"Yes, there is {self.a(colour, shape)}." if self._is_english else f"是的，有{self.a(colour, shape)}。"

    def there_are_these(self, kinds: list[tuple[str, str]]) -> str:
        """Some colours and shapes."""
        if self._is_english:
            return f"There is {_listed([self.a(*kind) for kind in kinds])}."
        names = [f"一个{self.a(*kind)}" for kind in kinds]
        return f"有{'，'.join(names[:-1])}和{names[-1]}。" if len(names) > 1 else f"有{names[0]}。"

    def there_is_no(self, *, shape: str, colour: str | None = None, yes_or_no: bool = False) -> str:
        if self._is_english:
            words = shape if colour is None else f"{colour} {shape}"
            return f"No, there is no {words}." if yes_or_no else f"There is no {words}."
        return f"没有{self.a(colour, shape)}。"

    def there_are(self, num: int, by: str, value: str) -> str:
        many = self.many(by, value, num=num)
        if self._is_english:
            return f"There {'is' if num == 1 else 'are'} {num or 'no'} {many}."
        return f"有{num}个{many}。" if num else f"没有{many}。"

    def it_is_a(self, shape: str) -> str:
        return f"It is {self.a(None, shape)}." if self._is_english else f"是{CHINESE_SHAPES[shape]}。"

    def other_is_a(self, shape: str) -> str:
        return f"The other one is {self.a(None, shape)}." if self._is_english else f"另一个是{CHINESE_SHAPES[shape]}。"

    def is_so_much(self, name: str, value: str) -> str:
        """The circle is red, the circle is small."""
        if self._is_english:
            return f"{_capital(name)} is {value}."
        return f"{name}是{_chinese_value(value)}的。"

    def it_is_so_much(self, value: str) -> str:
        return self.is_so_much("it" if self._is_english else "它", value)

    def other_is(self, value: str) -> str:
        return self.is_so_much("the other one" if self._is_english else "另一个", value)

    def is_at(self, name: str, place: str) -> str:
        if self._is_english:
            return f"{_capital(name)} is {ENGLISH_PLACES[place]}."
        return f"{name}在{CHINESE_PLACES[place]}。"

    def it_is_at(self, place: str) -> str:
        return self.is_at("it" if self._is_english else "它", place)

    def other_is_at(self, place: str) -> str:
        return self.is_at("the other one" if self._is_english else "另一个", place)

    def it_is(self, relation: str) -> str:
        if self._is_english:
            return {"left": "to the left", "right": "to the right"}.get(relation, relation)
        return f"在{CHINESE_RELATIONS[relation]}"

    def it_is_so(self, is_so: bool) -> str:
        if self._is_english:
            return "yes" if is_so else "no"
        return "是的" if is_so else "不是"

    def for_they_lie(self, names: tuple[str, str], cells: tuple[int, int], axis: tuple[str, str], told: str) -> str:
        """`told`, with its reason in front: the columns or rows in which the two lie. A model that says these first
        has only to compare two numbers; asked for one word it has to find and compare in one breath."""
        if self._is_english:
            line = "column" if axis[0] == "left" else "row"
            return f"{_capital(names[0])} is in {line} {cells[0]} and {names[1]} in {line} {cells[1]}: {told}."
        line = "列" if axis[0] == "left" else "行"
        return f"{names[0]}在第{cells[0]}{line}，{names[1]}在第{cells[1]}{line}：{told}。"

    def it_says(self, text: str, *, is_number: bool) -> str:
        if self._is_english:
            return f"The {'number' if is_number else 'word'} is {text}."
        return f"{'数字' if is_number else '单词'}是{text}。"

    def no_writing(self, *, is_number: bool) -> str:
        if self._is_english:
            return f"There is no {'number' if is_number else 'word'}."
        return f"没有{'数字' if is_number else '单词'}。"

    def description(self, things: list[Described], text: str | None) -> str:
        if self._is_english:
            parts = [
                f"{'a' if size in SIZES else 'an'} {size} {colour} {shape} {ENGLISH_PLACES[place]}"
                for size, colour, shape, place in things
            ]
            if text is not None:
                parts.append(f"the {'number' if text.isdigit() else 'word'} {text}")
            return f"There is {_listed(parts)}."
        parts = [
            f"{CHINESE_PLACES[place]}有一个{CHINESE_SIZES[size]}的{CHINESE_COLOURS[colour]}{CHINESE_SHAPES[shape]}"
            for size, colour, shape, place in things
        ]
        if text is not None:
            parts.append(f"写着{'数字' if text.isdigit() else '单词'}{text}")
        return f"{'，'.join(parts)}。"


def _listed(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _chinese_value(value: str) -> str:
    return CHINESE_SIZES.get(value) or CHINESE_COLOURS[value]


ENGLISH = Speech(
    language=Language.ENGLISH,
    what_is_there=("What is in the picture?", "What do you see?", "What is this?", "What is in this image?"),
    what_shape=("What shape is {}?", "What kind of shape is {}?", "What is {}?"),
    which_colour=("What colour is {}?", "Which colour is {}?", "What color is {}?", "What is the colour of {}?"),
    which_size=("Is {} small or large?", "Is {} large or small?", "How big is {}?"),
    where_is=("Where is {}?", "Where in the picture is {}?", "Where do you see {}?"),
    how_many=("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?"),
    is_there=("Is there {}?", "Is there {} in the picture?", "Do you see {}?", "Can you see {}?"),
    read_number=("What number is written here?", "Read the number.", "Which number is it?", "What is the number?"),
    read_word=("What word is written here?", "Read the word.", "Which word is it?", "What is the word?"),
    read_any=("What is written here?", "What does it say?", "What is written in the picture?"),
    describe=("Describe the picture.", "Please describe this picture.", "Describe the image."),
    and_the_other=("And the other one?", "What about the other one?", "And the other?"),
    it_colour=("What colour is it?", "Which colour is it?", "What color is it?"),
    it_size=("Is it small or large?", "Is it large or small?", "How big is it?"),
    it_where=("Where is it?", "And where is it?", "Where in the picture is it?"),
    nothing="There is nothing.",
)
CHINESE = Speech(
    language=Language.CHINESE,
    what_is_there=("图片里有什么？", "你看到了什么？", "这是什么？", "图中有什么？"),
    what_shape=("{}是什么形状？", "{}是什么？", "{}是哪种形状？"),
    which_colour=("{}是什么颜色？", "{}是什么颜色的？", "{}的颜色是什么？"),
    which_size=("{}是大的还是小的？", "{}是小的还是大的？", "{}有多大？"),
    where_is=("{}在哪里？", "{}在什么位置？", "{}在图片的哪里？"),
    how_many=("有几个{}？", "图中有几个{}？", "图片里有多少个{}？"),
    is_there=("有{}吗？", "图中有{}吗？", "图片里有{}吗？", "你看到{}了吗？"),
    read_number=("写的是什么数字？", "请读出数字。", "数字是多少？", "图中的数字是什么？"),
    read_word=("写的是什么单词？", "请读出单词。", "单词是什么？", "图中的单词是什么？"),
    read_any=("上面写着什么？", "图中写了什么？", "写的是什么？"),
    describe=("请描述这张图片。", "描述一下图片。", "请描述图中的内容。"),
    and_the_other=("另一个呢？", "那另一个呢？", "另外一个呢？"),
    it_colour=("它是什么颜色？", "它是什么颜色的？", "它的颜色是什么？"),
    it_size=("它是大的还是小的？", "它是小的还是大的？", "它有多大？"),
    it_where=("它在哪里？", "它在什么位置？", "它在图片的哪里？"),
    nothing="图中没有图形。",
)
