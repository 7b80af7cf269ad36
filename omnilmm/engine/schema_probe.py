"""A child process that tries a strange schema out: `python -m omnilmm.engine.schema_probe CPU_SECONDS MEMORY_BYTES`.

Some schemas take hours or gigabytes to compile, and a thread at it can neither be bounded nor be ended. Here the
kernel does both. Reads the schema from its standard input and writes two lines of JSON: true once it is ready to
begin, then the error of the schema, or "".
"""

from __future__ import annotations

import json
import resource
import sys

from llguidance import LLTokenizer

from omnilmm.engine.schema import build_matcher, rehearse

MAX_ERROR_CHARS = 1000


def main(cpu_seconds: int, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    schema = sys.stdin.read()
    tokenizer = LLTokenizer("byte")  # one token per byte: all that matters before a vocabulary comes in
    print(json.dumps(True), flush=True)
    matcher = build_matcher(tokenizer, schema)
    error = matcher.get_error() if matcher.is_error() else rehearse(matcher)
    print(json.dumps(error[:MAX_ERROR_CHARS]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
