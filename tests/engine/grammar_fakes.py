"""A vocabulary of JSON's bytes and of some longer pieces, and schemas that the small model can fulfil."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from omnilmm.engine.grammar import GrammarCompiler, Matcher
from omnilmm.messages import GenerateCall, Grammar, GrammarKind, Sampling

EOS = 2
CONTROL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
PIECES = (
    *'{}[]":, -.\n0123456789abcdefnrstul',
    *(
        '{"',
        '":',
        '",',
        '"}',
        "true",
        "false",
        "null",
        "ab",
        "abc",
        "},",
        "10",
        "12",
        " 1",
        '"a',
        "\n\n",
        "}}",
        "\xe9",
        "g",
        "_",
        "\\",
        '""',
        "[[",
        "]]",
    ),
)


class PieceTokenizer:
    """As many tokens as the small model has."""

    vocab_size = len(CONTROL) + len(PIECES)
    bos_id, eos_id = 1, EOS

    @property
    def special_ids(self) -> dict[str, int]:
        return {text: token_id for token_id, text in enumerate(CONTROL)}

    def token_bytes(self, token_id: int) -> bytes:
        return (*CONTROL, *PIECES)[token_id].encode()


def text_of(ids: Sequence[int], tokenizer=PieceTokenizer()) -> str:  # noqa: B008 - it has no state
    """The answer: its stop id left out."""
    return b"".join(tokenizer.token_bytes(i) for i in ids if i != tokenizer.eos_id).decode()


def grammar(schema: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


ANY_OBJECT = Grammar(GrammarKind.JSON_OBJECT)
RECORD_SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["ab", "c"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NUMBERS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}
RECORD, NUMBERS = grammar(RECORD_SCHEMA), grammar(NUMBERS_SCHEMA)


def formed(form: Grammar = NUMBERS, **fields: object) -> Sampling:
    return Sampling(0, grammar=form, stop_ids=(EOS,), **fields)  # type: ignore[arg-type]


@cache
def the_compiler() -> GrammarCompiler:
    return GrammarCompiler(PieceTokenizer(), vocab_size=PieceTokenizer.vocab_size)


def start_matcher(call: GenerateCall, emitted: Sequence[int] | None = None) -> Matcher | None:
    """What the loop hands over with a call; None for one without a grammar."""
    sampling = call.sampling
    if sampling.grammar is None:
        return None
    emitted = call.emitted if emitted is None else emitted
    return the_compiler().start(sampling.grammar, stop_ids=sampling.stop_ids, emitted=emitted)


def allowed_after(call: GenerateCall, generated: Sequence[int]) -> bytes | None:
    """The mask behind some tokens, by a matcher that has seen nothing else."""
    matcher = start_matcher(call, generated)
    return matcher and matcher.mask(may_stop=len(generated) >= call.sampling.min_tokens)
