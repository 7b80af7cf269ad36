"""Beam search against the goldens of transformers 4.36, and its rules one by one on a model of a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omnilmm.errors import ContextLengthExceeded, InvalidRequest
from omnilmm.models.beam import beam_search
from omnilmm.models.config import LanguageConfig


@pytest.mark.parametrize("run", ["beam3", "beam3_eos"])
def test_answers_and_scores_of_every_case(reference: Any, case: dict[str, Any], run: str) -> None:
    golden = case[run]
    eos_ids = (golden["eos_token_id"],) if "eos_token_id" in golden else reference.config.eos_ids
    ids, score = beam_search(
        reference.language_model,
        reference.embeds(case),
        num_beams=golden["num_beams"],
        max_tokens=24,
        eos_ids=eos_ids,
        repetition_penalty=golden["repetition_penalty"],
        bos_id=reference.config.bos_id,
    )
    assert [reference.config.bos_id, *ids] == golden["sequence_ids"]
    assert score == pytest.approx(golden["sequences_score"], abs=1e-3)


def test_rivals_are_scored_as_if_alone(reference: Any) -> None:
    """The score of the best beam is the mean log-probability of its tokens when run alone, without a penalty."""
    model, embeds = reference.language_model, reference.embeds(reference.full_case)
    ids, score = beam_search(model, embeds, num_beams=4, max_tokens=12, eos_ids=(2,), repetition_penalty=1.0, bos_id=1)
    alone, _ = reference.prefill(torch.cat((embeds, model.embed(torch.tensor(ids)))))
    logprobs = model.logits(alone[len(embeds) - 1 : -1]).log_softmax(dim=-1)
    assert score == pytest.approx(logprobs.gather(1, torch.tensor(ids)[:, None]).mean().item(), abs=1e-5)


# -- the rules, on a scripted model -------------------------------------------------------------------


class Scripted:
    """A language model whose next-token probabilities depend on the last token alone: rows of `table`."""

    def __init__(self, table: Callable[[int], dict[int, float]], vocab_size: int = 6) -> None:
        self._table = table
        self.config = LanguageConfig(
            hidden=1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            mlp_width=1,
            vocab_size=vocab_size,
            max_context=32,
            norm_eps=1e-5,
            rope_theta=1e4,
        )

    def embed(self, ids: Tensor) -> Tensor:
        return ids[:, None].float()

    def __call__(self, embeds: Tensor, positions: Tensor, attend: Any) -> Tensor:
        assert len(embeds) == len(positions)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        rows = []
        for last in hidden[:, 0].int().tolist():
            probabilities = self._table(last)
            rest = (1 - sum(probabilities.values())) / (self.config.vocab_size - len(probabilities))
            rows.append([probabilities.get(token, rest) for token in range(self.config.vocab_size)])
        return torch.tensor(rows).log()


def search(table: dict[int, dict[int, float]], *, vocab_size: int = 6, **changes: Any) -> tuple[tuple[int, ...], float]:
    settings: dict[str, Any] = {
        "num_beams": 2,
        "max_tokens": 2,
        "eos_ids": (5,),
        "repetition_penalty": 1.0,
        "bos_id": 0,
    }
    model: Any = Scripted(lambda last: table.get(last, {}), vocab_size)
    return beam_search(model, torch.tensor([[9.0]]), **(settings | changes))


def test_a_worse_start_may_win() -> None:
    table = {9: {1: 0.55, 2: 0.4}, 1: {3: 0.3, 4: 0.3}, 2: {3: 0.95}}
    ids, score = search(table)
    assert ids == (2, 3)
    assert score == pytest.approx(torch.tensor([0.4, 0.95]).log().mean().item(), abs=1e-6)
    assert search(table, num_beams=1)[0][0] == 1


def test_the_length_penalty_decides_between_short_and_long() -> None:
    table = {9: {5: 0.5, 1: 0.45}, 1: {1: 0.9}}
    assert search(table, max_tokens=6, length_penalty=0.0)[0] == (5,)
    assert search(table, max_tokens=6, length_penalty=1.0)[0] == (1,) * 6


def test_an_end_below_the_beams_does_not_count() -> None:
    """Were the second end kept, two hypotheses would be enough to give up in the second step, which looks poor."""
    table = {9: {1: 0.5, 5: 0.3, 4: 0.15, 2: 0.005}, 1: {3: 0.03, 0: 0.025, 4: 0.001, 5: 0.001}, 3: {3: 0.99}}
    ids, _ = search(table, vocab_size=60, max_tokens=8, eos_ids=(5, 4))
    assert ids == (1, *[3] * 7)


def test_the_search_stops_once_nothing_can_win() -> None:
    table = {9: {1: 0.5, 2: 0.4}, 1: {5: 0.99}, 2: {5: 0.99}}
    asked: list[int] = []
    model: Any = Scripted(lambda last: asked.append(last) or table.get(last, {}))
    ids, _ = beam_search(
        model,
        torch.tensor([[9.0]]),
        num_beams=2,
        max_tokens=20,
        eos_ids=(5,),
        repetition_penalty=1.0,
        bos_id=0,
    )
    assert ids == (1, 5)
    assert len(asked) < 10


def test_bos_and_used_tokens_are_penalised_once_each() -> None:
    table = {9: {0: 0.5, 1: 0.4}, 1: {1: 0.5, 2: 0.3}}
    ids, score = search(table, num_beams=1, repetition_penalty=2.0)
    assert ids == (1, 2)  # 0.5 squared is less than 0.4 and than 0.3
    assert score == pytest.approx(torch.tensor([0.4, 0.3]).log().mean().item(), abs=1e-6)
    assert search(table, num_beams=1)[0][0] == 0


def test_any_of_several_end_tokens_ends() -> None:
    ids, _ = search({9: {1: 0.9}, 1: {4: 0.9}}, max_tokens=5, eos_ids=(5, 4))
    assert ids == (1, 4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        search({}, **changes)
    assert refusal.value.param == param


def test_the_context_is_a_border() -> None:
    search({9: {5: 0.9}}, max_tokens=31)
    with pytest.raises(ContextLengthExceeded):
        search({9: {5: 0.9}}, max_tokens=32)
