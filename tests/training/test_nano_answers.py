"""The checkpoints that are shipped, asked through the ordinary pipeline: pictures in, words out, right or wrong."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.demo import demo_picture, nano_checkpoint
from omnilmm.config import EngineConfig, Family
from omnilmm.messages import ChatRequest, Conversation, Delta, ImagePart, TextPart, Turn
from omnilmm.pipeline import Pipeline
from omnilmm.training.scenes import Split
from omnilmm.training.scenes_ask import Talk, ask
from omnilmm.training.scenes_check import Exchange, Kind, is_right
from omnilmm.training.scenes_draw import draw, load_scenery
from omnilmm.training.scenes_make import make_scene
from omnilmm.training.scenes_words import Language

SEED = 20_261_123  # of a world that no training and no exam has drawn
NUM_SCENES = 32

SHIPPED = [family for family in (Family.OMNILMM_3B, Family.OMNILMM_12B) if nano_checkpoint(family) is not None]


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda family: family.name)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder = nano_checkpoint(request.param)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def papers() -> list[tuple[bytes, tuple[Talk, ...]]]:
    """PNG files of unseen scenes, with two conversations about each, one in either language."""
    pytest.importorskip("matplotlib")  # brings the fonts
    scenery = load_scenery()
    drawn = []
    for index in range(NUM_SCENES):
        scene, file = make_scene(Split.TEST, SEED, index), io.BytesIO()
        draw(scene, scenery, side=448).save(file, format="PNG")
        drawn.append((file.getvalue(), ask(scene, Split.TEST, SEED, index, num=2)))
    return drawn


def right_and_wrong(
    checkpoint: Path, papers: Sequence[tuple[bytes, tuple[Talk, ...]]]
) -> Iterator[tuple[Exchange, str]]:
    """(exchange, answer) of every question; follow-ups behind the model's own answer."""

    async def answer_all() -> list[tuple[Exchange, str]]:
        answered = []
        async with Pipeline.load(str(checkpoint), device="cpu", engine=EngineConfig(num_blocks=256)) as pipeline:
            for picture, talks in papers:
                for talk in talks:
                    turns: list[Turn] = []
                    for exchange in talk:
                        parts = (ImagePart(picture, "picture"),) if not turns else ()
                        turns.append(Turn("user", (*parts, TextPart(exchange.question))))
                        text = await answer(pipeline, Conversation(tuple(turns)))
                        turns.append(Turn("assistant", (TextPart(text),)))
                        answered.append((exchange, text))
        return answered

    return iter(asyncio.run(answer_all()))


async def answer(pipeline: Pipeline, conversation: Conversation) -> str:
    request = ChatRequest("r", conversation, max_tokens=64, temperature=0.0, repetition_penalty=1.0)
    return "".join([event.text async for event in pipeline.answer(request) if isinstance(event, Delta)])


@pytest.mark.skipif(not SHIPPED, reason="no nano checkpoint is shipped")
def test_answers_about_unseen_scenes_are_right(checkpoint: Path, papers: list[tuple[bytes, tuple[Talk, ...]]]) -> None:
    answered = [*right_and_wrong(checkpoint, papers)]
    assert len(answered) >= 20
    for language in Language:
        own = [(exchange, text) for exchange, text in answered if exchange.language is language]
        wrong = [(exchange.question, exchange.answer, text) for exchange, text in own if not is_right(exchange, text)]
        assert len(wrong) <= len(own) // 10, wrong


@pytest.mark.skipif(not SHIPPED, reason="no nano checkpoint is shipped")
def test_the_pictures_decide(checkpoint: Path, papers: list[tuple[bytes, tuple[Talk, ...]]]) -> None:
    """The same questions about each other's pictures: most answers are no longer right."""
    pictures = [picture for picture, _ in papers]
    shuffled = [(pictures[index - 5], talks) for index, (_, talks) in enumerate(papers)]
    answered = [*right_and_wrong(checkpoint, shuffled)]
    assert sum(is_right(exchange, text) for exchange, text in answered) < 0.7 * len(answered)


@pytest.mark.skipif(not SHIPPED, reason="no nano checkpoint is shipped")
@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("What is in the picture?", ("orange circle", "blue square")),
        ("Is there a green star?", ("No",)),
        ("正方形是什么颜色？", ("蓝色",)),
        ("圆形在哪里？", ("左",)),
        ("Where is the square?", ("right",)),
        ("图中有什么？", ("橙色的圆形", "蓝色的正方形")),
        ("How many shapes are there?", ("2",)),
    ],
)
def test_the_picture_of_the_quickstart_is_understood(checkpoint: Path, question: str, names: tuple[str, ...]) -> None:
    exchange = Exchange(Kind.WHAT, Language.ENGLISH, question, "", frozenset(), frozenset())
    ((_, text),) = right_and_wrong(checkpoint, [(demo_picture(), ((exchange,),))])
    assert all(name in text for name in names), text
