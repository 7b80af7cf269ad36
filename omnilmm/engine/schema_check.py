"""Whether a client's schema may be compiled at all, and what the client is told if not.

What can be seen is looked at first: size, depth, syntax. The rest is found out by compiling it in a child process,
which may die of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import omnilmm
from omnilmm.engine.schema import OPTIONS, WHITESPACE
from omnilmm.errors import Overloaded

logger = logging.getLogger(__name__)

KEYWORDS = (
    "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties", "not", "if",
    "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "minProperties",
    "maxProperties", "patternProperties", "$dynamicRef", "$recursiveRef", "contentEncoding", "contentMediaType",
)  # fmt: skip
"""Keywords that cannot be enforced, or not always: the only words of an error that are passed on."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a schema may cost. `timeout_s` is CPU time of a process that compiles it with `memory_bytes` at most."""

    timeout_s: float = 2.0
    memory_bytes: int = 384 * 1024**2
    max_source_bytes: int = 64 * 1024
    max_depth: int = 32
    max_cached: int = 32

    @property
    def patience_s(self) -> float:
        """Seconds of waiting for a grammar, after which it is not the schema that is to blame."""
        return 5 * self.timeout_s


def read_schema(source: str, limits: GrammarLimits) -> str:
    """The schema in one spelling, with our options in it. ValueError with words for the client if it is unfit."""
    if len(source.encode(errors="replace")) > limits.max_source_bytes:
        raise ValueError(f"The schema is larger than {limits.max_source_bytes} bytes.")
    try:
        schema = json.loads(source, parse_constant=_refuse_constant)
        is_deep = _depth(schema) > limits.max_depth
    except RecursionError:
        is_deep = True
    except ValueError:
        raise ValueError("The schema is not valid JSON.") from None
    if is_deep:
        raise ValueError(f"The schema is nested more than {limits.max_depth} levels deep.")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("The schema is not a JSON object.")
    if OPTIONS in schema:
        raise ValueError(f"The schema has the key {OPTIONS}, which is not part of JSON Schema.")
    return with_options(schema)


def with_options(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, OPTIONS: {"whitespace_pattern": WHITESPACE}})


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _depth(value: Any) -> int:
    """Levels of objects and arrays."""
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def probe_schema(schema: str, limits: GrammarLimits) -> str:
    """Compile a schema where it can do no harm. What to tell the client, or "" if it is fit.

    Raises:
        Overloaded: it could not be found out.
    """
    package_root = Path(omnilmm.__file__).resolve().parents[1]
    command = [sys.executable, "-P", "-m", "omnilmm.engine.schema_probe"]
    command += [str(math.ceil(limits.timeout_s)), str(limits.memory_bytes)]
    try:
        probe = subprocess.run(  # noqa: S603 - our own command; the schema goes through a pipe
            command,
            input=schema.encode(),
            capture_output=True,
            timeout=limits.patience_s,
            check=False,
            env={"PYTHONPATH": os.pathsep.join([str(package_root), *filter(None, sys.path)])},
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
    except (OSError, subprocess.TimeoutExpired):
        raise _busy() from None
    ready, *verdict = probe.stdout.splitlines() or [b""]
    if ready != b"true":
        logger.error("the schema probe could not start (exit status %d)", probe.returncode)
        raise _busy()
    if not verdict:  # the kernel ended it
        return "The schema takes too long or too much memory to compile."
    return _explain(json.loads(verdict[0]))


def _busy() -> Overloaded:
    return Overloaded("The schema could not be compiled right now.", retry_after=1.0)


def _explain(error: str) -> str:
    """Words of our own for an error of the library, which may quote the schema."""
    if not error:
        return ""
    if keywords := [word for word in KEYWORDS if f'"{word}"' in error]:
        return f"The schema uses {', '.join(keywords)}, which cannot be enforced."
    for sign, words in (
        ("oneOf", "The schema uses oneOf with branches that may overlap; use anyOf."),
        ("format", "The schema uses a format that cannot be enforced."),
        ("regex parse error", "A pattern of the schema is not valid, or cannot be enforced."),
        ("Unsatisfiable", "No value fits the schema."),
        ("NoExtensionBias", "No value fits the schema."),
        ("too big", "The schema is too complex."),
        ("fuel", "The schema is too complex."),
        ("Unable to determine", "The schema is too complex."),
        ("items; max is", "The schema is too complex: it leaves too many choices at a time."),
    ):
        if sign in error:
            return words
    return "The schema is not valid, or cannot be enforced."
