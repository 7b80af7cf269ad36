"""An exam counts right answers, and shuffled pictures show what the words alone give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from training_cases import row_about, talk

from omnilmm.messages import Conversation
from omnilmm.prompt.template import Template
from omnilmm.training import evaluation
from omnilmm.training.evaluation import Exam, HeldOutLoss, Paper, make_papers, sit_exam
from omnilmm.training.learner import Learner
from omnilmm.training.rows import collate
from omnilmm.training.scenes import Split
from omnilmm.training.scenes_check import Kind
from omnilmm.training.scenes_draw import Scenery
from omnilmm.training.scenes_words import Language
from omnilmm.training.sequences import SequenceMaker


@pytest.fixture(scope="module")
def papers(bare_scenery: Scenery) -> tuple[Paper, ...]:
    return make_papers(Split.TEST, 11, 40, scenery=bare_scenery, side=32)


class Knowing:
    """Stands in for a model: it knows the papers' answers by picture and question, and notes what it was asked."""

    def __init__(self, papers: Sequence[Paper]) -> None:
        self.asked: list[Conversation] = []
        self._by_picture: dict[bytes, dict[tuple[str, ...], str]] = {}
        for paper in papers:
            known = self._by_picture.setdefault(paper.square.tobytes(), {})
            for conversation in paper.talks:
                questions: list[str] = []
                for exchange in conversation:
                    questions.append(exchange.question)
                    known[tuple(questions)] = exchange.answer

    def answer(self, conversations: Sequence[Conversation], pictures: Sequence[Sequence[np.ndarray]]) -> list[str]:
        self.asked += conversations
        return [
            self._by_picture[shown[0].tobytes()].get(
                tuple(turn.text for turn in conversation.turns if turn.role == "user"), "Yes, there is one."
            )
            for conversation, shown in zip(conversations, pictures, strict=True)
        ]


@pytest.fixture
def knowing(papers: tuple[Paper, ...], monkeypatch: pytest.MonkeyPatch) -> Knowing:
    partner = Knowing(papers)
    monkeypatch.setattr(evaluation, "Answers", lambda *args, **settings: partner)
    return partner


NOBODY: Any = None


def test_who_knows_everything_has_everything_right(papers: tuple[Paper, ...], knowing: Knowing) -> None:
    report = sit_exam(papers, NOBODY, NOBODY)
    total = sum(len(conversation) for paper in papers for conversation in paper.talks)
    assert (report.score().num, report.score().accuracy) == (total, 1.0)
    assert report.false_yes().num > 20
    assert report.false_yes().num_right == 0
    for language in Language:
        assert report.score(language=language).accuracy == 1.0
    assert sum(report.score(kind).num for kind in report.kinds()) == total


def test_with_shuffled_pictures_knowing_is_guessing(papers: tuple[Paper, ...], knowing: Knowing) -> None:
    report = sit_exam(papers, NOBODY, NOBODY, shift=7)
    assert report.score().accuracy < 0.6
    assert report.score(Kind.READ).accuracy < 0.2
    assert report.false_yes().accuracy > 0.5


def test_follow_ups_stand_behind_the_models_own_answer(papers: tuple[Paper, ...], knowing: Knowing) -> None:
    sit_exam(papers, NOBODY, NOBODY, shift=3)
    second = [conversation for conversation in knowing.asked if len(conversation.turns) == 3]
    assert second
    assert any(conversation.turns[1].text == "Yes, there is one." for conversation in second)
    assert all(len(conversation.images) == 1 for conversation in knowing.asked)


def test_a_model_that_has_learned_nothing_fails(
    papers: tuple[Paper, ...], learner_of: Callable[..., Learner], template: Template
) -> None:
    figures = Exam(papers[:4], template).measure(learner_of())
    assert figures["all"] < 0.2
    assert {"en", "zh"} <= figures.keys()


def test_exams_are_repeatable(bare_scenery: Scenery) -> None:
    first, again = (make_papers(Split.COMBINATIONS, 2, 3, scenery=bare_scenery, side=32) for _ in range(2))
    assert all(np.array_equal(a.square, b.square) and a.talks == b.talks for a, b in zip(first, again, strict=True))


class ThreeRows:
    num_rows: int | None = 3
    num_facts = 0

    def __init__(self, maker: SequenceMaker) -> None:
        self._rows = [row_about(maker, number, talk("What?", f"It is {number}.")) for number in range(3)]

    def row(self, index: int, done: float) -> Any:
        return self._rows[index]


def test_held_out_loss_is_per_token_over_all_rows(learner_of: Callable[..., Learner], maker: SequenceMaker) -> None:
    learner, source = learner_of(), ThreeRows(maker)
    figures = HeldOutLoss(source, batch=2).measure(learner)
    batch = collate([source.row(index, 0) for index in range(3)])
    assert figures["held_out_loss"] == pytest.approx(learner(batch).answers.item() / batch.num_targets, rel=1e-5)
    assert 0 <= figures["held_out_tokens"] <= 1
    assert learner.training
