"""Questions with what a right answer must name: an answer is judged by what it says, not by how it is put."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from omnilmm.training.scenes_words import Language, named


class Kind(StrEnum):
    """What a question asks for. Figures are given per kind."""

    WHAT = "what"
    COLOUR = "colour"
    SIZE = "size"
    COUNT = "count"  # up to five
    COUNT_MANY = "count above 5"
    WHERE = "where"
    RELATION = "relation"  # left of, right of, above, below
    EXISTS = "exists"
    ABSENT = "absent"  # it is asked for something that is not there
    READ = "read"
    DESCRIBE = "describe"
    FOLLOW_UP = "follow-up"  # makes sense only behind the turn before it


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer as the model should give it.

    A right answer names everything in `required` and nothing beyond `allowed` (names as in `scenes_words.named`). A
    description is judged phrase by phrase instead: `phrases` holds what each must name, in any order.
    """

    kind: Kind
    language: Language
    question: str
    answer: str
    required: frozenset[str]
    allowed: frozenset[str]
    phrases: tuple[frozenset[str], ...] = ()

    @property
    def says_yes(self) -> bool | None:
        """What the right answer to a yes-or-no question is; None for any other question."""
        if "yes" in self.required:
            return True
        return False if "no" in self.required else None


_ENGLISH_BREAKS = re.compile(r"\band\b|[,;.]")
_CHINESE_YES = re.compile("[有是在]")
_CHINESE_BREAKS = re.compile(r"[，。；、和]")


def is_right(exchange: Exchange, answer: str) -> bool:
    """Whether `answer` says what is so and nothing else."""
    if exchange.phrases:
        return Counter(_phrases(answer, exchange.language)) == Counter(exchange.phrases)
    names = {*named(answer, exchange.language)}
    if exchange.says_yes is not None and not names & {"yes", "no"} and _CHINESE_YES.search(answer):
        names.add("yes")  # 有红色的圆形: to state it is to say yes
    return exchange.required <= names <= exchange.allowed


def says_yes(exchange: Exchange, answer: str) -> bool:
    """Whether `answer` affirms that what the question asks for is there: it does not deny it."""
    return "no" not in {*named(answer, exchange.language)}


def _phrases(answer: str, language: Language) -> list[frozenset[str]]:
    breaks = _ENGLISH_BREAKS if language is Language.ENGLISH else _CHINESE_BREAKS
    return [names for piece in breaks.split(answer) if (names := frozenset(named(piece, language)))]
