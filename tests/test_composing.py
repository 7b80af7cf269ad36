"""Which requests should meet one decoder."""

import pytest

from omnilmm.composing import NUM_OPENING_IDS, affinity
from omnilmm.messages import ChatRequest, Conversation, ImagePart, Prompt, TextPart, Turn

RULE = Turn("system", (TextPart("Be brief."),))
FIRST = Turn("user", (ImagePart(b"", "p"), TextPart("What?")))
LATER = (Turn("assistant", (TextPart("A cat."),)), Turn("user", (ImagePart(b"", "p"), TextPart("And?"))))


def meets(*turns, keys=(), ids=(), **changes):
    request = ChatRequest("r", Conversation(turns), max_tokens=8, **changes)
    return affinity(request, Prompt(tuple(ids), (), penalty_ids=()), keys)


def test_the_opening_of_a_conversation_names_it():
    opening = meets(FIRST, keys=["a"])
    assert opening == meets(FIRST, *LATER, keys=["a", "b"]) == meets(RULE, FIRST, keys=["a"])
    others = {
        meets(FIRST, keys=["b"]),
        meets(Turn("user", (TextPart("What?"),))),
        meets(Turn("user", (ImagePart(b"", "p"), TextPart("Who?"))), keys=["a"]),
        meets(FIRST, keys=["a"], scope="another"),
    }
    assert len(others - {opening}) == 4


def test_a_session_names_it_whatever_is_said():
    assert meets(FIRST, keys=["a"], session="s") == meets(LATER[1], keys=["b"], session="s")
    assert meets(FIRST, keys=["a"], session="s") != meets(FIRST, keys=["a"], session="t")
    assert meets(FIRST, keys=["a"], session="s") != meets(FIRST, keys=["a"], session="s", scope="another")


@pytest.mark.parametrize("raw", ["text", (3,) * 70])
def test_raw_prompts_are_named_by_their_first_ids(raw):
    shared = [3] * NUM_OPENING_IDS
    assert meets(raw=raw, ids=[*shared, 4]) == meets(raw=raw, ids=[*shared, 5])
    assert meets(raw=raw, ids=[*shared, 4]) != meets(raw=raw, ids=[*shared[1:], 4])
