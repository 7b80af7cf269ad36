"""Which models a tenant or a key may use, as the operator writes it.

    BASE           the model of this name, without its adapters
    BASE:ADAPTER   one adapter of it
    BASE:*         all its adapters, also those that come later; not the model without one

There is no other wildcard: a model that is added next year is never opened by a list that was written today. Who may
use everything has no list at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ENTRY: Final = re.compile(rf"{_NAME}(?::(?:{_NAME}|\*))?")
_ALL_ADAPTERS: Final = ":*"


def is_entry(text: str) -> bool:
    """Whether this is one of the three forms."""
    return _ENTRY.fullmatch(text) is not None


def split_model(name: str) -> tuple[str, str]:
    """A model's name as its base and its adapter, which is "" where it has none."""
    base, _, adapter = name.partition(":")
    return base, adapter


def opens(entries: Collection[str], model: str) -> bool:
    """Whether a list opens the model of this name. An entry counts as a name here: "a:*" is opened by "a:*" alone."""
    if model in entries:
        return True
    base, adapter = split_model(model)
    return bool(adapter) and base + _ALL_ADAPTERS in entries


def is_within(narrow: Collection[str], wide: Collection[str] | None) -> bool:
    """Whether `narrow` opens nothing that `wide` does not; None opens everything."""
    return wide is None or all(opens(wide, entry) for entry in narrow)


def narrowed(first: frozenset[str] | None, second: frozenset[str] | None) -> frozenset[str] | None:
    """What both lists open; None opens everything."""
    if first is None or second is None:
        return second if first is None else first
    return frozenset(
        {entry for entry in first if opens(second, entry)} | {entry for entry in second if opens(first, entry)}
    )
