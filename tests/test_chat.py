"""The original interface: the seed's snippet as written, round after round, equal to the original's answers."""

import json

import pytest

from omnilmm.chat import IMAGE_DECODE_ERROR, OmniLMMChat, img2base64
from omnilmm.errors import ContextLengthExceeded, ImageError, InvalidRequest

FAMILIES = ("omnilmm-12b-tiny", "minicpm-v-tiny")


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, data):
    """A checkpoint's folder, its goldens, and the chat over it."""
    folder = data / request.param
    goldens = json.loads((folder / "goldens.json").read_text(encoding="utf-8"))
    with OmniLMMChat(str(folder), dtype="float32", input_handling="original") as chat:
        yield chat, goldens


def cases(goldens, data, picture_folder):
    for case in goldens["cases"]:
        places = [data / "images", *([picture_folder] if picture_folder else [])]
        picture = next((place / case["image"] for place in places if (place / case["image"]).exists()), None)
        if picture is not None:
            messages = goldens["conversations"][case["conversation"]]
            yield case, {"image": img2base64(picture), "question": json.dumps(messages)}


def test_greedy_answers_are_the_original_s(reference, data, picture_folder):
    chat, goldens = reference
    for case, inputs in cases(goldens, data, picture_folder):
        assert chat.process(inputs, greedy=True, max_tokens=24) == case["greedy"]["text"]


def test_beam_search_answers_are_the_original_s(reference, data, picture_folder):
    chat, goldens = reference
    for case, inputs in cases(goldens, data, picture_folder):
        assert chat.process(inputs, num_beams=3, max_tokens=24) == case["beam3"]["text"]


def test_the_snippet_two_rounds(reference, data):
    chat, _ = reference
    im_64 = img2base64(data / "images" / "china.jpg")
    msgs = [{"role": "user", "content": "What is interesting about this image?"}]
    answer = chat.process({"image": im_64, "question": json.dumps(msgs)}, seed=1, max_tokens=12)
    msgs += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Where is China in the image"}]
    second = chat.process({"image": im_64, "question": json.dumps(msgs)}, seed=1, max_tokens=12)
    assert answer
    assert second
    assert chat.chat({"image": im_64.decode(), "question": json.dumps(msgs)}, seed=1, max_tokens=12) == second


def test_sampling_is_the_default_and_the_seed_repeats_it(reference, data):
    chat, _ = reference
    question = json.dumps([{"role": "user", "content": "Well?"}])
    inputs = {"image": img2base64(data / "images" / "coins_gray.png"), "question": question}
    answers = [chat.process(inputs, seed=seed, max_tokens=16) for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    assert chat.process(inputs, greedy=True, max_tokens=16) == chat.process(inputs, greedy=True, max_tokens=16, seed=9)


def test_the_family_s_own_sampling_settings_are_used(reference):
    chat, goldens = reference
    defaults = chat._backend._pipeline.card.template.defaults
    original = goldens["cases"][0]["sample"]
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (
        original["temperature"],
        original["top_k"],
        original["top_p"],
    )
    assert defaults.repetition_penalty == original.get("repetition_penalty", 1.0)
    assert defaults.max_tokens == 1024


def test_words_without_a_picture(reference):
    chat, _ = reference
    assert chat.process({"question": json.dumps([{"role": "user", "content": "Hello"}])}, greedy=True, max_tokens=4)


def test_original_handling_answers_a_broken_picture_as_the_original_did(reference):
    chat, _ = reference
    inputs = {"image": b"bm90IGEgcGljdHVyZQ==", "question": '[{"role": "user", "content": "?"}]'}
    assert chat.process(inputs) == IMAGE_DECODE_ERROR


def test_what_cannot_be_answered_is_refused(data):
    with OmniLMMChat(str(data / "minicpm-v-tiny"), dtype="float32") as chat:
        question = json.dumps([{"role": "user", "content": "?"}])
        with pytest.raises(ImageError):
            chat.process({"image": b"bm90IGEgcGljdHVyZQ==", "question": question})
        with pytest.raises(ImageError):
            chat.process({"image": "@@@", "question": question})
        with pytest.raises(ContextLengthExceeded):
            chat.process({"question": json.dumps([{"role": "user", "content": "word " * 5000}])})
        for bad in ("{", "[]", "{}", '[{"role": "tool", "content": "x"}]', '[{"role": "user"}]'):
            with pytest.raises(InvalidRequest):
                chat.process({"question": bad})


def test_a_checkpoint_takes_no_cluster_options(data):
    with pytest.raises(InvalidRequest):
        OmniLMMChat(str(data / "minicpm-v-tiny"), api_key="k")


def test_a_cluster_searches_no_beams():
    with OmniLMMChat("http://127.0.0.1:1", model="m") as chat, pytest.raises(InvalidRequest):
        chat.process({"question": '[{"role": "user", "content": "?"}]'}, num_beams=3)
