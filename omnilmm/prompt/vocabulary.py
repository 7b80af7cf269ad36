"""What both tokenizer backends have in common: a table of what each id spells, and the control tokens.

A *control token* (BOS, EOS, a picture mark, ``<|im_end|>``) has an id that no ordinary text may produce. A *piece*
is any other entry of the vocabulary. A vocabulary that cannot spell every byte of ordinary text is not taken, so no
text is ever lost.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from omnilmm.errors import CheckpointError

NUM_BYTES = 256


class Piece(NamedTuple):
    """A token of an encoded text and the characters it stands for: ``text[start:end]``.

    A dummy space in front covers no character. Where several tokens spell the bytes of one character, some of
    them may cover nothing (SentencePiece gives the character to the last one).
    """

    id: int
    start: int
    end: int


class Special(NamedTuple):
    """A token outside the ordinary pieces, as the checkpoint's tokenizer files declare it.

    `control` is false for added words that are part of the language (they are shown when special tokens are not).
    """

    id: int
    text: str
    control: bool


class Vocabulary(ABC):
    """A tokenizer for prompts (`omnilmm.ports.Tokenizer` and what rendering and detokenising need besides).

    Args:
        spellings: what each id adds to a text in the middle of it; a special token gives its literal text.
        byte_ids: the ids that spell single bytes, by byte.
        char_ids: pieces that spell exactly one character.
        specials: the tokens at which a text is cut in front of encoding.
        bos, eos: literal text of the two; a vocabulary without BOS reports its EOS as `bos_id`.
        adds_bos: whether the checkpoint's own tokenizer puts BOS in front of a text.
        drops_first_space: whether encoding puts a dummy space in front, which decoding must take away again.
        replaces_each_byte: an undecodable run becomes one U+FFFD per byte (SentencePiece), else one per faulty
            sequence (the substitution of the Unicode standard, chapter 3.9, which byte-level models use).
        fixed_length: text is never shortened before it is encoded, so that `max_token_bytes` bounds the count.
        chat_template: the Jinja source in the checkpoint's files. It is recognised, never executed.
    """

    def __init__(
        self,
        *,
        spellings: Sequence[bytes],
        byte_ids: Mapping[int, int],
        char_ids: Mapping[str, int],
        specials: Iterable[Special],
        bos: str | None,
        eos: str | None,
        adds_bos: bool,
        drops_first_space: bool,
        replaces_each_byte: bool,
        fixed_length: bool,
        chat_template: str | None,
    ) -> None:
        specials = tuple(specials)
        self._spellings = tuple(spellings)
        self._byte_ids = dict(byte_ids)
        self._byte_set = frozenset(byte_ids.values())
        self._char_ids = dict(char_ids)
        self.special_ids: Mapping[str, int] = {s.text: s.id for s in specials if s.control}
        self.control_ids = frozenset(self.special_ids.values())
        self.adds_bos = adds_bos and bos is not None
        self.drops_first_space = drops_first_space
        self.replaces_each_byte = replaces_each_byte
        self.chat_template = chat_template
        self.max_token_bytes = max(map(len, self._spellings)) if fixed_length else None
        if eos is None:
            raise CheckpointError("The tokenizer files name no EOS token.")
        self.eos_text = eos
        self.eos_id = self.control_id(eos)
        self.bos_id = self.control_id(bos) if bos is not None else self.eos_id
        self._cut_ids = {s.text: s.id for s in specials}
        self._cut = re.compile("|".join(map(re.escape, sorted(self._cut_ids, key=len, reverse=True))))  # longest first

    @property
    def vocab_size(self) -> int:
        return len(self._spellings)

    @abstractmethod
    def encode_text(self, text: str, *, first: bool = True) -> list[Piece]:
        """Encode a part that holds no control token; a control token's text in it is encoded as words where the
        vocabulary allows it (`render` checks).

        `first` is false for a part behind a control token other than BOS: some vocabularies put their dummy space
        only in front of the whole text. `text` must hold no lone surrogate.
        """

    def encode_parsed(self, text: str) -> list[int]:
        """Encode as the original programs do: cut at the text of every special token, each part by itself."""
        ids: list[int] = []
        done = 0
        for match in self._cut.finditer(text):
            ids.extend(self._part_ids(text[done : match.start()], first=not ids))
            ids.append(self._cut_ids[match.group()])
            done = match.end()
        ids.extend(self._part_ids(text[done:], first=not ids))
        return ids

    def _part_ids(self, text: str, *, first: bool) -> list[int]:
        return [piece.id for piece in self.encode_text(text, first=first)] if text else []

    def control_id(self, text: str) -> int:
        """Id of the control token written `text`.

        Raises:
            CheckpointError: the vocabulary has no such token.
        """
        try:
            return self.special_ids[text]
        except KeyError:
            raise CheckpointError(f"The tokenizer has no special token {text!r}.") from None

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text in the middle of it; a control token gives its literal text.

        An id beyond the vocabulary (output matrices are often padded) spells nothing.
        """
        return self._spellings[token_id] if 0 <= token_id < len(self._spellings) else b""

    def is_byte(self, token_id: int) -> bool:
        """Whether the token spells one byte of a character that has no piece of its own."""
        return token_id in self._byte_set

    def spell(self, text: bytes) -> list[int]:
        """Ids that spell UTF-8 `text` one character at a time, never joined into longer pieces.

        A byte-level vocabulary knows bytes only; its pieces may begin or end inside a character.
        """
        if not self._char_ids:
            return self.spell_bytes(text)
        ids: list[int] = []
        for char in text.decode():
            known = self._char_ids.get(char)
            ids.extend(self.spell_bytes(char.encode()) if known is None else (known,))
        return ids

    def spell_bytes(self, text: bytes) -> list[int]:
        """Ids that spell `text` one byte at a time."""
        return [self._byte_ids[byte] for byte in text]
