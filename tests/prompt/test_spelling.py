"""Batches of tokens spelled for a client: what is shown when, and what stands beside it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_cases import MINICPM, quick

from omnilmm.config import Family
from omnilmm.errors import InvalidRequest
from omnilmm.messages import Delta, FinishReason, TokenBatch, TokenLogprob
from omnilmm.prompt.detokenize import decode, token_text
from omnilmm.prompt.spelling import Speller
from omnilmm.prompt.template import load_template

WORDS = "Two cats and 一只狗 sit on a table 🙂 there."


@pytest.fixture(scope="module")
def template():
    return load_template(Family.OMNILMM_3B, MINICPM)


@pytest.fixture(scope="module")
def ids(template):
    return tuple(template.tokenizer.encode_parsed(WORDS))


def likely(ids):
    return tuple(TokenLogprob(-0.25 * i, ((token_id, -0.25 * i), (5, -3.0))) for i, token_id in enumerate(ids))


def batches(ids, cuts, finish):
    """The ids with their log-probabilities, cut into batches; the last one has the finish."""
    borders = [0, *sorted({cut % len(ids) for cut in cuts} - {0}), len(ids)]
    logprobs = likely(ids)
    return [TokenBatch(ids[a:b], logprobs[a:b], finish=finish if b == len(ids) else None) for a, b in pairwise(borders)]


def spell(speller, batches):
    """Deltas until the answer is over."""
    deltas = []
    for batch in batches:
        deltas.append(speller.push(batch))
        if speller.finish is not None:
            break
    return [delta for delta in deltas if delta is not None]


@quick
@given(st.lists(st.integers(0, 100), max_size=6))
def test_however_it_is_cut_the_text_and_every_log_probability_come_once(template, ids, cuts):
    speller = Speller(template)
    deltas = spell(speller, batches(ids, cuts, FinishReason.LENGTH))
    assert speller.finish is FinishReason.LENGTH
    assert "".join(delta.text for delta in deltas) == decode(template.tokenizer, ids, skip_special=False)
    told = [entry for delta in deltas for entry in delta.logprobs]
    assert [(entry.token, entry.utf8) for entry in told] == [token_text(template.tokenizer, i) for i in ids]
    assert [entry.logprob for entry in told] == [-0.25 * i for i in range(len(ids))]
    assert told[1].top == ((*token_text(template.tokenizer, ids[1]), -0.25), (*token_text(template.tokenizer, 5), -3.0))


def test_the_id_that_ends_an_answer_is_not_shown(template, ids):
    ended = (*ids, template.tokenizer.eos_id)
    deltas = spell(Speller(template), [TokenBatch(ended, likely(ended), finish=FinishReason.STOP)])
    assert sum(len(delta.logprobs) for delta in deltas) == len(ids)
    cut_short = spell(Speller(template), [TokenBatch(ended, likely(ended), finish=FinishReason.LENGTH)])
    assert sum(len(delta.logprobs) for delta in cut_short) == len(ended), "it was a token like others"


def test_a_stop_string_ends_it_before_the_decoder_does(template, ids):
    speller = Speller(template, stop=("cats",))
    deltas = spell(speller, batches(ids, range(len(ids)), FinishReason.LENGTH))
    assert "".join(delta.text for delta in deltas) == "Two "
    assert speller.finish is FinishReason.STOP
    shown = [entry.token for delta in deltas for entry in delta.logprobs]
    assert 1 < len(shown) < len(ids)


def test_log_probabilities_wait_for_their_text(template):
    """A character of several tokens, and one that never comes whole."""
    emoji = [i for i in template.tokenizer.encode_parsed("🙂") if template.tokenizer.is_byte(i)]
    assert len(emoji) == 4
    speller = Speller(template)
    one_each = [TokenBatch((i,), likely((i,))) for i in emoji]
    assert [speller.push(batch) for batch in one_each[:3]] == [None] * 3
    whole = speller.push(one_each[3])
    assert whole is not None
    assert (whole.text, len(whole.logprobs)) == ("🙂", 4)
    speller.push(one_each[0])
    broken = speller.push(TokenBatch((), finish=FinishReason.LENGTH))
    assert broken is not None
    assert (broken.text, len(broken.logprobs)) == ("\ufffd", 1)


def test_log_probabilities_are_told_at_the_end_though_no_text_came(template):
    speller = Speller(template)
    bos = template.tokenizer.bos_id
    assert speller.push(TokenBatch((bos,), likely((bos,)))) is None
    last = speller.push(TokenBatch((), finish=FinishReason.LENGTH))
    assert last == Delta("", last.logprobs)
    assert len(last.logprobs) == 1
    assert Speller(template).push(TokenBatch((), finish=FinishReason.LENGTH)) is None


def test_an_empty_stop_string_is_refused(template):
    with pytest.raises(InvalidRequest):
        Speller(template, stop=("",))
