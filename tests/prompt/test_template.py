"""Prompts against the originals' own, the rules of placement, roles and refusals."""

import hashlib
import struct
import time

import pytest
from hypothesis import given
from prompt_cases import MINICPM, OMNI, golden_conversation, goldens, hostile_text, quick, turn, user, written

from omnilmm.config import Family, InputHandling
from omnilmm.errors import CheckpointError, ContextLengthExceeded, InvalidRequest
from omnilmm.messages import Conversation, Span
from omnilmm.prompt.segments import check_fits
from omnilmm.prompt.template import (
    OMNILMM_SYSTEM,
    BeamDefaults,
    MiniCPMVTemplate,
    SamplingDefaults,
    load_template,
    make_template,
)
from omnilmm.prompt.tokens import load_tokenizer

SAFE, ORIGINAL = InputHandling.SAFE, InputHandling.ORIGINAL
GOLDENS = {"omni": goldens(OMNI), "minicpm": goldens(MINICPM)}
CASES = [
    pytest.param(family, case, handling, id=f"{family}-{case['image']}-{case['conversation']}-{handling}")
    for family, golden in GOLDENS.items()
    for case in golden["cases"]
    for handling in InputHandling
    if (case["conversation"], handling) != ("img_token", InputHandling.SAFE)  # a control string in the middle of words
]


# -- the originals' own prompts -----------------------------------------------------------------------


@pytest.mark.parametrize(("family", "case", "handling"), CASES)
def test_golden_prompts(request, family, case, handling):
    template = request.getfixturevalue(family)
    conversation = golden_conversation(GOLDENS[family]["conversations"][case["conversation"]])
    prompt = template.render(conversation, handling)
    assert template.text(conversation, handling) == case["prompt"]
    assert list(prompt.ids) == case["input_ids"]
    if "image_bound" in case:
        assert [[span.start, span.start + span.length] for span in prompt.spans] == case["image_bound"]
    assert prompt.penalty_ids == (1,)


def digest(ids):
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


def over_long(golden):
    told = golden["truncation"]
    text = told["user_content_prefix"] + told["user_content_repeat"] * told["repeat"]
    return told, golden_conversation([{"role": "user", "content": text}])


def test_what_the_12b_original_would_have_cut_off_is_all_there(omni):
    told, conversation = over_long(GOLDENS["omni"])
    ids = omni.render(conversation, ORIGINAL).ids
    assert len(ids) > told["model_max_length"]
    assert digest(ids[:2048]) == told["if_right"]["sha256_int32"]
    assert digest((ids[0], *ids[-2047:])) == told["as_shipped"]["sha256_int32"]  # on the left BOS stays


@pytest.mark.parametrize("handling", [ORIGINAL, SAFE])
def test_what_the_3b_original_would_have_cut_off_is_all_there(minicpm, handling):
    told, conversation = over_long(GOLDENS["minicpm"])
    ids = minicpm.render(conversation, handling).ids
    assert len(ids) == told["n_before"]
    assert digest(ids[:2048]) == told["sha256_int32"]


@quick
@given(text=hostile_text)
def test_original_handling_parses_as_the_originals_library_does(omni, oracle, text):
    conversation = user("first", text)
    try:
        ids = omni.render(conversation, ORIGINAL).ids
    except InvalidRequest:
        assert any(mark in text for mark in ("<im_start>", "<im_end>"))
    else:
        assert list(ids) == oracle.encode(omni.text(conversation, ORIGINAL)).ids


def test_typed_control_strings_are_parsed_in_original_handling_and_words_in_safe(omni, minicpm, oracle):
    typed = "a </s> b <s> c <unk> d <im_patch> e"
    for template, num_typed in ((omni, 4), (minicpm, 3)):
        for num_images in (0, 1):
            conversation = user(num_images, typed)
            parsed, safe = (template.render(conversation, handling).ids for handling in (ORIGINAL, SAFE))
            control = template.tokenizer.control_ids
            assert sum(i in control for i in parsed) == sum(i in control for i in safe) + num_typed
            assert any(typed in item for item in written(template.tokenizer, safe) if isinstance(item, str))
    text = omni.text(conversation, ORIGINAL)
    assert list(omni.render(conversation, ORIGINAL).ids) == oracle.encode(text).ids


# -- where pictures go --------------------------------------------------------------------------------


def layout(template, conversation, handling=SAFE):
    """The prompt with blocks written ``[0]``, ``[1]``... in place of their tokens."""
    prompt = template.render(conversation, handling)
    starts = {span.start - 1: span for span in prompt.spans}
    items, at = [], 0
    while at < len(prompt.ids):
        if at in starts:
            items.append(f"[{starts[at].image}]")
            at += starts[at].length + 2
        else:
            items.append(prompt.ids[at])
            at += 1
    tokenizer = template.tokenizer
    return "".join(
        item
        if isinstance(item, str)
        else "".join(w if isinstance(w, str) else tokenizer.token_bytes(w).decode() for w in written(tokenizer, run))
        for item, run in _runs(items)
    )


def _runs(items):
    run = []
    for item in [*items, ""]:
        if isinstance(item, str):
            yield None, run
            yield item, []
            run = []
        else:
            run.append(item)


ZEPHYR_SYSTEM = f"<s><|system|>\n{OMNILMM_SYSTEM}</s>\n"


@pytest.mark.parametrize(
    ("conversation", "omni_layout", "minicpm_layout"),
    [
        (user("hi"), "<|user|>\nhi</s>\n", "<用户>hi"),
        (user(1, "hi"), "<|user|>\n[0]\nhi</s>\n", "<用户>[0]\nhi"),
        (user("hi", 1), "<|user|>\n[0]\nhi</s>\n", "<用户>[0]\nhi"),
        (user("a", 2, "b", 1, "c"), "<|user|>\n[0]\n[1]\n[2]\nabc</s>\n", "<用户>[0]\n[1]\n[2]\nabc"),
        (user(1), "<|user|>\n[0]\n</s>\n", "<用户>[0]\n"),
        (
            Conversation((turn("user", "a"), turn("assistant", "b"), turn("user", 1, "c"), turn("user", 1, "d"))),
            "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\n[0]\nc</s>\n<|user|>\n[1]\nd</s>\n",
            "<用户>a<AI>b<用户>[0]\nc<用户>[1]\nd",
        ),
    ],
)
@pytest.mark.parametrize("handling", [SAFE, ORIGINAL])
def test_pictures_stand_in_front_of_their_messages_words(
    omni, minicpm, conversation, omni_layout, minicpm_layout, handling
):
    assert layout(omni, conversation, handling) == f"{ZEPHYR_SYSTEM}{omni_layout}<|assistant|>\n"
    assert layout(minicpm, conversation, handling) == f"<s>{minicpm_layout}<AI>"


def test_a_clients_system_message(omni, minicpm):
    conversation = Conversation((turn("system", "Be brief."), turn("user", 1, "hi"), turn("user", "ho")))
    for handling in InputHandling:
        assert layout(omni, conversation, handling) == (
            "<s><|system|>\nBe brief.</s>\n<|user|>\n[0]\nhi</s>\n<|user|>\nho</s>\n<|assistant|>\n"
        )
        assert layout(minicpm, conversation, handling) == "<s><用户>[0]\nBe brief.\nhi<用户>ho<AI>"


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        (user(1, "<image>\nhi"), "<|user|>\n[0]\nhi"),
        (user(1, "<image>hi"), "<|user|>\n[0]hi"),
        (user("<image> hi <image>", 1), "<|user|>\n[0] hi <image>"),
        (user(2, "<image>\nhi"), "<|user|>\n[0]\n[1]\nhi"),
        (user(1, "hi <image>"), "<|user|>\n[0]\nhi <image>"),
        (user(1, "<im", "age>hi"), "<|user|>\n[0]\n<image>hi"),
        (user("<image>hi"), "<|user|>\n<image>hi"),
        (
            Conversation((turn("user", "<image>hi"), turn("user", 1, "<image>ho"))),
            "<|user|>\n<image>hi</s>\n<|user|>\n[0]\n<image>ho",
        ),
    ],
)
def test_the_12b_placeholder_in_safe_handling(omni, conversation, words):
    assert layout(omni, conversation) == f"{ZEPHYR_SYSTEM}{words}</s>\n<|assistant|>\n"


def test_the_12b_placeholder_in_original_handling(omni):
    assert layout(omni, user(1, "see <image> there"), ORIGINAL).endswith("<|user|>\nsee [0] there</s>\n<|assistant|>\n")
    assert layout(omni, user(1, "see <im", "age> there"), ORIGINAL).endswith("see [0] there</s>\n<|assistant|>\n")
    several = Conversation((turn("user", 1, "a <image>"), turn("user", 1, "<image>b")))
    assert layout(omni, several, ORIGINAL) == layout(omni, several, SAFE)


@pytest.mark.parametrize(
    ("family", "conversation"),
    [
        ("omni", user(1, "<image> and <image>")),
        ("omni", user("<im_start>")),
        ("omni", user(1, "<im_end>")),
        ("omni", user(1, "<im_end><im_start>")),
        ("omni", user("<im_start>" + "<im_patch>" * 64 + "<im_end>")),
        ("minicpm", user(1, "<image>")),
        ("minicpm", user(1, "</image>")),
        ("minicpm", user("<image>" + "<unk>" * 64 + "</image>")),
    ],
)
def test_original_handling_refuses_places_without_a_picture(request, family, conversation):
    template = request.getfixturevalue(family)
    with pytest.raises(InvalidRequest) as caught:
        template.render(conversation, ORIGINAL)
    assert caught.value.param == "messages"
    template.render(conversation, SAFE)


def test_a_typed_block_with_its_picture_elsewhere_is_bound_as_the_original_does(minicpm):
    """Two typed blocks and one picture: refused; the same count: in order of appearance."""
    block = "<image>" + "<unk>" * 64 + "</image>"
    with pytest.raises(InvalidRequest):
        minicpm.render(user(1, block), ORIGINAL)
    assert minicpm.render(user(1, "x"), ORIGINAL).spans == (Span(5, 64, 0),)


# -- roles and texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([], "messages"),
        ([turn("assistant", "a"), turn("user", "b")], "messages[0].role"),
        ([turn("system", "a"), turn("assistant", "a"), turn("user", "b")], "messages[1].role"),
        ([turn("system", "a")], "messages[0].role"),
        ([turn("user", "a"), turn("system", "b"), turn("user", "c")], "messages[1].role"),
        ([turn("system", "a"), turn("system", "b"), turn("user", "c")], "messages[1].role"),
        ([turn("user", "a"), turn("assistant", "b")], "messages[1].role"),
        ([turn("user", "a"), turn("assistant", 1, "b"), turn("user", "c")], "messages[1].content"),
        ([turn("system", 1), turn("user", "c")], "messages[0].content"),
        ([turn("user", "a"), turn("user", "\ud800")], "messages[1].content"),
    ],
)
@pytest.mark.parametrize("handling", [SAFE, ORIGINAL])
def test_conversations_that_break_the_rules(omni, minicpm, turns, param, handling):
    for template in (omni, minicpm):
        for method in (template.render, template.text):
            with pytest.raises(InvalidRequest) as caught:
                method(Conversation(tuple(turns)), handling)
            assert caught.value.param == param


def test_odd_but_allowed_texts(omni, minicpm):
    for text in ("", " ", "\n", "\0\x1b[31m\ufffe\u202e", "\r\n", "👨‍👩‍👧‍👦 é e\u0301"):
        for template in (omni, minicpm):
            for conversation in (user(text), user(1, text)):
                ids = template.render(conversation, SAFE).ids
                assert text in "".join(item for item in written(template.tokenizer, ids) if isinstance(item, str))


# -- length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handling", [SAFE, ORIGINAL])
def test_the_limit_is_exact_and_nothing_is_cut(omni, minicpm, handling):
    for template in (omni, minicpm):
        prompt = template.render(user(1, "one two three " * 20), handling)
        assert template.render(user(1, "one two three " * 20), handling, max_tokens=len(prompt.ids)) == prompt
        with pytest.raises(ContextLengthExceeded) as caught:
            template.render(user(1, "one two three " * 20), handling, max_tokens=len(prompt.ids) - 1)
        assert caught.value.param == "messages"


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "🙂" * 250_000])
def test_a_hopeless_text_is_refused_without_being_encoded(omni, monkeypatch, text):
    monkeypatch.setattr(omni.tokenizer, "encode_text", lambda *a, **k: pytest.fail("was encoded"))
    for handling in InputHandling:
        with pytest.raises(ContextLengthExceeded):
            omni.render(user(text), handling, max_tokens=4096)


def test_the_early_refusal_never_hits_a_prompt_that_fits(omni):
    """The longest token over and over: as few ids per byte as there can be."""
    check_fits(omni.tokenizer, "<im_patch>" * 7, 7)
    with pytest.raises(ContextLengthExceeded):
        check_fits(omni.tokenizer, "<im_patch>" * 7, 6)
    text = "<im_patch>" * 5000
    prompt = omni.render(user(text), ORIGINAL)
    assert omni.render(user(text), ORIGINAL, max_tokens=len(prompt.ids)) == prompt


def test_long_prompts_are_quick(omni, minicpm):
    """Measured on one CPU core: 9 ms for 10,000 characters, 16 ms for 1,000 turns. The limit leaves room for load."""
    texts = ("one two three 四五六 " * 600, "<|user|>" * 1250, "🙂" * 10_000)
    conversations = [user(1, text) for text in texts]
    conversations.append(Conversation(tuple(turn("user", "hello there") for _ in range(1000))))
    for template in (omni, minicpm):
        for conversation in conversations:
            began = time.perf_counter()
            template.render(conversation, SAFE)
            assert time.perf_counter() - began < 1.0


# -- making templates ---------------------------------------------------------------------------------


def test_the_families_defaults(omni, minicpm):
    assert omni.defaults == SamplingDefaults(0.6, 30, 0.9, 1.1, 1024, None)
    assert minicpm.defaults == SamplingDefaults(0.7, 100, 0.8, 1.0, 1024, BeamDefaults(3, 1.2))
    assert omni.eos_ids == minicpm.eos_ids == (2,)
    assert (omni.skip_special, minicpm.skip_special) == (True, False)


def test_another_number_of_image_tokens():
    template = make_template(Family.OMNILMM_3B, load_tokenizer(MINICPM), num_image_tokens=9)
    assert isinstance(template, MiniCPMVTemplate)
    assert template.render(user(2, "hi"), SAFE).spans == (Span(5, 9, 0), Span(18, 9, 1))


@pytest.mark.parametrize(("family", "folder"), [(Family.OMNILMM_12B, MINICPM), (Family.OMNILMM_3B, OMNI)])
def test_a_tokenizer_of_the_other_family_is_refused(family, folder):
    with pytest.raises(CheckpointError, match="special token"):
        load_template(family, folder)


def test_the_12b_needs_zephyrs_template_and_bos(sentence_model, configure):
    folder = sentence_model()
    added = {
        str(330 + i): {"content": t, "special": True} for i, t in enumerate(("<im_start>", "<im_patch>", "<im_end>"))
    }
    configure(folder, added_tokens_decoder=added)
    load_template(Family.OMNILMM_12B, folder)
    configure(folder, chat_template="{{ messages }}")
    with pytest.raises(CheckpointError, match="Zephyr"):
        load_template(Family.OMNILMM_12B, folder)
    configure(folder, chat_template=None, add_bos_token=False)
    with pytest.raises(CheckpointError, match="BOS"):
        load_template(Family.OMNILMM_12B, folder)
