"""How good a model is: loss on held-out conversations, and answers to questions about unseen scenes, judged by what
they say, by kind and language. Shuffled pictures show what the words alone would give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from omnilmm.image.transform import squash
from omnilmm.messages import Conversation, ImagePart, TextPart, Turn
from omnilmm.prompt.template import Template
from omnilmm.training.answers import Answers
from omnilmm.training.learner import Learner
from omnilmm.training.rows import collate
from omnilmm.training.scenes import Scene, Split
from omnilmm.training.scenes_ask import Talk, ask
from omnilmm.training.scenes_check import Exchange, Kind, is_right, says_yes
from omnilmm.training.scenes_draw import Scenery, draw
from omnilmm.training.scenes_make import make_scene
from omnilmm.training.scenes_words import Language
from omnilmm.training.sources import RowSource

EXAM_SIDE = 336
"""Longer side of the pictures of an exam, in pixels: larger than any seen in training."""


# -- held-out conversations -----------------------------------------------------------------------------


class HeldOutLoss:
    """Loss per token and the share of tokens predicted right, over all rows of a source."""

    def __init__(self, source: RowSource, *, batch: int) -> None:
        assert source.num_rows is not None
        self._source, self._batch, self._num_rows = source, batch, source.num_rows

    @torch.no_grad()
    def measure(self, learner: Learner) -> Mapping[str, float]:
        was_training = learner.training
        learner.eval()
        loss = right = total = 0.0
        for start in range(0, self._num_rows, self._batch):
            stop = min(start + self._batch, self._num_rows)
            batch = collate([self._source.row(index, 0) for index in range(start, stop)])
            losses = learner(batch)
            loss += float(losses.answers)
            right += float(losses.num_right)
            total += batch.num_targets
        learner.train(was_training)
        return {"held_out_loss": loss / total, "held_out_tokens": right / total}


# -- an exam --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paper:
    """A scene, its picture and the conversations about it."""

    scene: Scene
    square: np.ndarray
    talks: tuple[Talk, ...]


def make_papers(
    split: Split, seed: int, num: int, *, scenery: Scenery, side: int, conversations: int = 8
) -> tuple[Paper, ...]:
    """`num` unseen scenes, ready for a model whose pictures have `side` pixels."""
    papers = []
    for index in range(num):
        scene = make_scene(split, seed, index)
        square = np.frombuffer(squash(draw(scene, scenery, side=EXAM_SIDE), side), np.uint8)
        talks = ask(scene, split, seed, index, num=conversations)
        papers.append(Paper(scene, square.reshape(side, side, 3), talks))
    return tuple(papers)


@dataclass(frozen=True, slots=True)
class Answered:
    """An exchange, the index of the paper it belongs to, and what the model said."""

    paper: int
    exchange: Exchange
    text: str

    @property
    def is_right(self) -> bool:
        return is_right(self.exchange, self.text)


@dataclass(frozen=True, slots=True)
class Score:
    """How many of `num` answers were right."""

    num: int = 0
    num_right: int = 0

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num if self.num else float("nan")


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was answered, with the figures that are asked for."""

    answered: tuple[Answered, ...] = field(repr=False)

    def score(self, kind: Kind | None = None, language: Language | None = None) -> Score:
        chosen = [
            entry.is_right
            for entry in self.answered
            if kind in (None, entry.exchange.kind) and language in (None, entry.exchange.language)
        ]
        return Score(len(chosen), sum(chosen))

    def false_yes(self) -> Score:
        """Of the questions whose honest answer is no because nothing like that is there: how many were affirmed (as
        `num_right`)."""
        denied = [
            says_yes(entry.exchange, entry.text)
            for entry in self.answered
            if entry.exchange.says_yes is False and entry.exchange.kind in (Kind.EXISTS, Kind.ABSENT)
        ]
        return Score(len(denied), sum(denied))

    def kinds(self) -> tuple[Kind, ...]:
        present = {entry.exchange.kind for entry in self.answered}
        return tuple(kind for kind in Kind if kind in present)


def sit_exam(
    papers: Sequence[Paper], learner: Learner, template: Template, *, batch: int = 32, shift: int = 0
) -> Report:
    """Ask everything. Follow-ups come behind the model's own answer to the question before.

    `shift` above 0 gives every question the picture of another paper, that many places further on: what is then still
    right was guessed from the words alone.
    """
    answers = Answers(learner, template, batch=batch)
    asked: dict[int, list[tuple[int, Talk]]] = defaultdict(list)  # by number of turns
    for index, paper in enumerate(papers):
        for talk in paper.talks:
            asked[len(talk)].append((index, talk))
    answered: list[Answered] = []
    for length, group in sorted(asked.items()):
        pictures = [(papers[(index + shift) % len(papers)].square,) for index, _ in group]
        said: list[list[str]] = [[] for _ in group]
        for turn in range(length):
            texts = answers.answer([_asked(talk, said[i]) for i, (_, talk) in enumerate(group)], pictures)
            for i, text in enumerate(texts):
                said[i].append(text)
                answered.append(Answered(group[i][0], group[i][1][turn], text))
    return Report(tuple(answered))


def _asked(talk: Talk, said: Sequence[str]) -> Conversation:
    """The talk up to the next question, with what the model said so far."""
    turns: list[Turn] = []
    for number, exchange in enumerate(talk[: len(said) + 1]):
        picture = (ImagePart(b"", "picture"),) if number == 0 else ()
        turns.append(Turn("user", (*picture, TextPart(exchange.question))))
        if number < len(said):
            turns.append(Turn("assistant", (TextPart(said[number]),)))
    return Conversation(tuple(turns))


class Exam:
    """Accuracy by kind, for the log of a run."""

    def __init__(self, papers: Iterable[Paper], template: Template, *, batch: int = 32) -> None:
        self._papers, self._template, self._batch = tuple(papers), template, batch

    def measure(self, learner: Learner) -> Mapping[str, float]:
        report = sit_exam(self._papers, learner, self._template, batch=self._batch)
        figures = {"all": report.score().accuracy}
        figures |= {str(kind): report.score(kind).accuracy for kind in report.kinds()}
        figures |= {str(language): report.score(language=language).accuracy for language in Language}
        return figures
