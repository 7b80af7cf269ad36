"""Lists of models: what they open, and that a narrower list never opens more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnilmm.tenancy.access import is_entry, is_within, narrowed, opens, split_model

NAMES = [f"{base}{adapter}" for base in ("a", "b") for adapter in ("", ":x", ":y")]
ENTRIES = [*NAMES, "a:*", "b:*"]
LISTS = st.none() | st.frozensets(st.sampled_from(ENTRIES))


def opened(entries):
    return {name for name in NAMES if entries is None or opens(entries, name)}


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([], set()),
        (["a"], {"a"}),
        (["a:x"], {"a:x"}),
        (["a:*"], {"a:x", "a:y"}),
        (["a", "a:*"], {"a", "a:x", "a:y"}),
        (["b:y", "a"], {"b:y", "a"}),
    ],
)
def test_what_a_list_opens(entries, names):
    assert opened(entries) == names


@given(LISTS, LISTS)
def test_narrowed_opens_what_both_do(first, second):
    assert opened(narrowed(first, second)) == opened(first) & opened(second)


@given(st.frozensets(st.sampled_from(ENTRIES)), LISTS)
def test_within_never_opens_more(narrow, wide):
    if is_within(narrow, wide):
        assert opened(narrow) <= opened(wide)
        assert opens(narrow, "a:later") <= (wide is None or opens(wide, "a:later"))


def test_a_pattern_is_no_model():
    assert not opens(["a"], "a:*")
    assert not is_within(["a:*"], ["a:x", "a:y"]), "adapters that come later would be opened too"


@pytest.mark.parametrize("entry", ["m", "m:a", "m:*", "omnilmm-3b:my.adapter_2", "9"])
def test_the_three_forms(entry):
    assert is_entry(entry)


@pytest.mark.parametrize(
    "entry", ["", "*", "*:a", "m*", "m:", ":a", "m:a:b", "m:a*", "m:**", "-m", "m:-a", "m a", "m:a\n", "m" * 129, "ü"]
)
def test_other_forms_are_none(entry):
    assert not is_entry(entry)


def test_a_name_is_a_base_and_an_adapter():
    assert split_model("m:a") == ("m", "a")
    assert split_model("m") == ("m", "")
