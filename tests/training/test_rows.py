"""A row gives the numbers of its sequences, each by itself, with less work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional
from training_cases import row_about, square, talk

from omnilmm.models.attention import DenseAttend
from omnilmm.training.attend import RowAttend
from omnilmm.training.learner import Learner
from omnilmm.training.rows import Row, collate, make_row
from omnilmm.training.sequences import Sequence, SequenceMaker

TALKS = (
    talk("What is it?", "A red circle."),
    talk("What is it?", "A ring.", "Where is it?", "It is on the left.", "红色的吗？", "是的。"),
    talk("有几个圆形？", "有3个圆形。"),
)


def plain_loss(learner: Learner, sequence: Sequence, pictures: list[np.ndarray]) -> torch.Tensor:
    """The textbook way: one sequence, one causal mask, the answer's ids shifted by one."""
    ids = torch.tensor(sequence.ids)
    embeds = learner.language.embed(ids[:-1])
    vectors = learner.encode(torch.from_numpy(np.stack(pictures)))
    for span in sequence.spans:
        places = torch.arange(span.start, span.start + span.length)
        embeds = embeds.index_copy(0, places, vectors[span.image])
    attend = DenseAttend(learner.config.language.num_layers)
    logits = learner.language.logits(learner.language(embeds, torch.arange(len(embeds)), attend))
    first = sequence.answer_start
    return functional.cross_entropy(logits[first - 1 :], ids[first:], reduction="sum")


def test_a_batch_of_rows_costs_what_its_sequences_cost(
    learner_of: Callable[..., Learner], maker: SequenceMaker
) -> None:
    learner = learner_of()
    batch = collate([row_about(maker, 0, *TALKS), row_about(maker, 1, TALKS[1]), row_about(maker, 2, TALKS[0])])
    separate = [
        (sequence, [square(picture)])
        for picture, talks in ((0, TALKS), (1, TALKS[1:2]), (2, TALKS[:1]))
        for conversation in talks
        for sequence in maker.sequences(conversation)
    ]
    expected = sum(plain_loss(learner, *pair) for pair in separate)
    assert batch.num_targets == sum(len(s.ids) - s.answer_start for s, _ in separate)
    together = learner(batch).answers
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-3)
    wanted = torch.autograd.grad(expected, [p for _, _, p in learner.learning()], allow_unused=True)
    got = torch.autograd.grad(together, [p for _, _, p in learner.learning()], allow_unused=True)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_what_sequences_share_is_stored_once(maker: SequenceMaker) -> None:
    row = row_about(maker, 0, *TALKS)
    lengths = [len(sequence.ids) - 1 for conversation in TALKS for sequence in maker.sequences(conversation)]
    assert len(row) < sum(lengths) / 2
    assert row.spans[0][1] == 64
    assert len(row.spans) == 1
    assert row.positions.max() == max(lengths) - 1


def test_each_token_sees_its_ancestors_and_itself() -> None:
    row = make_row(
        [Sequence((1, 2, 3, 4, 9), 3, ()), Sequence((1, 2, 5, 6, 9), 3, ()), Sequence((1, 2, 3, 7, 9), 3, ())]
    )
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert row.parents.tolist() == [-1, 0, 1, 2, 1, 4, 2]
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 3, 3]
    for index in range(len(row)):
        ancestors, node = set(), index
        while node >= 0:
            ancestors.add(node)
            node = int(row.parents[node])
        assert {*np.flatnonzero(row.visible()[index]).tolist()} == ancestors


def test_two_answers_to_one_question_are_both_targets() -> None:
    row = make_row([Sequence((1, 2, 3, 9), 2, ()), Sequence((1, 2, 4, 9), 2, ())])
    assert sorted(zip(row.target_nodes.tolist(), row.target_ids.tolist(), strict=True)) == [
        (1, 3),
        (1, 4),
        (2, 9),
        (3, 9),
    ]


def test_a_row_without_pictures_goes_with_one_that_has_some(
    learner_of: Callable[..., Learner], maker: SequenceMaker
) -> None:
    learner = learner_of()
    without = make_row(maker.sequences(talk("What?", "Yes.", num_images=0)))
    with_one = row_about(maker, 3, TALKS[0])
    together = learner(collate([without, with_one])).answers
    apart = learner(collate([without])).answers + learner(collate([with_one])).answers
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)


def test_padding_is_seen_by_nobody(maker: SequenceMaker) -> None:
    short, long = row_about(maker, 0, TALKS[0]), row_about(maker, 0, *TALKS)
    batch = collate([short, long])
    visible = batch.visible[0, 0]
    assert not visible[: len(short), len(short) :].any()
    assert visible.diagonal().all()
    x = torch.randn(len(batch.ids), 2, 8)
    seen = RowAttend(batch)(0, x, x, x)
    alone = RowAttend(collate([short]))(0, *(x[: len(short)],) * 3)
    torch.testing.assert_close(seen[: len(short)], alone)


def test_facts_are_kept_where_every_picture_has_them() -> None:
    bare = make_row([Sequence((1, 2, 9), 1, ())], [square(0)])
    told = make_row([Sequence((1, 2, 9), 1, ())], [square(0)], facts=np.ones((1, 64, 5), np.uint8))
    facts = collate([told, told]).facts
    assert facts is not None
    assert facts.shape == (2, 64, 5)
    assert collate([told, bare]).facts is None
    assert isinstance(bare, Row)
