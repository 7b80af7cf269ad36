"""What pydantic found wrong with a document, as the one error OpenAI's API would send.

A document can be wrong in many places. One is reported: the first in the order of the document, so that the answer
does not depend on how our models happen to be declared. The words are ours; pydantic's own text and the offending
value never reach the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from omnilmm.api.params import Path, spell
from omnilmm.errors import ContextLengthExceeded, InvalidRequest

Unions = frozenset[tuple[str, ...]]
"""Locations after which pydantic adds the tag of the chosen union member. "*" stands for an array position."""

M = TypeVar("M", bound=BaseModel)

OWN_CODES = frozenset({"invalid_value", "unsupported_value"})
"""Types of the PydanticCustomErrors our models raise: the code itself. Their messages continue "'param' ..."."""

_TYPE_NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    type(None): "null",
}

_EXPECTED: Mapping[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "tuple_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "union_tag_not_found": "a string or an array",
}

_RULES: Mapping[str, tuple[str, str]] = {
    "missing": ("missing_required_parameter", "is required"),
    "unknown": ("unknown_parameter", "is not a known parameter"),
    "unknown_unnamed": ("unknown_parameter", "holds an unknown parameter"),
    "greater_than_equal": ("{number}_below_min_value", "must be >= {ge}"),
    "greater_than": ("{number}_below_min_value", "must be > {gt}"),
    "less_than_equal": ("{number}_above_max_value", "must be <= {le}"),
    "less_than": ("{number}_above_max_value", "must be < {lt}"),
    "string_too_long": ("string_above_max_length", "is longer than {max_length} characters"),
    "string_too_short": ("string_below_min_length", "must not be shorter than {min_length} character(s)"),
    "string_pattern_mismatch": ("invalid_value", "has the wrong form"),
    "name_too_long": ("property_name_above_max_length", "has a name of more than {max_length} characters"),
    "name_mismatch": ("invalid_value", "has a name of the wrong form"),
    "too_long": ("array_above_max_length", "has more than {max_length} elements"),
    "too_short": ("array_below_min_length", "must not have fewer than {min_length} element(s)"),
    "object_too_long": ("object_above_max_properties", "has more than {max_length} members"),
    "no_messages": ("missing_required_parameter", "must not be empty"),
    "no_content": ("invalid_value", "must be a string or an array of at least one part"),
    "choice": ("invalid_value", "must be one of {choices}"),
    "none_required": ("unsupported_value", "can only be null"),
    "type": ("invalid_type", "must be {wanted}, not {given}"),
}
"""What we call a fault: OpenAI's code, and the rest of a sentence that starts with the place."""


@dataclass(frozen=True, slots=True)
class _Fault:
    kind: str  # pydantic's name of the rule that was broken
    path: Path
    limits: Mapping[str, Any]  # what the rule allows
    words: str  # pydantic's message, shown only where it is our own
    is_name: bool  # the name of a member is wrong, not its value


def validate(kind: type[M], document: Mapping[str, object], unions: Unions) -> M:
    """The document as a model of this kind. `unions` are those of the model.

    Raises:
        InvalidRequest: with the `code` OpenAI uses and the exact place as `param`.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise refusal(error, document, unions) from None


def refusal(error: ValidationError, document: object, unions: Unions) -> InvalidRequest:
    """The error to send for a document a model did not take. `document` is what was validated."""
    faults = [_fault(detail, unions) for detail in error.errors(include_url=False, include_input=False)]
    ranks: _Ranks = {}
    first = min(faults, key=lambda fault: _order(fault.path, document, ranks))
    param = spell(first.path[:-1] if first.is_name else first.path)
    place = f"'{param}'" if param else "The body"
    if first.kind == "string_too_long" and _is_read(first.path):
        words = "is longer than {max_length} characters, which no model here can read".format(**first.limits)
        return ContextLengthExceeded(f"{place} {words}.", param=param)
    code, words = _describe(first, _look_up(document, first.path))
    return InvalidRequest(f"{place} {words}.", param=param, code=code)


def _is_read(path: Path) -> bool:
    """Whether the text there is for the model to read."""
    root = path[0]
    if root in ("messages", "input"):
        return path[-1] in ("content", "text", "input")
    return root in ("prompt", "instructions")


def _fault(detail: ErrorDetails, unions: Unions) -> _Fault:
    kind, location, limits = detail["type"], detail["loc"], detail.get("ctx", {})
    pattern = tuple("*" if isinstance(step, int) else step for step in location)
    path = tuple(step for i, step in enumerate(location) if pattern[:i] not in unions)  # without the tags
    is_name = len(path) > 1 and path[-1] == "[key]"
    if is_name:
        path = path[:-1]
    discriminator = limits.get("discriminator", "")
    if discriminator.startswith("'"):  # a field decides which member of the union this is: that field is the fault
        path = (*path, discriminator.strip("'"))
    if "param" in limits:
        path = (limits["param"],)
    return _Fault(kind, path, limits, detail["msg"], is_name)


_Ranks = dict[int, dict[str, int]]
"""Position of every name in the objects looked at so far, by the object's id()."""


def _order(path: Path, document: object, ranks: _Ranks) -> tuple[float, ...]:
    """Sorts faults as they stand in the document; what a container lacks comes after what it holds."""
    order: list[float] = []
    node = document
    for step in path:
        child = _look_up(node, (step,))
        if child is _ABSENT:
            break
        if isinstance(node, dict) and id(node) not in ranks:
            ranks[id(node)] = {name: rank for rank, name in enumerate(node)}
        order.append(step if isinstance(step, int) else ranks[id(node)][step])
        node = child
    return (*order, float("inf"))


_ABSENT = object()


def _look_up(document: object, path: Path) -> object:
    """The value at the end of the path, or _ABSENT."""
    node = document
    for step in path:
        is_there = step in node if isinstance(node, dict) else isinstance(node, list) and isinstance(step, int)
        if not is_there:
            return _ABSENT
        node = node[step]  # type: ignore[index]
    return node


def _describe(fault: _Fault, value: object) -> tuple[str, str]:
    if fault.kind in OWN_CODES:
        return fault.kind, fault.words
    code, words = _RULES[_rule(fault, value)]
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in fault.limits.items()}
    is_decimal = any(isinstance(limit, float) for limit in fault.limits.values())
    return code.format(number="decimal" if is_decimal else "integer"), words.format(
        **limits,
        choices=limits.get("expected_tags") or limits.get("expected"),
        wanted=_EXPECTED.get(fault.kind, "a string"),
        given=_TYPE_NAMES.get(type(value), "this"),
    )


def _rule(fault: _Fault, value: object) -> str:
    """The entry of _RULES. Whatever is nothing else is a value of the wrong type."""
    rule = fault.kind
    match rule:
        case "extra_forbidden":
            rule = "unknown" if spell(fault.path) != spell(fault.path[:-1]) else "unknown_unnamed"
        case "string_too_long" | "string_pattern_mismatch" if fault.is_name:
            rule = "name_too_long" if rule == "string_too_long" else "name_mismatch"
        case "too_long" if isinstance(value, dict):
            rule = "object_too_long"
        case "too_short" if fault.path[-1] in ("messages", "input"):
            rule = "no_messages"
        case "too_short" if fault.path[-1] == "content":
            rule = "no_content"
        case "literal_error" | "union_tag_invalid" if isinstance(value, str):
            rule = "choice"
        case "union_tag_not_found" if value is _ABSENT:
            rule = "missing"
        case "union_tag_not_found" if value is None and fault.path[-1] == "content":
            rule = "no_content"
    return rule if rule in _RULES else "type"
