"""A conversation as token ids, with the places of what the assistant says: what is learned, and nothing else.

For every assistant message there is one `Sequence`: the prompt exactly as it is rendered when that answer is asked for
(the same template, special tokens and picture spans as in serving), the answer's ids, and the end token. So the loss
falls on precisely the ids a server would have to produce, by position, in both families:

12B (Zephyr)   ... ``<|assistant|>\\n`` ANSWER ``</s>``
3B (MiniCPM)   ... ``<AI>`` ANSWER ``</s>``; in the history of a later question no ``</s>`` stands behind an answer, so
               the end is learned as a target at the answer's last token, and is not part of what comes after it.

The answer's own ids are those it has behind the generation prompt: it is encoded together with the mark in front of
it, and cut off where the mark ends. Where a piece of the vocabulary lies across that border (then no server could
produce these ids) the answer is encoded behind a newline, and as a last resort spelled out.

The sequences of one conversation share nearly everything; `rows` stores what they share once.
"""

from __future__ import annotations

from dataclasses import dataclass

from omnilmm.config import Family, InputHandling
from omnilmm.errors import ConfigError
from omnilmm.messages import Conversation, Span
from omnilmm.prompt.template import Template
from omnilmm.prompt.vocabulary import Piece, Vocabulary


@dataclass(frozen=True, slots=True)
class Sequence:
    """Ids of a prompt and, from `answer_start` on, of the answer with its end token. Spans as in Prompt."""

    ids: tuple[int, ...]
    answer_start: int
    spans: tuple[Span, ...]


class SequenceMaker:
    """Makes sequences for one model.

    Raises:
        ConfigError: the family takes no pictures.
    """

    def __init__(self, family: Family, template: Template) -> None:
        match family:
            case Family.OMNILMM_12B:
                self._mark = "<|assistant|>\n"
            case Family.OMNILMM_3B:
                self._mark = "<AI>"
            case Family.TEXT:
                raise ConfigError("Only the two picture families can be trained.")
        self._template = template

    def sequences(self, conversation: Conversation) -> tuple[Sequence, ...]:
        """One per assistant message, in order.

        Raises:
            ConfigError: there is no assistant message, or one that does not follow a user's.
            InvalidRequest: the turns break the template's rules.
        """
        made = []
        for index, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                if index == 0 or conversation.turns[index - 1].role != "user":
                    raise ConfigError("An assistant message must follow a user's.")
                made.append(self._sequence(Conversation(conversation.turns[:index]), turn.text))
        if not made:
            raise ConfigError("A conversation without an assistant message teaches nothing.")
        return tuple(made)

    def _sequence(self, asked: Conversation, answer: str) -> Sequence:
        prompt = self._template.render(asked, InputHandling.SAFE)
        vocabulary = self._template.tokenizer
        ids = (*prompt.ids, *answer_ids(vocabulary, answer, mark=self._mark), vocabulary.eos_id)
        return Sequence(ids, len(prompt.ids), prompt.spans)


def answer_ids(vocabulary: Vocabulary, answer: str, *, mark: str) -> list[int]:
    """Ids of `answer` behind the generation prompt that ends with `mark`. Control tokens in it are spelled out."""
    for lead in (mark, "\n"):
        pieces = vocabulary.encode_text(lead + answer, first=False)
        border = len(lead)
        if not any(piece.start < border < piece.end for piece in pieces):
            ids = []
            for piece in pieces[_num_leading(pieces, border) :]:
                spelled_out = piece.id in vocabulary.control_ids
                ids += vocabulary.spell(vocabulary.token_bytes(piece.id)) if spelled_out else [piece.id]
            return ids
    return vocabulary.spell(answer.encode())


def _num_leading(pieces: list[Piece], border: int) -> int:
    """Pieces in front of the border: those that end there or before, and the byte tokens of the lead that cover
    nothing (the last byte of a character covers it)."""
    ends = [index for index, piece in enumerate(pieces) if piece.start < piece.end <= border]
    return ends[-1] + 1 if ends else 0
