"""Both kinds of tokenizer file: the ids of the library that made them, offsets, spellings, and clear refusals."""

import json
import shutil

import pytest
from hypothesis import given
from prompt_cases import CONTROL_STRINGS, MINICPM, OMNI, hostile_text, make_metaspace, plain_text, quick
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from omnilmm.config import Family
from omnilmm.errors import CheckpointError
from omnilmm.prompt.template import load_template
from omnilmm.prompt.tokens import JsonVocabulary, SentencePieceVocabulary, load_tokenizer


def test_both_families_use_their_sentencepiece_model(omni, minicpm):
    for template, size in ((omni, 649), (minicpm, 820)):
        tokenizer = template.tokenizer
        assert isinstance(tokenizer, SentencePieceVocabulary)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, 1, 2)
        assert tokenizer.adds_bos
    assert omni.tokenizer.special_ids["<im_patch>"] == 640
    assert minicpm.tokenizer.special_ids["</image>"] == 102
    assert "\n" not in minicpm.tokenizer.special_ids  # a piece of its own, but an ordinary one


@quick
@given(text=hostile_text)
def test_parsed_ids_are_those_of_the_originals_library(omni, oracle, text):
    assert [1, *omni.tokenizer.encode_parsed(text)] == oracle.encode(text).ids


@quick
@given(text=plain_text)
def test_a_part_gets_sentencepieces_ids_and_offsets_of_every_character(minicpm, text):
    pieces = minicpm.tokenizer.encode_text(text)
    assert [p.id for p in pieces] == SentencePieceProcessor(model_file=str(MINICPM / "tokenizer.model")).encode(text)
    assert "".join(text[p.start : p.end] for p in pieces) == text


@pytest.mark.parametrize("text", ["a b", "é", "🙂", "\n", "图", "<|user|>", "\0"])
def test_spelling_keeps_the_text_and_joins_nothing(omni, minicpm, byte_level, text):
    for tokenizer in (omni.tokenizer, minicpm.tokenizer, load_tokenizer(byte_level)):
        for ids in (tokenizer.spell(text.encode()), tokenizer.spell_bytes(text.encode())):
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
            assert len(ids) >= len(text)
            assert not tokenizer.control_ids.intersection(ids)


def test_ids_beyond_the_vocabulary_spell_nothing(omni):
    assert omni.tokenizer.token_bytes(649) == b""
    assert omni.tokenizer.token_bytes(-1) == b""


def test_the_longest_of_two_special_tokens_wins(tmp_path):
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 640, "<x>y": 641}', encoding="utf-8")
    assert load_tokenizer(tmp_path).encode_parsed("<x>y<x>") == [641, 640]


def test_a_character_that_is_a_control_token_is_spelled_in_bytes(tmp_path, configure, omni):
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    (z,) = omni.tokenizer.spell(b"z")
    configure(tmp_path, added_tokens_decoder={str(z): {"content": "z", "special": True}})
    assert load_tokenizer(tmp_path).spell(b"z") == omni.tokenizer.spell_bytes(b"z")


# -- tokenizer.json -----------------------------------------------------------------------------------


def test_a_byte_level_tokenizer(byte_level):
    tokenizer = load_tokenizer(byte_level)
    assert isinstance(tokenizer, JsonVocabulary)
    assert tokenizer.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (tokenizer.adds_bos, tokenizer.drops_first_space, tokenizer.replaces_each_byte) == (False, False, False)
    library = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    text = "<|im_start|>user\nnaïve 🙂 图<tool> <|im_end|>\n"
    assert tokenizer.encode_parsed(text) == library.encode(text).ids
    pieces = tokenizer.encode_text(text)
    assert b"".join(tokenizer.token_bytes(p.id) for p in pieces) == text.encode()
    assert not tokenizer.control_ids.intersection(p.id for p in pieces)


def without_bytes(folder, *missing):
    """Take the pieces of these bytes out of a byte-level tokenizer; the characters in its place stay unused."""
    path = folder / "tokenizer.json"
    layout = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = layout["model"]["vocab"]
    for byte in missing:
        piece = chr(byte if byte > 0x20 else 0x100 + byte)  # in GPT-2's alphabet control characters come first
        assert not any(piece in merge for merge in layout["model"]["merges"])
        vocabulary[f"unused {byte}"] = vocabulary.pop(piece)
    path.write_text(json.dumps(layout), encoding="utf-8")


def test_characters_that_a_vocabulary_learned_from_text_lacks(byte_level):
    """SmolLM2's has no piece for some control characters, nor for what begins the unassigned planes of Unicode."""
    whole = load_tokenizer(byte_level)
    without_bytes(byte_level, 0x04, 0x1D, 0xF1, 0xF5)
    tokenizer = load_tokenizer(byte_level)
    text = "What is\x04 in\U00050000 the\x1d picture? 🙂"
    assert tokenizer.encode_parsed(text) == whole.encode_parsed("What is� in� the� picture? 🙂")
    assert [p.end for p in tokenizer.encode_text("a\x04b")][-1] == 3
    assert tokenizer.spell_bytes(b"<|user|>") == whole.spell_bytes(b"<|user|>")


@pytest.mark.parametrize("byte", [0x0A, ord("x"), 0xBD])
def test_bytes_of_ordinary_text_must_be_there(byte_level, byte):
    without_bytes(byte_level, byte)
    with pytest.raises(CheckpointError, match="cannot spell every byte"):
        load_tokenizer(byte_level)


def test_the_json_of_the_12b_gives_what_its_sentencepiece_model_gives(tmp_path, omni):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(OMNI / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, JsonVocabulary)
    assert tokenizer.special_ids == omni.tokenizer.special_ids
    assert tokenizer.max_token_bytes == omni.tokenizer.max_token_bytes
    assert tokenizer.adds_bos
    assert tokenizer.drops_first_space
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_bytes(token_id) == omni.tokenizer.token_bytes(token_id)
        assert tokenizer.is_byte(token_id) == omni.tokenizer.is_byte(token_id)
    for text in CONTROL_STRINGS:
        assert tokenizer.encode_parsed(text) == omni.tokenizer.encode_parsed(text)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_dummy_space_for_the_first_part_only_stays_with_the_first_part(tmp_path, scheme):
    tokenizer = load_tokenizer(make_metaspace(tmp_path, scheme))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("user</s>user</s> user", "</s>user", "user"):
        assert [1, *tokenizer.encode_parsed(text)] == library.encode(text).ids


def test_the_non_legacy_rule_needs_the_json_file(tmp_path):
    make_metaspace(tmp_path, "first")
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), JsonVocabulary)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


# -- refusals -----------------------------------------------------------------------------------------


def test_older_checkpoints_declare_their_tokens_in_other_files(tmp_path, omni):
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(OMNI / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids == omni.tokenizer.special_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_of_garbage_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_broken_small_file_is_named(tmp_path, content):
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change", [{"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"3": {}}}, {"bos_token": 3}]
)
def test_a_strange_config_is_refused(tmp_path, configure, change):
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    configure(tmp_path, **change)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)


def test_an_error_names_the_folder_once(tmp_path):
    for load in (load_tokenizer, lambda folder: load_template(Family.TEXT, folder)):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert str(caught.value).count(str(tmp_path)) == 1


def test_a_gap_in_the_vocabulary(tmp_path):
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<far>": 700}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="<far>"):
        load_tokenizer(tmp_path)


def test_a_token_that_swallows_its_neighbours_is_refused(tmp_path, configure):
    shutil.copy(OMNI / "tokenizer.model", tmp_path)
    configure(tmp_path, added_tokens_decoder={"640": {"content": "<x>", "rstrip": True, "special": True}})
    with pytest.raises(CheckpointError, match="<x>"):
        load_tokenizer(tmp_path)


def test_a_token_that_swallows_its_neighbours_is_refused_in_json_too(byte_level):
    path = byte_level / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"rstrip": false', '"rstrip": true', 1), encoding="utf-8")
    with pytest.raises(CheckpointError, match="surroundings"):
        load_tokenizer(byte_level)


def test_text_must_never_be_lost(tmp_path, sentence_model):
    with pytest.raises(CheckpointError, match="byte fallback"):
        load_tokenizer(sentence_model(byte_fallback=False, vocab_size=80))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="every byte"):
        load_tokenizer(make_metaspace(tmp_path, "never", byte_pieces=False))


def test_a_tokenizer_without_an_end_is_refused(byte_level, configure):
    configure(byte_level, eos_token=None)
    with pytest.raises(CheckpointError, match="EOS"):
        load_tokenizer(byte_level)
