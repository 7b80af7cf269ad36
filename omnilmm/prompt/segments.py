"""A prompt as a row of segments, and the two ways to encode it.

The originals glue template and user text into one string and let the tokenizer find the control tokens in it, so a
user who types ``</s>`` ends the turn. `Vocabulary.encode_parsed` does that, for original handling. `ForgeryProof`
keeps apart what the template says and what was typed: control ids come only from `Control` and `Block` segments, and
the ids by which the template writes its role marks (``<|user|>``, ``<AI>``: ordinary words to the tokenizer) never
arise from typed text. Ordinary text gets the same ids either way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from omnilmm.errors import CheckpointError, ContextLengthExceeded
from omnilmm.messages import Span
from omnilmm.prompt.vocabulary import Piece, Vocabulary


@dataclass(frozen=True, slots=True)
class Words:
    """Ordinary text; `typed` if a client wrote it."""

    text: str
    typed: bool = False


@dataclass(frozen=True, slots=True)
class Control:
    """One control token of the template."""

    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """The place of the next picture: `start`, `length` times `patch`, `end`. Vectors replace the patches."""

    start: str
    patch: str
    end: str
    length: int

    @property
    def text(self) -> str:
        return self.start + self.patch * self.length + self.end


Segment = Words | Control | Block
Speller = Callable[[bytes], list[int]]
"""Gives other ids for the text that a piece spells."""


def text_of(segments: Iterable[Segment]) -> str:
    """The prompt as the original programs would hand it to their tokenizer."""
    return "".join(segment.text for segment in segments)


def check_fits(vocabulary: Vocabulary, text: str, max_tokens: int | None) -> None:
    """Refuse a text that needs more than `max_tokens` whatever its ids are, without encoding it.

    No token spells more than `max_token_bytes`, which bounds the count from below. Vocabularies that may shorten a
    text first give no bound.

    Raises:
        ContextLengthExceeded: it cannot fit. A text that fits is never refused.
    """
    longest = vocabulary.max_token_bytes
    if max_tokens is not None and longest is not None and len(text.encode()) > max_tokens * longest:
        raise too_long(max_tokens)


def too_long(max_tokens: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"The messages take more than the {max_tokens} tokens there are.", param="messages")


# -- original handling --------------------------------------------------------------------------------


def find_spans(vocabulary: Vocabulary, block: Block, ids: Sequence[int]) -> tuple[Span, ...] | None:
    """Where the originals would put vectors: behind each start token. None if there are more or fewer end tokens.

    They look for these two tokens and not at the patches between (omnilmm.py: the loop over image_start_tokens;
    modeling_minicpmv.py: image_bound). As many starts as pictures means that all of them are the template's own.
    """
    start, end = vocabulary.control_id(block.start), vocabulary.control_id(block.end)
    starts = [position for position, token_id in enumerate(ids) if token_id == start]
    if len(starts) != sum(token_id == end for token_id in ids):
        return None
    return tuple(Span(position + 1, block.length, image) for image, position in enumerate(starts))


# -- safe handling ------------------------------------------------------------------------------------


class ForgeryProof:
    """Encodes segments so that nothing typed can pass for something the template says.

    Args:
        vocabulary: the tokenizer.
        marks: role marks of the template that are ordinary text to the tokenizer.

    Raises:
        CheckpointError: the vocabulary cannot spell a mark in two ways, so typed marks could not be told apart.
    """

    def __init__(self, vocabulary: Vocabulary, marks: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._spellers = {mark: _other_spelling(vocabulary, mark) for mark in marks}

    def encode(self, segments: Iterable[Segment], *, max_tokens: int | None) -> tuple[list[int], tuple[Span, ...]]:
        """Ids with BOS where the tokenizer adds one, and a span per Block in order.

        A run of Words between two control tokens is encoded in one go, as the originals do, so that pieces may
        join across the border of template and typed text just as they did in training.

        Raises:
            ContextLengthExceeded: there are more than `max_tokens` ids.
        """
        vocabulary = self._vocabulary
        ids = [vocabulary.bos_id] if vocabulary.adds_bos else []
        from_template = set(range(len(ids)))  # positions of control ids
        num_leading = len(ids)
        spans: list[Span] = []
        run: list[Words] = []
        for segment in (*segments, None):
            if isinstance(segment, Words):
                run.append(segment)
                continue
            ids += self._encode_run(run, first=len(ids) == num_leading)
            run.clear()
            if max_tokens is not None and len(ids) > max_tokens:
                raise too_long(max_tokens)
            control = _control_ids(vocabulary, segment)
            from_template.update(range(len(ids), len(ids) + len(control)))
            if isinstance(segment, Block):
                spans.append(Span(len(ids) + 1, segment.length, len(spans)))
            ids += control
        assert {i for i, token_id in enumerate(ids) if token_id in vocabulary.control_ids} == from_template
        return ids, tuple(spans)

    def _encode_run(self, run: Sequence[Words], *, first: bool) -> Iterator[int]:
        text = "".join(words.text for words in run)
        pieces = self._vocabulary.encode_text(text, first=first) if text else []
        spelled = [self._vocabulary.token_bytes(piece.id) for piece in pieces]
        spellers = self._forged(pieces, spelled, _own_marks(run, tuple(self._spellers)))
        for index, piece in enumerate(pieces):
            if index in spellers and not self._vocabulary.is_byte(piece.id):
                yield from spellers[index](spelled[index])
            else:
                yield piece.id

    def _forged(self, pieces: Sequence[Piece], spelled: Sequence[bytes], own: Sequence[int]) -> dict[int, Speller]:
        """Which pieces must be spelled in another way, and how.

        These are control tokens (a vocabulary may know ``<image>`` as a piece of its own) and everything that takes
        part in writing a mark. Any row of ids that equals a mark's ids also spells the mark, so a search in what
        the ids spell misses none, whatever the context, the dummy space or the normaliser made of the text.
        """
        control = self._vocabulary.control_ids
        spellers: dict[int, Speller] = {
            i: self._vocabulary.spell for i, piece in enumerate(pieces) if piece.id in control
        }
        ends = list(accumulate(map(len, spelled)))
        whole = b"".join(spelled)
        for mark, speller in self._spellers.items():
            wanted = mark.encode()
            at = whole.find(wanted)
            while at >= 0:
                head = bisect_right(ends, at)
                if not _covers(pieces[head], own):
                    tail = bisect_left(ends, at + len(wanted))
                    spellers.update(dict.fromkeys(range(head, tail + 1), speller))
                at = whole.find(wanted, at + 1)
        return spellers


def _control_ids(vocabulary: Vocabulary, segment: Control | Block | None) -> list[int]:
    match segment:
        case Control(text=text):
            return [vocabulary.control_id(text)]
        case Block(start=start, patch=patch, end=end, length=length):
            inner = [vocabulary.control_id(patch)] * length
            return [vocabulary.control_id(start), *inner, vocabulary.control_id(end)]
        case _:
            return []


def _own_marks(run: Sequence[Words], marks: Sequence[str]) -> list[int]:
    """Where in the text of `run` the template itself wrote a mark: ascending offsets in characters."""
    own = []
    offset = 0
    for words in run:
        if not words.typed:
            for mark in marks:
                at = words.text.find(mark)
                while at >= 0:
                    own.append(offset + at)
                    at = words.text.find(mark, at + 1)
        offset += len(words.text)
    return sorted(own)


def _covers(piece: Piece, offsets: Sequence[int]) -> bool:
    """Whether one of the ascending `offsets` lies in the piece. A mark begins with ``<``, so no piece begins two."""
    return bisect_left(offsets, piece.end) > bisect_left(offsets, piece.start)


def _other_spelling(vocabulary: Vocabulary, mark: str) -> Speller:
    """How to spell typed text that holds `mark` so that it differs from every way the template's own comes out."""
    usual = {tuple(_mark_ids(vocabulary, before, mark)) for before in ("", "\n", ">")}
    spellers: tuple[Speller, ...] = (vocabulary.spell, vocabulary.spell_bytes)
    for speller in spellers:
        if tuple(speller(mark.encode())) not in usual:
            return speller
    raise CheckpointError(f"The tokenizer has only one way to spell {mark!r}: typed marks could not be told apart.")


def _mark_ids(vocabulary: Vocabulary, before: str, mark: str) -> Iterator[int]:
    """Ids that take part in writing `mark` behind `before`."""
    return (piece.id for piece in vocabulary.encode_text(before + mark) if piece.end > len(before))
