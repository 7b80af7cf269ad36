"""The loss falls on exactly the ids a server would have to produce."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import talk

from omnilmm.config import Family, InputHandling
from omnilmm.errors import ConfigError
from omnilmm.messages import Conversation, TextPart, Turn
from omnilmm.prompt.detokenize import answer_text
from omnilmm.prompt.template import Template, load_template
from omnilmm.training.sequences import SequenceMaker

REFERENCE = {Family.OMNILMM_12B: "omnilmm-12b-tiny", Family.OMNILMM_3B: "minicpm-v-tiny"}


@pytest.fixture
def reference(family: Family, data: Path) -> Template:
    """The template over an official tokenizer, cut down."""
    return load_template(family, data / REFERENCE[family])


@pytest.fixture
def sequences(family: Family, reference: Template) -> SequenceMaker:
    return SequenceMaker(family, reference)


@pytest.mark.parametrize(
    "answer", ["A red circle.", "红色的圆形。", " two spaces ", "</s> not the end", "<用户>?", "é😀\n\n-", ""]
)
def test_a_sequence_is_the_prompt_the_answer_and_the_end(
    answer: str, family: Family, reference: Template, sequences: SequenceMaker
) -> None:
    (made,) = sequences.sequences(talk("What is it?", answer))
    prompt = reference.render(talk("What is it?"), InputHandling.SAFE)
    assert made.ids[: made.answer_start] == prompt.ids
    assert made.spans == prompt.spans
    assert made.ids[-1] == reference.tokenizer.eos_id
    said = made.ids[made.answer_start : -1]
    assert not {*said} & reference.tokenizer.control_ids
    assert b"".join(map(reference.tokenizer.token_bytes, said)).decode() == answer
    assert answer_text(reference.tokenizer, said, family) == answer.strip()


@settings(max_examples=60, deadline=None)
@given(answer=st.text(max_size=20).filter(lambda text: text.isprintable()))
def test_any_answer_is_spelled_by_its_ids(answer: str) -> None:
    data = Path(__file__).parents[1] / "data"
    for family, name in REFERENCE.items():
        template = load_template(family, data / name)
        (made,) = SequenceMaker(family, template).sequences(talk("?", answer))
        spelled = b"".join(map(template.tokenizer.token_bytes, made.ids[made.answer_start : -1]))
        assert spelled.decode() == answer.replace("▁", " ")


def test_ordinary_answers_have_the_ids_of_a_history(reference: Template, sequences: SequenceMaker) -> None:
    """What is learned as an answer is what the model finds in front of the next question, but for the end token."""
    first, second = sequences.sequences(talk("What is it?", "A red circle.", "Where?", "On the left."))
    assert second.ids[: len(first.ids) - 1] == first.ids[:-1]
    assert second.answer_start > len(first.ids)
    asked = Conversation(talk("What is it?", "A red circle.", "Where?").turns)
    assert second.ids[: second.answer_start] == reference.render(asked, InputHandling.SAFE).ids


def test_in_the_history_of_the_3b_no_end_token_stands_behind_an_answer(
    family: Family, reference: Template, sequences: SequenceMaker
) -> None:
    first, second = sequences.sequences(talk("What is it?", "A red circle.", "Where?", "On the left."))
    eos = reference.tokenizer.eos_id
    assert (second.ids[len(first.ids) - 1] == eos) == (family is Family.OMNILMM_12B)
    assert first.ids[-1] == second.ids[-1] == eos


def test_an_answer_that_would_melt_into_its_mark_keeps_ids_of_its_own(
    family: Family, reference: Template, sequences: SequenceMaker
) -> None:
    """`>` is the last character of the 3B mark; a piece such as `>=` must not swallow it."""
    for answer in (">", ">>", "|>", "=", "AI>"):
        (made,) = sequences.sequences(talk("?", answer))
        assert made.ids[: made.answer_start] == reference.render(talk("?"), InputHandling.SAFE).ids
        said = b"".join(map(reference.tokenizer.token_bytes, made.ids[made.answer_start : -1]))
        assert said.decode() == answer


def test_several_pictures_have_spans_of_their_own(sequences: SequenceMaker) -> None:
    (made,) = sequences.sequences(talk("Compare.", "Same.", num_images=2))
    assert [span.image for span in made.spans] == [0, 1]
    assert all(span.length == 64 for span in made.spans)


@pytest.mark.parametrize(
    "turns",
    [
        (Turn("user", (TextPart("only a question"),)),),
        (Turn("assistant", (TextPart("first"),)),),
        (
            Turn("user", (TextPart("a"),)),
            Turn("assistant", (TextPart("b"),)),
            Turn("assistant", (TextPart("c"),)),
        ),
    ],
)
def test_what_teaches_nothing_is_refused(turns: tuple[Turn, ...], sequences: SequenceMaker) -> None:
    with pytest.raises(ConfigError):
        sequences.sequences(Conversation(turns))


def test_a_text_model_is_refused(reference: Template) -> None:
    with pytest.raises(ConfigError):
        SequenceMaker(Family.TEXT, reference)
