"""All filters at once, against the list that transformers itself would make of the same settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from omnilmm.engine import sampling as module
from omnilmm.engine.plan import Draw
from omnilmm.engine.sampling import distribution, draw_tokens
from omnilmm.messages import Sampling

VOCAB = 1500  # between the two widths that are looked at first, and the whole
PROMPT = 3  # tokens transformers counts as seen before the answer
EOS = 2
SEEN = (5, 7, 7, 1499)
EVERYTHING = Sampling(
    8, temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, min_tokens=4, stop_ids=(EOS,)
)


def make_logits(seed: int, num_rows: int = 1) -> Tensor:
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, EOS] += 8.0  # a likely token
    return logits


def pack(ids: range | tuple[int, ...]) -> bytes:
    """A mask that allows these ids."""
    return sum(1 << i for i in ids).to_bytes(4 * (VOCAB // 32 + 2), "little")


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


def processors(theirs: LlamaForCausalLM, sampling: Sampling, allowed: tuple[int, ...] | None) -> LogitsProcessorList:
    config = GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        min_new_tokens=sampling.min_tokens or None,
        sequence_bias=[[[i], bias] for i, bias in sampling.logit_bias] or None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    theirs._prepare_special_tokens(config, device="cpu")
    return theirs._get_logits_processor(
        config,
        input_ids_seq_length=PROMPT,
        prefix_allowed_tokens_fn=None if allowed is None else (lambda batch, ids: list(allowed)),
        logits_processor=LogitsProcessorList(),
        device="cpu",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"min_tokens": 0},
        {"temperature": 1.6, "top_k": 0},
        {"top_p": 1.0, "min_p": 0.2},
        {"repetition_penalty": 1.0, "logit_bias": ((7, 3.0), (9, -2.0), (EOS, 1.0))},
        {"repetition_penalty": 1.0, "logit_bias": ((11, 12.0),), "top_k": 1200, "top_p": 0.999, "min_p": 0.0},
    ],
)
@pytest.mark.parametrize("allowed", [None, (2, 5, 7, 900, 1499), tuple(range(0, VOCAB, 3))], ids=["all", "few", "many"])
@pytest.mark.parametrize("seed", range(2))
def test_all_filters_together(theirs, changes, allowed, seed):
    sampling = replace(EVERYTHING, **changes)
    logits = make_logits(seed)
    input_ids = torch.tensor([SEEN])  # as many as there are tokens: one of the answer, behind a prompt of three
    expected = processors(theirs, sampling, allowed)(input_ids, logits.clone()).softmax(-1)
    draw = Draw(sampling, len(SEEN) - PROMPT, seen=SEEN if sampling.repetition_penalty != 1.0 else ())
    if allowed is not None:  # min_tokens is the matcher's business where there is a mask
        draw = replace(draw, allowed=pack(tuple(i for i in allowed if i != EOS or not sampling.min_tokens)))
    ours = distribution(logits, [draw])
    assert torch.equal(ours > 0, expected > 0)
    assert_close(ours.float(), expected, atol=1e-6, rtol=1e-4)


def test_the_order_is_theirs_but_for_the_bias(theirs):
    """OpenAI adds its bias to the final logits, transformers ahead of the penalties; the rest is in one order."""
    sampling = replace(EVERYTHING, logit_bias=((7, 3.0),))
    assert [type(processor).__name__ for processor in processors(theirs, sampling, (1, 2))] == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


# -- masks --------------------------------------------------------------------------------------------


def test_a_mask_changes_its_own_row_only():
    logits = make_logits(0, 4)
    allowed = (3, 8, 1400)
    plain = Draw(replace(EVERYTHING, temperature=0.0), 6)
    kept = replace(plain, allowed=pack(allowed))
    best = logits.argmax(-1).tolist()
    assert [d.id for d in draw_tokens(logits, [plain, kept, plain, kept])] == [
        best[0],
        allowed[int(logits[1, list(allowed)].argmax())],
        best[2],
        allowed[int(logits[3, list(allowed)].argmax())],
    ]
    assert [d.id for d in draw_tokens(logits, [kept] * 4)] == [
        allowed[int(row[list(allowed)].argmax())] for row in logits
    ]


def test_draws_stay_inside_the_mask_and_share_it_out():
    allowed, num_draws = (3, 8, 1400), 3000
    logits = make_logits(1).expand(num_draws, -1).clone()
    logits[:, list(allowed)] = torch.tensor([0.0, 1.0, -1.0])  # all far below the best
    sampling = Sampling(8, temperature=1.0, seed=5)
    draws = [Draw(sampling, position, allowed=pack(allowed)) for position in range(num_draws)]
    counts = torch.bincount(torch.tensor([d.id for d in draw_tokens(logits, draws)]), minlength=VOCAB)
    expected = num_draws * torch.tensor([0.0, 1.0, -1.0]).softmax(-1)
    assert counts.sum() == counts[list(allowed)].sum()
    assert ((counts[list(allowed)] - expected).abs() < 4 * expected.sqrt()).all()


def test_min_tokens_does_not_shut_the_last_door():
    """A grammar that is complete allows the stop id alone, whatever min_tokens says."""
    (drawn,) = draw_tokens(make_logits(0), [Draw(replace(EVERYTHING, min_tokens=9), 1, allowed=pack((EOS,)))])
    assert drawn.id == EOS


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 900, "min_p": 0.1}, {}])
def test_few_allowed_tokens_need_no_sorting_of_all(settings, monkeypatch):
    widths = []
    look = module._most_probable

    def record(scores: Tensor, width: int):
        widths.append(width)
        return look(scores, width)

    monkeypatch.setattr(module, "_most_probable", record)
    sampling = Sampling(8, temperature=1.0, seed=5, **settings)
    draw_tokens(make_logits(2), [Draw(sampling, 0, allowed=pack((3, 8, 1400)))])
    assert widths == [module.WIDTHS[0]]
