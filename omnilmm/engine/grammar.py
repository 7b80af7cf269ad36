"""Structured output: which tokens may come next, so that the answer has the form that was asked for.

A grammar is compiled once (`GrammarCompiler`), away from the thread that takes steps, and followed by one `Matcher`
per sequence. What a matcher allows is a function of the tokens of the answer so far and of nothing else. So it lives
through preemption, and is made anew from the emitted tokens where a sequence goes on in another process.

A grammar ends an answer by allowing nothing but the stop ids once the value is complete. It wins over `min_tokens`:
a complete object cannot be made longer. A call without a stop id (`ignore_eos`) could not end, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from omnilmm.engine.schema import build_matcher, set_bits
from omnilmm.engine.schema_check import GrammarLimits, probe_schema, read_schema, with_options
from omnilmm.errors import InvalidRequest
from omnilmm.messages import Grammar, GrammarKind
from omnilmm.ports import Tokenizer

PARAM = "response_format"
CODE = "invalid_json_schema"
_IN_STRING = r'[^"\\\x00-\x1F\x7F]'
SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    r"[a-zA-Z0-9]{1,10}",
    *(_IN_STRING + times for times in ("{1,10}", "{1,20}", "{1,30}", "+")),
)
"""Kinds of tokens that llguidance allows at one go where all of a kind fit. Its own are these without two: words and
numbers fit into formats, patterns and the last characters of strings, and strings near their end have twenty."""
MAX_FORKS = 64
"""Sequences that share what a grammar has learned about the vocabulary: it grows with each of them."""


class Matcher:
    """The form of one sequence's answer, from the tokens it has so far."""

    def __init__(
        self, matcher: LLMatcher, stop_ids: Sequence[int], *, eos_id: int, retire: Callable[[], None] = lambda: None
    ) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._eos_id = eos_id
        self._retire = retire
        self._fits = b""  # tokens that go on with the value
        self._is_accepting = self._is_complete = False
        self._look()

    @property
    def is_complete(self) -> bool:
        """Nothing can be added to the value."""
        return self._is_complete

    def advance(self, token_ids: Sequence[int]) -> None:
        """The answer has grown by these tokens, none of them the one that ended it.

        Raises:
            InvalidRequest: they do not fit, or what may follow is too hard to find out.
        """
        self._matcher.consume_tokens(list(token_ids))
        self._look()

    def mask(self, *, may_stop: bool) -> bytes:
        """The tokens that may come next: byte i holds those from 8 * i on, lowest bit first.

        Stop ids are among them if the value may end here and `may_stop`, or if it must end.
        """
        mask = bytearray(self._fits)
        if self._is_complete or (self._is_accepting and may_stop):
            set_bits(mask, self._stop_ids, True)
        elif not may_stop:
            set_bits(mask, self._stop_ids, False)
            if not _has_bits(mask):  # a stop id is a piece of the value, and the only way on
                return self._fits
        return bytes(mask)

    def _look(self) -> None:
        mask = bytearray(self._matcher.compute_bitmask())
        set_bits(mask, (self._eos_id,), False)  # the library's way to say that the value may end
        has_more, self._is_accepting = _has_bits(mask), self._matcher.is_accepting()
        if self._matcher.is_error() or not (has_more or self._is_accepting):
            self._retire()
            raise _refusal("An answer in this form is too hard to follow, or cannot be written.")
        self._fits = bytes(mask)
        self._is_complete = not has_more


def _has_bits(mask: bytearray) -> bool:
    return mask != bytes(len(mask))  # thousands of bytes: what looks at them one by one takes longer than the mask took


class _Compiled:
    """A grammar that sequences begin to follow. Made anew now and then, and after it has failed one of them."""

    def __init__(self, build: Callable[[], LLMatcher]) -> None:
        self._build = build
        self._prototype: LLMatcher | None = None
        self._num_forks = 0

    def fork(self) -> LLMatcher:
        prototype = self._prototype
        if prototype is None or self._num_forks >= MAX_FORKS:
            self._prototype = prototype = self._build()
            self._num_forks = 0
        self._num_forks += 1
        return prototype.deep_copy()

    def retire(self) -> None:
        self._prototype = None


class GrammarCompiler:
    """Grammars of one vocabulary. May be used by several threads; `start` may take seconds.

    Args:
        tokenizer: what each token spells. Control tokens never belong to a value.
        vocab_size: number of scores the model gives, which may differ from the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, limits: GrammarLimits | None = None) -> None:
        self.limits = limits or GrammarLimits()
        self._eos_id = tokenizer.eos_id
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Spellings(tokenizer, vocab_size)), slices=list(SLICES))
        # Thread-safe, and bounded. It keeps refusals too: the same bomb is not set off twice.
        self._try_compile = lru_cache(maxsize=self.limits.max_cached)(self._compile)

    def start(self, grammar: Grammar, *, stop_ids: Sequence[int], emitted: Sequence[int] = ()) -> Matcher:
        """A matcher for an answer that begins with `emitted`.

        Raises:
            InvalidRequest: the schema is invalid, too large, too slow to compile or impossible to fulfil, or uses
                what cannot be enforced; or `emitted` is not the beginning of a fitting answer.
            Overloaded: the machine is too busy to tell.
        """
        if not stop_ids:
            raise InvalidRequest("An answer with a form needs a token to end with: drop ignore_eos.", param=PARAM)
        compiled = self._try_compile(grammar)
        if isinstance(compiled, str):
            raise _refusal(compiled)
        matcher = Matcher(compiled.fork(), stop_ids, eos_id=self._eos_id, retire=compiled.retire)
        if emitted:
            matcher.advance(emitted)
        return matcher

    def _compile(self, grammar: Grammar) -> _Compiled | str:
        """What to follow, or why not."""
        if grammar.kind is GrammarKind.JSON_OBJECT:
            schema = with_options({"type": "object"})
        else:
            try:
                schema = read_schema(grammar.source, self.limits)
            except ValueError as error:
                return str(error)  # of our own making
            if problem := probe_schema(schema, self.limits):
                return problem
        return _Compiled(lambda: build_matcher(self._tokenizer, schema))


class _Spellings:
    """A vocabulary as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) if i < known else b"" for i in range(vocab_size)]
        self.special_token_ids = [i for i in tokenizer.special_ids.values() if i < vocab_size]

    def __call__(self, text: bytes | str) -> list[int]:
        """Asked once for a trial, and where tokens are forced, which is never."""
        return []


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param=PARAM, code=CODE)
