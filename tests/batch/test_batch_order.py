"""Lines about one picture run together, and among them those that begin alike."""

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from omnilmm.batch.order import Place, in_order, place_of


@dataclass(frozen=True)
class Entry:
    name: str
    place: Place


def entry(name, text, *pictures, system=None):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Entry(name, place_of({"model": "m", "messages": messages}))


def order(*entries):
    return "".join(e.name for e in in_order(entries))


def test_pictures_stay_together_in_the_order_of_the_file():
    assert order(entry("a", "1", "B"), entry("b", "1", "A"), entry("c", "2", "B"), entry("d", "2", "A")) == "acbd"


def test_a_picture_with_others_stays_with_it_alone():
    assert order(entry("a", "1", "A"), entry("b", "1", "B"), entry("c", "1", "A", "B"), entry("d", "2", "A")) == "adcb"


def test_texts_that_begin_alike_stand_together():
    long = "You are " + "very " * 200
    got = order(
        entry("a", "q1", system=long + "kind"),
        entry("b", "q1", system=long + "short"),
        entry("c", "q2", system=long + "kind"),
        entry("d", "q2", system=long + "short"),
    )
    assert got == "acbd"


def test_white_space_in_base64_makes_no_other_picture():
    assert entry("a", "1", "data:image/png;base64,AA\nBB").place == entry("b", "1", "data:image/png;base64,AABB").place


def test_pictures_by_file_id_and_in_responses():
    chat = place_of({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"file_id": "f"}}]}]})
    response = place_of({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]})
    inline = place_of({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "f"}]}]})
    assert chat.picture == response.picture == inline.picture != b""


@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_body_has_a_place(value):
    place_of({"messages": value, "input": [value], "prompt": value})


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("xyz"))))
def test_every_line_runs_once_and_each_picture_in_one_stretch(pairs):
    entries = [entry(f"{i},", text, picture) for i, (picture, text) in enumerate(pairs)]
    got = in_order(entries)
    assert sorted(e.name for e in got) == sorted(e.name for e in entries)
    pictures = [e.place.picture for e in got]
    changes = sum(a != b for a, b in pairwise(pictures))
    assert changes == max(len(set(pictures)) - 1, 0)
