"""Prompts for measuring: all different from their first words on, so that no prefix cache helps anyone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnilmm.config import Family, InputHandling
from omnilmm.messages import Conversation, TextPart, Turn
from omnilmm.prompt.template import load_template

WORDS = """
river mountain window garden letter winter market bridge teacher music island harbour paper morning engine story
village doctor evening forest number answer picture history science question station summer yellow quiet narrow
early simple careful distant heavy gentle modern ancient northern open busy green write carry follow measure build
explain gather remember travel describe compare repair discover paint under behind across before during without
between toward against because although while since until every several another both many few some most other
"""


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A question as a client asks it, and the ids a server makes of it."""

    text: str
    ids: tuple[int, ...]


class PromptMaker:
    """Questions that, in the checkpoint's chat format, have about `num_tokens` tokens."""

    def __init__(self, folder: Path, *, num_tokens: int) -> None:
        self._template = load_template(Family.TEXT, folder)
        self._num_tokens = num_tokens

    def make(self, count: int, *, seed: int) -> list[BenchPrompt]:
        """The same seed gives the same prompts; different seeds share none."""
        draw = random.Random(seed)
        return [self._one(draw, f"{seed}.{number}") for number in range(count)]

    def _one(self, draw: random.Random, salt: str) -> BenchPrompt:
        known = WORDS.split()
        words = [salt.replace(".", " "), "Continue"]
        while True:
            text = " ".join(words)
            ids = self.ids_of(text)
            if len(ids) >= self._num_tokens:
                return BenchPrompt(text, ids)
            words += draw.choices(known, k=max(1, self._num_tokens - len(ids) - 2))

    def ids_of(self, text: str) -> tuple[int, ...]:
        conversation = Conversation((Turn("user", (TextPart(text),)),))
        return self._template.render(conversation, InputHandling.SAFE).ids

    def text_of(self, ids: Sequence[int]) -> str:
        """An answer as text, control tokens left out."""
        tokenizer = self._template.tokenizer
        shown = [i for i in ids if i not in tokenizer.control_ids]
        return b"".join(map(tokenizer.token_bytes, shown)).decode(errors="replace")
