"""A small tokenizer with the official special tokens: a byte-fallback BPE model learned from a few sentences.

The ids of special tokens lie where the official tokenizers have them: after the pieces in the 12B family, at 101 to
108 (newline at 5, bytes from 113) in the 3B family.
"""

from __future__ import annotations

import io
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from omnilmm.config import Family
from omnilmm.training.export import write_json

ADDED_12B = ("<im_patch>", "<im_start>", "<im_end>", "<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>")
SPECIAL_3B = ("<image>", "</image>", "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
FIRST_SPECIAL_3B = 101
FIRST_BYTE_3B = 113
NEWLINE_3B = 5
REQUIRED_CHARS = string.ascii_letters + string.digits + string.punctuation + "用户"  # the marks of both chat formats

# The template of HuggingFaceH4/zephyr-7b-beta: a prompt made with it has to be the official one to the letter.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def train_tokenizer(
    sentences: Iterable[str], family: Family, *, num_pieces: int, delimiter: str = "", characters: str = ""
) -> bytes:
    """The content of `tokenizer.model`: `num_pieces` pieces learned from the sentences. The same sentences always give
    the same bytes; a few thousand take about a second.

    Args:
        sentences: what to learn from.
        family: decides the special tokens and their ids.
        num_pieces: all of them, bytes and special tokens included.
        delimiter: where it stands in a sentence, no piece may lie across; it is not part of the text.
        characters: get a piece each, however rare they are.
    """
    file = io.BytesIO()
    cutting: dict[str, Any] = {"pretokenization_delimiter": delimiter} if delimiter else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=file,
        model_type="bpe",
        vocab_size=num_pieces,
        character_coverage=0.995,
        required_chars=REQUIRED_CHARS + characters,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=_reserved_pieces() if family is Family.OMNILMM_3B else [],
        num_threads=1,  # with more, the result could depend on timing
        minloglevel=2,
        **cutting,
    )
    return file.getvalue()


def write_tokenizer(folder: Path, model: bytes, family: Family, *, num_pieces: int) -> int:
    """Write `tokenizer.model` and the JSON files that belong to it; the number of ids there are in all."""
    (folder / "tokenizer.model").write_bytes(model)
    files = tokenizer_files(family, num_pieces)
    for name, content in files.items():
        write_json(folder / name, content)
    return num_pieces + len(files.get("added_tokens.json", ()))


def tokenizer_files(family: Family, num_pieces: int) -> dict[str, Any]:
    """The JSON files that belong to the tokenizer, by name."""
    if family is Family.OMNILMM_12B:
        ids = {text: num_pieces + index for index, text in enumerate(ADDED_12B)}
        basic = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        additional = ["<unk>", "<s>", "</s>", *ADDED_12B]
        own = {
            "chat_template": ZEPHYR_TEMPLATE,
            "tokenizer_class": "LlamaTokenizer",
            "truncation_side": "left",
            "use_default_system_prompt": True,
        }
        files: dict[str, Any] = {"added_tokens.json": ids}
    else:
        ids = {text: FIRST_SPECIAL_3B + index for index, text in enumerate(SPECIAL_3B)}
        basic = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        additional = list(SPECIAL_3B)
        own = {
            "padding_side": "right",
            "tokenizer_class": "LlamaTokenizerWrapper",
            "truncation_side": "right",
            "use_default_system_prompt": False,
        }
        files = {}
    known = {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}
    files["tokenizer_config.json"] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {**_token(text), "special": True} for text, index in known.items()},
        "additional_special_tokens": additional,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 2048,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        **basic,
        **own,
    }
    files["special_tokens_map.json"] = {
        "additional_special_tokens": additional,
        **{role: _token(text) for role, text in basic.items()},
    }
    return files


def _reserved_pieces() -> list[str]:
    """Ids 3 to 112 of the 3B tokenizer."""
    pieces = [f"<reserved_{index}>" for index in range(FIRST_BYTE_3B)]
    pieces[NEWLINE_3B] = "\n"
    pieces[FIRST_SPECIAL_3B : FIRST_SPECIAL_3B + len(SPECIAL_3B)] = SPECIAL_3B
    return pieces[3:]


def _token(text: str) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
