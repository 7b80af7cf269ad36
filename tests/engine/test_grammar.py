"""What a mask allows, against languages small enough to be listed; and schemas that must not get in."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from grammar_fakes import ANY_OBJECT, CONTROL, EOS, RECORD, PieceTokenizer, grammar, the_compiler
from jsonschema import validate

from omnilmm.engine import grammar as module
from omnilmm.engine import schema_check
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.engine.schema_check import GrammarLimits
from omnilmm.errors import InvalidRequest, Overloaded
from omnilmm.messages import Grammar, GrammarKind
from omnilmm.models.config import read_model_config
from omnilmm.prompt.tokens import load_tokenizer

DATA = Path(__file__).parents[1] / "data"
TOKENIZER = PieceTokenizer()
STOP = (EOS,)
LISTS = {"type": "array", "items": {"enum": ["ab", 1, "aba"]}, "maxItems": 2}
BOMB = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + n)}.*"} for n in range(20)]}
"""Strings with twenty letters somewhere in them: 2 ** 20 states before the first token."""


def start(schema: object, emitted: tuple[int, ...] = (), stop_ids: tuple[int, ...] = STOP):
    return the_compiler().start(grammar(schema), stop_ids=stop_ids, emitted=emitted)


def ids_in(mask: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def spell(text: str) -> tuple[int, ...]:
    """The text in tokens of one character each."""
    singles = {TOKENIZER.token_bytes(i): i for i in range(len(CONTROL), TOKENIZER.vocab_size)}
    return tuple(singles[char.encode()] for char in text)


# -- masks --------------------------------------------------------------------------------------------


SCALARS = ["a", "ab", "abc", "cab", 12, 1, 125, None, True]
BLANKS = ("", " ")
LANGUAGES = {
    "scalars": ({"enum": SCALARS}, [json.dumps(value) for value in SCALARS]),
    "object": (
        {"const": {"a": 1}},
        [f'{{{b}"a"{c}:{d}1{e}}}' for b in BLANKS for c in BLANKS for d in BLANKS for e in BLANKS],
    ),
}


@pytest.mark.parametrize(("schema", "language"), LANGUAGES.values(), ids=list(LANGUAGES))
def test_a_token_is_allowed_if_it_leads_somewhere(schema, language):
    """Every prefix of every value, in every spelling: a mask has all tokens that lead to a value, and no other."""
    pieces = {i: TOKENIZER.token_bytes(i).decode() for i in range(len(CONTROL), TOKENIZER.vocab_size)}
    pieces = {i: piece for i, piece in pieces.items() if "\n" not in piece}  # blanks of its own, not listed
    seen = 0

    def walk(ids: tuple[int, ...], text: str) -> None:
        nonlocal seen
        seen += 1
        matcher = start(schema, ids)
        expected = {i for i, piece in pieces.items() if any(v.startswith(text + piece) for v in language)}
        mask = ids_in(matcher.mask(may_stop=True))
        assert {i for i in mask if i in pieces} == expected
        assert (EOS in mask) == (text in language)
        assert not (mask & set(range(len(CONTROL)))) - {EOS}
        assert matcher.is_complete == (text in language and not expected)
        for i in sorted(expected):
            walk((*ids, i), text + pieces[i])

    walk((), "")
    assert seen > 20


def test_a_matcher_made_anew_agrees_with_one_that_went_along():
    draw = random.Random(0)
    for _ in range(20):
        along, ids = start(LISTS), ()
        while not along.is_complete:
            anew = start(LISTS, ids)
            assert anew.mask(may_stop=True) == along.mask(may_stop=True)
            assert anew.is_complete == along.is_complete
            ids = (*ids, draw.choice(sorted(ids_in(along.mask(may_stop=True)) - {EOS})))
            along.advance(ids[-1:])


def test_matchers_of_one_grammar_do_not_touch_one_another():
    one, other = start(LISTS), start(LISTS)
    before = other.mask(may_stop=True)
    one.advance(spell('["a'))
    assert other.mask(may_stop=True) == before != one.mask(may_stop=True)


def test_there_is_an_end_to_blanks():
    matcher = start(RECORD_LIKE := {"type": "object"})
    matcher.advance(spell("{\n"))
    matcher.advance(spell(" ") * 24)
    assert not ids_in(matcher.mask(may_stop=True)) & {*spell(" "), *spell("\n")}
    pretty = json.dumps({"a": {"b": [1, 2]}}, indent=4)
    start(RECORD_LIKE, spell(pretty))  # what models were taught to write still fits


def test_stop_ids_come_in_when_the_value_may_end():
    integer = {"type": "integer", "minimum": 1}
    stops = (EOS, 4)
    for emitted, may_stop, expected in (
        ((), True, False),
        (spell("1"), True, True),
        (spell("1"), False, False),
    ):
        mask = ids_in(start(integer, emitted, stops).mask(may_stop=may_stop))
        assert mask.isdisjoint(stops) != expected
        assert mask > set(spell("1"))
    done = start({"const": 12}, spell("12"), stops)
    assert done.is_complete
    assert ids_in(done.mask(may_stop=False)) == set(stops)  # nothing else is left


def test_a_stop_id_may_be_a_piece_of_the_value():
    (closing,) = spell("]")
    matcher = start({"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2}, spell("[1"), (closing,))
    assert closing in ids_in(matcher.mask(may_stop=True))
    assert closing not in ids_in(matcher.mask(may_stop=False))
    forced = start({"const": "]"}, spell('"'), (closing,))
    assert ids_in(forced.mask(may_stop=False)) == {closing}  # the only way on


def test_ids_beyond_the_tokenizer_are_never_allowed():
    padded = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size + 13)
    matcher = padded.start(ANY_OBJECT, stop_ids=STOP)
    matcher.advance(spell('{"'))
    mask = matcher.mask(may_stop=True)
    assert len(mask) * 8 >= TOKENIZER.vocab_size + 13
    assert max(ids_in(mask)) < TOKENIZER.vocab_size


NODE = {
    "type": "object",
    "properties": {"v": {"type": "number"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["v"],
    "additionalProperties": False,
}
WALKED = {
    "any": {"type": "object"},
    "recursive": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "list": {
        "type": "array",
        "items": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}, {"type": "boolean"}]},
        "minItems": 2,
        "maxItems": 4,
    },
    "formats": {
        "type": "object",
        "properties": {
            "when": {"type": "string", "format": "date"},
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        },
        "required": ["when", "id"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("folder", ["omnilmm-12b-tiny", "minicpm-v-tiny"])
@pytest.mark.parametrize("schema", WALKED.values(), ids=list(WALKED))
def test_walks_through_the_masks_of_real_vocabularies_are_valid(folder, schema):
    tokenizer = load_tokenizer(DATA / folder)
    vocab_size = read_model_config(DATA / folder).language.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab_size=vocab_size)
    draw, num_finished = random.Random(1), 0
    closing = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"}", b"]")}
    for _ in range(12):
        matcher, ids = compiler.start(grammar(schema), stop_ids=(tokenizer.eos_id,)), []
        while len(ids) < 120 and not matcher.is_complete:
            allowed = sorted(ids_in(matcher.mask(may_stop=False)))
            assert not set(allowed) & set(tokenizer.special_ids.values())
            ends = sorted(closing.intersection(allowed))
            ids.append(draw.choice(ends if ends and draw.random() < 0.3 else allowed))
            matcher.advance(ids[-1:])
        if matcher.is_complete:
            num_finished += 1
            assert matcher.mask(may_stop=False) == matcher.mask(may_stop=True)
            validate(json.loads(b"".join(map(tokenizer.token_bytes, ids)).decode()), schema)
    assert num_finished >= 3


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ('{"a": NaN}', "JSON"),
        ('{"const": ' + "9" * 5000 + "}", "JSON"),
        ("[]", "object"),
        ("false", "object"),
        ('{"type": "foo"}', "valid"),
        ('{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
        ('{"uniqueItems": true, "type": "array"}', "uniqueItems"),
        ('{"if": {"type": "object"}, "then": {"required": ["a"]}}', "if, then"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ('{"type": "string", "format": "crystal"}', "format"),
        ('{"type": "string", "pattern": "(?=a)b"}', "pattern"),
        ('{"type": "string", "pattern": "' + "(" * 5000 + "a" + ")" * 5000 + '"}', "pattern"),
        ('{"$ref": "#"}', "No value"),
        ('{"allOf": [{"type": "integer"}, {"type": "string"}]}', "No value"),
        ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', None),  # endless, but never stuck
        ('{"$ref": "#/$defs/nowhere"}', "valid"),
        ('{"$ref": "https://example.com/schema.json"}', "valid"),
        ('{"$ref": "file:///etc/passwd"}', "valid"),
        ('{"enum": ["\\ud800"]}', "valid"),
        ('{"items": ' * 40 + "{}" + "}" * 40, "deep"),
        ('{"items": ' * 5000 + "{}" + "}" * 5000, "deep"),
        (json.dumps({"enum": ["x" * 20 + str(n) for n in range(5000)]}), "larger"),
        (json.dumps({"type": "object", "properties": {f"p{n}": {} for n in range(2000)}}), "complex"),
        (json.dumps({"type": "integer", "multipleOf": 982451653}), "complex"),
        (json.dumps({"enum": [f"value {n}" for n in range(1500)]}), None),  # large, and fine
        ('{"type": "string", "pattern": "(a+)+$"}', None),  # no backtracking here
        ("true", None),
    ],
)
def test_schemas_at_the_door(source, words):
    form = Grammar(GrammarKind.JSON_SCHEMA, source)
    if words is None:
        the_compiler().start(form, stop_ids=STOP)
        return
    with pytest.raises(InvalidRequest, match=words) as caught:
        the_compiler().start(form, stop_ids=STOP)
    assert caught.value.param == "response_format"
    assert "example.com" not in caught.value.message
    assert "passwd" not in caught.value.message


def test_a_bomb_costs_its_limit_once(monkeypatch):
    compiler = GrammarCompiler(TOKENIZER, vocab_size=61, limits=GrammarLimits(timeout_s=1.0))
    with pytest.raises(InvalidRequest, match="too long or too much memory"):
        compiler.start(grammar(BOMB), stop_ids=STOP)
    monkeypatch.setattr(module, "probe_schema", None)
    with pytest.raises(InvalidRequest, match="too long or too much memory"):
        compiler.start(grammar(BOMB), stop_ids=STOP)


def test_memory_is_bounded_too():
    compiler = GrammarCompiler(TOKENIZER, vocab_size=61, limits=GrammarLimits(timeout_s=60, memory_bytes=160 * 1024**2))
    with pytest.raises(InvalidRequest, match="too long or too much memory"):
        compiler.start(grammar(BOMB), stop_ids=STOP)


def test_a_probe_that_cannot_start_is_not_the_schemas_fault(monkeypatch):
    compiler = GrammarCompiler(TOKENIZER, vocab_size=61)
    with monkeypatch.context() as broken:
        broken.setattr(schema_check.sys, "executable", "/nowhere/python")
        with pytest.raises(Overloaded):
            compiler.start(RECORD, stop_ids=STOP)
    compiler.start(RECORD, stop_ids=STOP)  # and nothing was remembered


def test_a_call_that_could_never_end_is_refused():
    with pytest.raises(InvalidRequest, match="ignore_eos") as caught:
        the_compiler().start(RECORD, stop_ids=())
    assert caught.value.param == "response_format"


def test_a_value_that_no_token_spells_is_refused():
    """The vocabulary has no capital letter. The schema is fine, so it shows only where it would be written."""
    matcher = start({"const": "aB"}, spell('"'))
    with pytest.raises(InvalidRequest, match="written"):
        matcher.advance(spell("a"))


def test_emitted_tokens_must_fit():
    with pytest.raises(InvalidRequest):
        start(LISTS, spell("[2"))


# -- the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Schemas in the order in which they were compiled."""
    built: list[str] = []
    build = module.build_matcher

    def record(tokenizer, schema):
        built.append(json.loads(schema).get("const"))
        return build(tokenizer, schema)

    monkeypatch.setattr(module, "build_matcher", record)
    monkeypatch.setattr(module, "probe_schema", lambda schema, limits: "")
    return built


def test_the_cache_is_bounded_and_keeps_what_is_used(builds):
    compiler = GrammarCompiler(TOKENIZER, vocab_size=61, limits=GrammarLimits(max_cached=2))
    for const in "abacab":
        compiler.start(grammar({"const": const}), stop_ids=STOP)
    assert builds == ["a", "b", "c", "b"]


def test_a_grammar_is_made_anew_now_and_then(builds):
    compiler = GrammarCompiler(TOKENIZER, vocab_size=61)
    for _ in range(2 * module.MAX_FORKS):
        compiler.start(grammar({"const": "a"}), stop_ids=STOP)
    assert builds == ["a", "a"]


def test_a_grammar_that_has_failed_is_made_anew(builds):
    compiler = GrammarCompiler(TOKENIZER, vocab_size=61)
    matcher = compiler.start(grammar({"const": "a"}), stop_ids=STOP)
    with pytest.raises(InvalidRequest):
        matcher.advance(spell("b"))
    compiler.start(grammar({"const": "a"}), stop_ids=STOP)
    assert builds == ["a", "a"]
