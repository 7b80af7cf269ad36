"""Typed reading of a JSON object, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omnilmm.errors import CheckpointError


class Fields:
    """One JSON object of a checkpoint. A key that holds null counts as left out.

    Every method raises CheckpointError naming `file` and the key when the value is of another kind, or is left out
    and has no default.
    """

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self._values = values

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def refuse(self, key: str, reason: str) -> CheckpointError:
        """The error to raise about `key`; `reason` continues the sentence that the key begins."""
        return CheckpointError(f"{self.file}: {key} {reason}.")

    def must_be(self, key: str, wanted: Any, *, default: Any) -> None:
        value = self._values[key] if self.has(key) else default
        if value != wanted:
            raise self.refuse(key, f"has a value that is not supported (only {wanted!r} is)")

    def count(self, key: str, *, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, "is not a whole number above zero")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.refuse(key, "is not a number above zero")
        return float(value)

    def text(self, key: str) -> str:
        value = self._get(key, None)
        if not isinstance(value, str):
            raise self.refuse(key, "is not a string")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "is neither true nor false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; empty if left out."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "is not an object")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self._get(key, None)
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not ids or any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise self.refuse(key, "is neither a token id nor a list of them")
        return ids

    def _get(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self._values[key]
        if default is None:
            raise self.refuse(key, "is missing")
        return default
