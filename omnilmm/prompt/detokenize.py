"""Ids to text: as a stream, in one go, and as the original programs do it.

A stream never ends inside a character or inside what may become a stop string, and its deltas joined are the text
that `decode` gives, however the ids were chunked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from omnilmm.config import Family
from omnilmm.errors import InvalidRequest
from omnilmm.prompt.vocabulary import Vocabulary

_UNKNOWN = "\ufffd"


class Detokenizer:
    """Turns the ids of one answer into text as they come.

    The dummy space in front of the very first piece is taken away, as the originals' decoding does. Bytes that
    cannot be UTF-8 become U+FFFD once no later token can complete them.

    Args:
        tokenizer: the model's.
        skip_special: leave control tokens out; else their literal text is shown (3B's ``<ref>`` and ``<box>``),
            but for BOS, EOS and ``<unk>``, which the original takes out itself.
        stop: the answer ends in front of the first of these to be completed; of two completed by the same
            character, the longer counts.

    Raises:
        InvalidRequest: a stop string is empty.
    """

    def __init__(self, tokenizer: Vocabulary, *, skip_special: bool, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise InvalidRequest("A stop string must not be empty.", param="stop")
        self._tokenizer = tokenizer
        self._hidden = tokenizer.control_ids if skip_special else _framing_ids(tokenizer)
        self._stop = tuple(stop)
        self._at_start = True
        self._bytes = b""  # the beginning of a character
        self._held = ""  # what may become a stop string
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """Text that the next `ids` make certain; "" once a stop string was seen."""
        if self.stopped:
            return ""
        spelled = b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._hidden)
        if spelled and self._at_start:
            self._at_start = False
            if self._tokenizer.drops_first_space:
                spelled = spelled.removeprefix(b" ")
        return self._release(self._characters(spelled, at_end=False))

    def flush(self) -> str:
        """What is left at the end of the answer: held text, and U+FFFD for a character that never came."""
        if self.stopped:
            return ""
        text = self._release(self._characters(b"", at_end=True))
        rest, self._held = self._held, ""
        return text + rest

    def _characters(self, spelled: bytes, *, at_end: bool) -> str:
        """The complete characters of what has come; the rest stays in `_bytes`."""
        data = self._bytes + spelled
        done: list[str] = []
        start = 0
        while True:
            try:
                done.append(data[start:].decode())
                self._bytes = b""
                break
            except UnicodeDecodeError as error:
                done.append(data[start : start + error.start].decode())
                if not at_end and error.reason == "unexpected end of data":
                    self._bytes = data[start + error.start :]
                    break
                width = error.end - error.start if self._tokenizer.replaces_each_byte else 1
                done.append(_UNKNOWN * width)
                start += error.end
        return "".join(done)

    def _release(self, text: str) -> str:
        """Cut at a stop string, else keep back what could begin one."""
        text = self._held + text
        cut = _first_stop(text, self._stop)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[kept:]
        return text[:kept]


def decode(tokenizer: Vocabulary, ids: Iterable[int], *, skip_special: bool) -> str:
    """The text of a whole answer; what a Detokenizer's deltas join to."""
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return detokenizer.push(ids) + detokenizer.flush()


def token_text(tokenizer: Vocabulary, token_id: int) -> tuple[str, bytes]:
    """A token as log-probabilities list it: its text, with U+FFFD where it is part of a character, and its bytes."""
    spelled = tokenizer.token_bytes(token_id)
    return spelled.decode(errors="replace"), spelled


def answer_text(tokenizer: Vocabulary, ids: Sequence[int], family: Family) -> str:
    """The text of a finished answer exactly as the family's original program returns it.

    12B (chat.py: tokenizer.decode(..., skip_special_tokens=True).strip(), a fast tokenizer): control tokens are left
    out, and a run of byte tokens that is not UTF-8 becomes one U+FFFD per byte of the whole run.

    3B (modeling_minicpmv.py: decode_text, a slow tokenizer): zeros removed, then one BOS in front and one EOS behind;
    control tokens are shown. transformers 4.36 (LlamaTokenizer.convert_tokens_to_string) decodes each stretch
    between them by itself, which takes its first space away, and puts one space in front of a stretch that a control
    token follows: ``<ref> cat</ref>is here``. A stream (`Detokenizer`) shows the spaces the tokens spell instead.

    A text model's answer is decoded without control tokens. All are stripped.
    """
    match family:
        case Family.OMNILMM_12B:
            return "".join(_byte_runs(tokenizer, [i for i in ids if i not in tokenizer.control_ids])).strip()
        case Family.OMNILMM_3B:
            shown = [i for i in ids if i != 0]
            if shown[:1] == [tokenizer.bos_id]:
                shown = shown[1:]
            if shown[-1:] == [tokenizer.eos_id]:
                shown = shown[:-1]
            return "".join(_stretches(tokenizer, shown)).strip()
        case Family.TEXT:
            return decode(tokenizer, ids, skip_special=True).strip()


def _framing_ids(tokenizer: Vocabulary) -> frozenset[int]:
    unknown = tokenizer.special_ids.get("<unk>", tokenizer.eos_id)
    return frozenset((tokenizer.bos_id, tokenizer.eos_id, unknown))


def _byte_runs(tokenizer: Vocabulary, ids: Iterable[int]) -> Iterator[str]:
    """Text as the ByteFallback decoder of the tokenizers library makes it: a run of bytes is all right or all wrong."""
    for is_byte, run in groupby(ids, key=tokenizer.is_byte):
        spelled = b"".join(map(tokenizer.token_bytes, run))
        try:
            yield spelled.decode()
        except UnicodeDecodeError:
            assert is_byte
            yield _UNKNOWN * len(spelled)


def _stretches(tokenizer: Vocabulary, ids: Sequence[int]) -> Iterator[str]:
    """Control tokens as their text, and the stretches between them as the legacy slow tokenizer joins them."""
    runs = [(control, list(run)) for control, run in groupby(ids, key=tokenizer.control_ids.__contains__)]
    for number, (control, run) in enumerate(runs):
        if control:
            yield b"".join(map(tokenizer.token_bytes, run)).decode()
        else:
            yield (" " if number + 1 < len(runs) else "") + decode(tokenizer, run, skip_special=True)


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where to cut: the start of the stop string that is completed first, None if there is none."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
