"""Streams that join to the whole answer, stop strings across borders, and the originals' own answers."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_cases import MINICPM, OMNI, goldens, quick
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from omnilmm.config import Family
from omnilmm.errors import InvalidRequest
from omnilmm.prompt.detokenize import Detokenizer, answer_text, decode, token_text
from omnilmm.prompt.tokens import load_tokenizer

RUNS = [
    pytest.param(
        family, run["sequence_ids"], run["text"], id=f"{folder.name}-{case['image']}-{case['conversation']}-{name}"
    )
    for family, folder in ((Family.OMNILMM_12B, OMNI), (Family.OMNILMM_3B, MINICPM))
    for case in goldens(folder)["cases"]
    for name, run in case.items()
    if isinstance(run, dict) and "sequence_ids" in run
]
EMOJI, CJK = "🙂".encode(), "图".encode()


@pytest.fixture(scope="module", params=[OMNI, MINICPM], ids=["12b", "3b"])
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A byte-level vocabulary in which nothing joins."""
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    folder = tmp_path_factory.mktemp("letters")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return load_tokenizer(folder)


def encoded(tokenizer, text):
    return [piece.id for piece in tokenizer.encode_text(text)]


def stream(tokenizer, chunks, *, skip_special=True, stop=()):
    """Every delta of a stream, and the detokenizer as it ended."""
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special, stop=stop)
    deltas = [detokenizer.push(chunk) for chunk in chunks]
    return [*deltas, detokenizer.flush()], detokenizer


def chunked(ids, cuts):
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(borders)]


# -- the originals' answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "ids", "text"), RUNS)
def test_golden_answers(omni, minicpm, family, ids, text):
    template = omni if family is Family.OMNILMM_12B else minicpm
    assert answer_text(template.tokenizer, ids, family) == text
    assert decode(template.tokenizer, ids, skip_special=template.skip_special).strip() == text


@quick
@given(ids=st.lists(st.integers(0, 648), max_size=40))
def test_12b_answers_are_those_of_the_originals_library(omni, oracle, ids):
    assert answer_text(omni.tokenizer, ids, Family.OMNILMM_12B) == oracle.decode(ids, skip_special_tokens=True).strip()


@quick
@given(ids=st.lists(st.integers(113, 819), max_size=40))
def test_3b_answers_without_control_tokens_are_sentencepieces(minicpm, ids):
    model = SentencePieceProcessor(model_file=str(MINICPM / "tokenizer.model"))
    assert answer_text(minicpm.tokenizer, ids, Family.OMNILMM_3B) == model.decode(ids).strip()


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        (["<s>"], ""),
        (["<s>", "</s>"], ""),
        (["<s>", " the", "</s>"], "the"),
        (["<s>", " the", "<unk>", " man", "</s>", "<unk>"], "the man"),
        (["<s>", "<s>", " the", "</s>", "</s>"], "<s> the</s>"),
        (["<ref>", " the", " man", "</ref>", "<box>", "1", "</box>"], "<ref> the man</ref><box> 1</box>"),
        ([" the", "<box>", "</box>", " man"], "the<box></box>man"),
        ([" the", "</s>", " man"], "the</s>man"),
    ],
)
def test_3b_answers_with_control_tokens(minicpm, tokens, text):
    tokenizer = minicpm.tokenizer
    ids = []
    for token in tokens:
        special = tokenizer.special_ids.get(token)
        ids += [special] if special is not None else encoded(tokenizer, token.removeprefix(" "))[token == "1" :]
    assert answer_text(tokenizer, ids, Family.OMNILMM_3B) == text


def test_answers_of_text_models(omni):
    ids = [1, *encoded(omni.tokenizer, "the man"), 2]
    assert answer_text(omni.tokenizer, ids, Family.TEXT) == "the man"


# -- streams ------------------------------------------------------------------------------------------


@quick
@given(
    ids=st.lists(st.integers(-1, 825), max_size=40),
    cuts=st.lists(st.integers(0, 1000), max_size=10),
    skip=st.booleans(),
)
def test_chunks_of_any_ids_join_to_the_whole(tokenizer, ids, cuts, skip):
    deltas, _ = stream(tokenizer, chunked(ids, cuts), skip_special=skip)
    assert "".join(deltas) == decode(tokenizer, ids, skip_special=skip)


@quick
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd")),
    cuts=st.lists(st.integers(0, 1000), max_size=10),
)
def test_text_comes_back_and_no_chunk_ends_inside_a_character(tokenizer, text, cuts):
    deltas, _ = stream(tokenizer, chunked(encoded(tokenizer, text), cuts))
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@quick
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_byte_level_text_comes_back_token_by_token(letters, text):
    deltas, _ = stream(letters, [[i] for i in encoded(letters, text)])
    assert "".join(deltas) == text


def test_a_character_is_held_until_it_is_whole(tokenizer):
    detokenizer = Detokenizer(tokenizer, skip_special=True)
    first, *rest = tokenizer.spell_bytes(EMOJI)
    assert detokenizer.push([first]) == detokenizer.push(rest[:2]) == ""
    assert detokenizer.push(rest[2:]) == "🙂"


def test_bytes_that_never_become_a_character(tokenizer, letters):
    def spelled(raw, vocabulary=tokenizer):
        return vocabulary.spell_bytes(raw)

    lone, a = EMOJI[:3], tokenizer.spell(b"a")
    deltas, _ = stream(tokenizer, [spelled(lone), a])
    assert deltas == ["", "\ufffd\ufffd\ufffda", ""]  # one per byte, as SentencePiece has it
    deltas, _ = stream(tokenizer, [spelled(lone)])
    assert deltas == ["", "\ufffd\ufffd\ufffd"]
    deltas, _ = stream(tokenizer, [spelled(b"\xff"), spelled(CJK[:1]), spelled(CJK[1:])])
    assert deltas == ["\ufffd", "", "图", ""]
    assert decode(letters, spelled(lone + b"a", letters), skip_special=True) == "\ufffda"  # one per sequence


def test_control_tokens_are_left_out_or_shown(tokenizer):
    box = [tokenizer.special_ids["<box>"], tokenizer.special_ids["</box>"]]
    ids = [1, *encoded(tokenizer, "the"), box[0], *encoded(tokenizer, "man"), box[1], 0, 2]
    assert decode(tokenizer, ids, skip_special=True) == "the man"
    assert decode(tokenizer, ids, skip_special=False) == "the<box> man</box>"


def test_only_the_first_space_is_dropped(tokenizer, letters):
    assert decode(tokenizer, encoded(tokenizer, "  x "), skip_special=True) == "  x "
    assert decode(letters, encoded(letters, " x"), skip_special=True) == " x"


def test_a_token_as_log_probabilities_list_it(tokenizer):
    (the,) = encoded(tokenizer, "the")
    assert token_text(tokenizer, the) == (" the", b" the")
    assert token_text(tokenizer, tokenizer.spell_bytes(EMOJI)[0]) == ("\ufffd", EMOJI[:1])
    assert token_text(tokenizer, 2) == ("</s>", b"</s>")


# -- stop strings -------------------------------------------------------------------------------------


def cut(text, stops):
    """The rule, one character at a time: the answer ends in front of what is completed first."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@quick
@given(
    text=st.text("abc \n图", max_size=40),
    stops=st.lists(st.text("abc \n图", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 1000), max_size=20),
)
def test_stop_strings_wherever_the_chunks_end(tokenizer, text, stops, cuts):
    deltas, detokenizer = stream(tokenizer, chunked(encoded(tokenizer, text), cuts), stop=stops)
    assert ("".join(deltas), detokenizer.stopped) == cut(text, stops)


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    detokenizer = Detokenizer(tokenizer, skip_special=True, stop=["\n\nQ:"])
    letters = [tokenizer.spell(char.encode()) for char in "a\n\n\nQ:b"]
    assert [detokenizer.push(ids) for ids in letters] == ["a", "", "", "\n", "", "", ""]
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


def test_held_text_is_given_out_at_the_end(tokenizer):
    deltas, detokenizer = stream(tokenizer, [encoded(tokenizer, "the man")], stop=["mango"])
    assert deltas == ["the ", "man"]
    assert not detokenizer.stopped


def test_a_stop_string_can_be_completed_by_a_broken_character(tokenizer):
    deltas, detokenizer = stream(tokenizer, [tokenizer.spell(b"a"), tokenizer.spell_bytes(CJK[:1])], stop=["\ufffd"])
    assert deltas == ["a", "", ""]
    assert detokenizer.stopped


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(InvalidRequest) as caught:
        Detokenizer(tokenizer, skip_special=True, stop=["a", ""])
    assert caught.value.param == "stop"
