"""Many questions at once get the answers that each gets alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from training_cases import square, talk

from omnilmm.config import InputHandling
from omnilmm.messages import Conversation
from omnilmm.models.attention import DenseAttend
from omnilmm.prompt.detokenize import answer_text
from omnilmm.prompt.template import Template
from omnilmm.training.answers import Answers
from omnilmm.training.learner import Learner

QUESTIONS = [
    (talk("What?"), (square(0),)),
    (talk("有几个圆形？"), (square(1),)),
    (talk("What is this, and where is it, and how many are there?", "Two.", "Where?"), (square(2),)),
    (talk("Compare the two.", num_images=2), (square(3), square(4))),
    (talk("No picture?", num_images=0), ()),
]


@torch.inference_mode()
def alone(learner: Learner, template: Template, asked: Conversation, pictures: tuple[np.ndarray, ...], num: int) -> str:
    """One token at a time over one growing sequence."""
    prompt = template.render(asked, InputHandling.SAFE)
    embeds = learner.language.embed(torch.tensor(prompt.ids))
    if pictures:
        vectors = learner.encode(torch.from_numpy(np.stack(pictures)))
        for span in prompt.spans:
            embeds[span.start : span.start + span.length] = vectors[span.image]
    attend, ids = DenseAttend(learner.config.language.num_layers), []
    for _ in range(num):
        positions = torch.arange(len(attend), len(attend) + len(embeds))
        token = int(learner.language.logits(learner.language(embeds, positions, attend)[-1:]).argmax())
        if token in template.eos_ids:
            break
        ids.append(token)
        embeds = learner.language.embed(torch.tensor([token]))
    return answer_text(template.tokenizer, ids, learner.config.family)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_answers_do_not_depend_on_the_company(
    batch: int, learner_of: Callable[..., Learner], template: Template
) -> None:
    learner = learner_of()
    answers = Answers(learner, template, max_tokens=7, batch=batch)
    texts = answers.answer([asked for asked, _ in QUESTIONS], [pictures for _, pictures in QUESTIONS])
    assert texts == [alone(learner, template, *question, 7) for question in QUESTIONS]
    assert len({*texts}) > 1
    assert learner.training


def test_an_answer_ends_at_the_end_token(learner_of: Callable[..., Learner], template: Template) -> None:
    learner = learner_of()
    asked, pictures = QUESTIONS[0]
    answers = Answers(learner, template, max_tokens=5)
    (before,) = answers.answer([asked], [pictures])
    assert before
    with torch.no_grad():  # whatever the hidden state, one of two opposite scores is above all others
        learner.language.head.weight.zero_()
        learner.language.norm.weight.zero_()
        learner.language.head.weight[0] = 0
    assert answers.answer([asked], [pictures]) != [before]
    template.eos_ids = (0,)
    assert answers.answer([asked], [pictures]) == [""]
