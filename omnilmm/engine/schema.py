"""A JSON schema as something that can be followed token by token, by llguidance, under its limits.

Shared by the engine and by the child process that tries a schema out first, so it imports nothing of ours.

A value follows its schema as llguidance reads it (its docs/json_schema.md): properties come in the order of the
schema, `format` is enforced, and a keyword that could not be enforced is an error. Between two tokens of JSON there
may be one space, or a line break with some indentation: a model that only ever writes blanks would never come to an
end otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

WHITESPACE = r"( |\n[ \t]{0,24})"
OPTIONS = "x-guidance"
"""Key of a schema under which llguidance looks for options of its own."""

REHEARSED_STEPS = 16


def parser_limits() -> LLParserLimits:
    """What following a grammar may cost. The limits of a step come to some milliseconds, those of the states, which
    are kept for as long as the grammar is, to some tens of megabytes."""
    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def build_matcher(tokenizer: LLTokenizer, schema: str) -> LLMatcher:
    """Compile a schema, an object in JSON, into a matcher at its beginning, or one in an error state.

    Tokens are never forced: whichever spells a part of a fitting value is allowed, and the model has its choice.
    """
    return LLMatcher(
        tokenizer, f'%llguidance {{"no_forcing": true}}\nstart: %json {schema}', log_level=0, limits=parser_limits()
    )


def rehearse(matcher: LLMatcher) -> str:
    """Take a few steps; the error that comes of them, or "". The matcher is of no use afterwards.

    Some grammars compile, but nothing can ever match them, or their very first choice has too many branches.
    """
    for _ in range(REHEARSED_STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            break
        matcher.consume_token(highest_bit(mask))
    return matcher.get_error() if matcher.is_error() else ""


def highest_bit(mask: bytes) -> int:
    """The highest token allowed by a mask that allows one."""
    return int.from_bytes(mask, "little").bit_length() - 1


def set_bits(mask: bytearray, bits: Iterable[int], value: bool) -> None:
    """Allow or forbid tokens in a mask, of which byte i holds the tokens from 8 * i on, lowest bit first."""
    for bit in bits:
        if value:
            mask[bit >> 3] |= 1 << (bit & 7)
        else:
            mask[bit >> 3] &= ~(1 << (bit & 7))
