"""The trained checkpoints that are shipped, asked over HTTP: the words are right, and they are the pipeline's."""

import asyncio
import base64

import httpx
import pytest
from e2e_cluster import application

from cluster.demo import demo_picture, nano_checkpoint
from omnilmm.config import EngineConfig, Family
from omnilmm.messages import ChatRequest, Conversation, Delta, ImagePart, TextPart, Turn
from omnilmm.pipeline import Pipeline

pytestmark = pytest.mark.e2e

NAMES = {Family.OMNILMM_3B: "nano:3b", Family.OMNILMM_12B: "nano:12b"}
SHIPPED = [name for family, name in NAMES.items() if nano_checkpoint(family) is not None]

ASKED = (  # the questions of one conversation about the picture, each with a word of its right answer
    (("What is in the picture?", "orange circle"),),
    (("What is in the picture?", "blue square"),),
    (("Is there a green star?", "No"),),
    (("圆形是什么颜色？", "橙色"),),
    (("What color is the circle?", "orange"), ("And the other one?", "blue")),
)


def served_as(name):
    return name.replace(":", "-")


@pytest.fixture(scope="module")
def nano(cluster):
    """A function that answers the last of some messages, over HTTP. All that are shipped are served side by side."""
    args = {
        "models": [{"name": served_as(name), "path": name, "dtype": "float32"} for name in SHIPPED],
        "cache": {"redis": "none"},
    }
    with application("nano", args) as prefix:

        def ask(name, messages):
            body = {"model": served_as(name), "messages": messages, "temperature": 0, "max_tokens": 64}
            response = httpx.post(f"{cluster.url}{prefix}/v1/chat/completions", json=body, timeout=120)
            return response.raise_for_status().json()["choices"][0]["message"]["content"]

        yield ask


def pipeline_answers(name):
    """The pipeline's last answer in each conversation of ASKED."""

    async def answer_all():
        async with Pipeline.load(name, dtype="float32", engine=EngineConfig(num_blocks=256)) as pipeline:
            return [await answer(pipeline, [question for question, _ in asked]) for asked in ASKED]

    async def answer(pipeline, questions):
        turns = []
        for question in questions:
            parts = (ImagePart(demo_picture(), "picture"),) if not turns else ()
            turns.append(Turn("user", (*parts, TextPart(question))))
            request = ChatRequest("r", Conversation(tuple(turns)), max_tokens=64, temperature=0.0)
            text = "".join([event.text async for event in pipeline.answer(request) if isinstance(event, Delta)])
            turns.append(Turn("assistant", (TextPart(text),)))
        return text

    return asyncio.run(answer_all())


@pytest.mark.parametrize("name", SHIPPED)
def test_real_questions_get_right_answers_which_are_the_pipelines(name, nano):
    url = "data:image/png;base64," + base64.b64encode(demo_picture()).decode()
    for asked, expected in zip(ASKED, pipeline_answers(name), strict=True):
        messages = []
        for question, word in asked:
            text = {"type": "text", "text": question}
            content = [{"type": "image_url", "image_url": {"url": url}}, text] if not messages else question
            messages.append({"role": "user", "content": content})
            answer = nano(name, messages)
            assert word in answer, (question, answer)
            messages.append({"role": "assistant", "content": answer})
        assert messages[-1]["content"] == expected
