"""Load a checkpoint's tokenizer: SentencePiece (`tokenizer.model`) or byte-level and other BPE (`tokenizer.json`).

Both official OmniLMM checkpoints use a SentencePiece BPE model with byte fallback under the *legacy* rule of
transformers' LlamaTokenizer: a text is cut at special tokens and every part is encoded by itself, each with its own
dummy space in front. Nothing of transformers is imported and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as JsonProcessor

from omnilmm.errors import CheckpointError
from omnilmm.prompt.vocabulary import NUM_BYTES, Piece, Special, Vocabulary

_META_SPACE = "▁"
_SHRINK_PROBE = "  x  Ａ ﬁ ① e\u0301 \u200b \u3000\t"
"""Text that every stock SentencePiece normaliser changes: runs of spaces, compatibility forms, combining marks."""
_UNKNOWN = "\ufffd"
_INDISPENSABLE = frozenset((*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *_UNKNOWN.encode()))
"""Bytes that a byte-level vocabulary must have. SmolLM2's, learned from text, lacks six control characters and what
begins the unassigned planes of Unicode; its own library drops such characters, and we put U+FFFD in their place."""


def load_tokenizer(folder: Path) -> Vocabulary:
    """The tokenizer of the checkpoint in `folder`.

    `tokenizer.model` is preferred; `tokenizer.json` is used where it is the only one, or where the checkpoint asks
    for the non-legacy rule (``"legacy": false``), which SentencePiece by itself cannot express.

    Raises:
        CheckpointError: a file is missing, unreadable, or of a kind we cannot follow exactly. The message names it.
    """
    with naming(folder):
        declared = _read_declared(folder)
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        if model.is_file() and declared.legacy:
            return SentencePieceVocabulary(model, declared)
        if fast.is_file():
            return JsonVocabulary(fast, declared)
        if model.is_file():
            raise CheckpointError("tokenizer.model does not follow the legacy rule, which needs a tokenizer.json too.")
        raise CheckpointError("There is neither tokenizer.model nor tokenizer.json.")


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Puts the folder in front of what a CheckpointError says."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.message}") from error


# -- what the small JSON files declare ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Declared:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja, read together."""

    added: tuple[Special, ...]
    names: tuple[str, ...]  # texts declared special without an id
    bos: str | None
    eos: str | None
    adds_bos: bool
    legacy: bool
    chat_template: str | None


def _read_declared(folder: Path) -> _Declared:
    config = _read_json(folder / "tokenizer_config.json")
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    template = folder / "chat_template.jinja"
    try:
        added = {int(key): entry for key, entry in merged.get("added_tokens_decoder", {}).items()}
        for text, token_id in _read_json(folder / "added_tokens.json").items():
            added.setdefault(token_id, {"content": text, "special": True})
        named = [_content(merged.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
        named += [_content(entry) for entry in merged.get("additional_special_tokens") or ()]
        return _Declared(
            added=tuple(_declared_special(token_id, entry) for token_id, entry in added.items()),
            names=tuple(name for name in named if name),
            bos=_content(merged.get("bos_token")),
            eos=_content(merged.get("eos_token")),
            adds_bos=bool(merged.get("add_bos_token", True)),
            legacy=merged.get("legacy") is not False,
            chat_template=(
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _default_template(merged.get("chat_template"))
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("tokenizer_config.json, or a file beside it, is not laid out as expected.") from error


def _special(token_id: int, text: str, *, control: bool, alters: bool) -> Special:
    if alters:
        raise CheckpointError(f"Special token {text!r} alters its surroundings, which is not supported.")
    return Special(token_id, text, control)


def _declared_special(token_id: int, entry: Mapping[str, Any]) -> Special:
    alters = any(entry.get(key) for key in ("lstrip", "rstrip", "single_word"))
    return _special(token_id, entry["content"], control=bool(entry.get("special")), alters=alters)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read as JSON.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object.")
    return value


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    """The text of a token given as a string or as ``{"content": ...}``."""
    return token.get("content") if isinstance(token, Mapping) else token


def _default_template(declared: str | list[dict[str, str]] | None) -> str | None:
    """The template for ordinary chats, where a checkpoint has several by name."""
    if isinstance(declared, list):
        return {entry["name"]: entry["template"] for entry in declared}.get("default")
    return declared


# -- SentencePiece ------------------------------------------------------------------------------------


class SentencePieceVocabulary(Vocabulary):
    """`tokenizer.model` through the sentencepiece library."""

    def __init__(self, path: Path, declared: _Declared) -> None:
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path.name} cannot be read as a SentencePiece model.") from error
        pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(NUM_BYTES)]
        if not all(map(processor.is_byte, byte_ids)):
            raise CheckpointError(f"{path.name} has no byte fallback: text outside its vocabulary would be lost.")
        bos = _framing(pieces, declared.bos, processor.bos_id())
        eos = _framing(pieces, declared.eos, processor.eos_id())
        names = (*declared.names, bos, eos, pieces[processor.unk_id()])
        specials = _with_named(declared.added, names, {piece: index for index, piece in enumerate(pieces)})
        probe = _SHRINK_PROBE.replace(" ", _META_SPACE)
        super().__init__(
            spellings=_overlaid([_spelling(piece) for piece in pieces], specials),
            byte_ids=dict(enumerate(byte_ids)),
            char_ids=_char_ids(enumerate(pieces), specials),
            specials=specials,
            bos=bos,
            eos=eos,
            adds_bos=declared.adds_bos,
            drops_first_space=processor.normalize("x").startswith(_META_SPACE),
            replaces_each_byte=True,
            fixed_length=processor.normalize(_SHRINK_PROBE) in (probe, _META_SPACE + probe),
            chat_template=declared.chat_template,
        )
        self._processor = processor

    def encode_text(self, text: str, *, first: bool = True) -> list[Piece]:
        encoded = self._processor.encode(text, return_type="offset_mapping")
        return [Piece(i, *offsets) for i, offsets in zip(encoded["ids"], encoded["offsets"], strict=True)]


def _with_named(added: tuple[Special, ...], names: Iterable[str | None], ids: Mapping[str, int]) -> tuple[Special, ...]:
    """The added tokens, and those that are special by name and stand among the pieces."""
    known = {special.text for special in added}
    missing = dict.fromkeys(name for name in names if name in ids and name not in known)
    return (*added, *(Special(ids[name], name, control=True) for name in missing if name))


def _overlaid(spellings: list[bytes], specials: Iterable[Special]) -> list[bytes]:
    """What ids spell, with special tokens in their places or behind the last piece."""
    for special in sorted(specials):
        if special.id > len(spellings):
            raise CheckpointError(f"Added token {special.text!r} leaves a gap in the vocabulary.")
        spellings[special.id : special.id + 1] = [special.text.encode()]
    return spellings


def _framing(pieces: list[str], declared: str | None, index: int) -> str | None:
    """The text of BOS or EOS: as the files name it, else as the model has it."""
    return declared or (pieces[index] if index >= 0 else None)


def _char_ids(pieces: Iterable[tuple[int, str]], specials: Iterable[Special]) -> dict[str, int]:
    """Ordinary metaspace pieces of one character."""
    taken = {special.id for special in specials}
    return {p.replace(_META_SPACE, " "): index for index, p in pieces if len(p) == 1 and index not in taken}


def _spelling(piece: str) -> bytes:
    """UTF-8 of a metaspace piece; ``<0x0A>`` is one byte."""
    if len(piece) == len("<0x00>") and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(_META_SPACE, " ").encode()


# -- tokenizer.json -----------------------------------------------------------------------------------


class JsonVocabulary(Vocabulary):
    """`tokenizer.json` through the tokenizers library: byte-level BPE, or metaspace BPE with byte fallback."""

    def __init__(self, path: Path, declared: _Declared) -> None:
        try:
            layout = json.loads(path.read_text(encoding="utf-8"))
            processor = JsonProcessor.from_str(json.dumps(layout))
            behind = JsonProcessor.from_str(json.dumps(_never_first(layout)))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path.name} cannot be read as a tokenizer.") from error
        alphabet = _byte_alphabet() if "ByteLevel" in _kinds(layout.get("decoder")) else None
        byte_pieces = alphabet or [f"<0x{byte:02X}>" for byte in range(NUM_BYTES)]
        byte_ids = {b: i for b, piece in enumerate(byte_pieces) if (i := processor.token_to_id(piece)) is not None}
        if not byte_ids.keys() >= (_INDISPENSABLE if alphabet else set(range(NUM_BYTES))):
            raise CheckpointError(f"{path.name} cannot spell every byte: text outside its vocabulary would be lost.")
        pieces = {index: piece for piece, index in processor.get_vocab(with_added_tokens=True).items()}
        added = processor.get_added_tokens_decoder()
        specials = [
            _special(
                index, token.content, control=token.special, alters=token.lstrip or token.rstrip or token.single_word
            )
            for index, token in added.items()
        ]
        spell = _spelling if alphabet is None else partial(_byte_level_spelling, {c: b for b, c in enumerate(alphabet)})
        char_ids = _char_ids(pieces.items(), specials) if alphabet is None else {}
        bos_id = processor.token_to_id(declared.bos) if declared.bos else None
        super().__init__(
            spellings=_overlaid([spell(pieces.get(index, "")) for index in range(max(pieces) + 1)], specials),
            byte_ids=byte_ids,
            char_ids=char_ids,
            specials=[special for special in specials if special.control],
            bos=declared.bos,
            eos=declared.eos,
            adds_bos=processor.encode("").ids[:1] == [bos_id],
            drops_first_space=not processor.decode([char_ids.get(" ", byte_ids[ord(" ")])]),
            replaces_each_byte=alphabet is None,
            fixed_length=_keeps_length(layout.get("normalizer")),
            chat_template=declared.chat_template,
        )
        processor.encode_special_tokens = behind.encode_special_tokens = True  # their text is text here
        self._processor, self._behind = processor, behind
        self._unknown_bytes = frozenset(range(NUM_BYTES)) - byte_ids.keys()

    def encode_text(self, text: str, *, first: bool = True) -> list[Piece]:
        if self._unknown_bytes and not self._unknown_bytes.isdisjoint(text.encode()):
            text = "".join(char if self._unknown_bytes.isdisjoint(char.encode()) else _UNKNOWN for char in text)
        encoded = (self._processor if first else self._behind).encode(text, add_special_tokens=False)
        return [Piece(i, *offsets) for i, offsets in zip(encoded.ids, encoded.offsets, strict=True)]


def _never_first(layout: Any) -> Any:
    """The same tokenizer for parts behind a control token: a dummy space meant for the first part only is gone."""
    if isinstance(layout, dict):
        changed = {key: _never_first(value) if key != "model" else value for key, value in layout.items()}
        return {**changed, "prepend_scheme": "never"} if layout.get("prepend_scheme") == "first" else changed
    return [_never_first(value) for value in layout] if isinstance(layout, list) else layout


def _kinds(component: Any) -> set[str]:
    """The ``type`` of a component of tokenizer.json and of all that is inside it."""
    if isinstance(component, list):
        return set().union(*map(_kinds, component))
    if not isinstance(component, dict):
        return set()
    return {component.get("type", "")}.union(*map(_kinds, component.values()))


def _keeps_length(normalizer: dict[str, Any] | None) -> bool:
    """Whether nothing but the metaspace is done to a text before it is encoded."""
    match normalizer:
        case None | {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": " "}, "content": content}:
            return bool(content == _META_SPACE)
        case {"type": "Sequence", "normalizers": inner}:
            return all(map(_keeps_length, inner))
        case _:
            return False


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2): printable Latin-1 stands for itself, the
    other 68 bytes for U+0100 onwards in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(NUM_BYTES)]


def _byte_level_spelling(byte_of: Mapping[str, int], piece: str) -> bytes:
    return b"".join(bytes((byte_of[char],)) if char in byte_of else char.encode() for char in piece)
