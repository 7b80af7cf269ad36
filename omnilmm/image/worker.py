"""The child process that decodes: `python -m omnilmm.image.worker LIMITS PARENT_PID`.

It reads requests from its standard input and writes answers to its standard output, one after the other
(`frames`). It has no secrets, no files and little memory: a picture that breaks a decoder breaks only this.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import warnings
from typing import BinaryIO

from omnilmm.config import ImageLimits
from omnilmm.errors import InvalidRequest
from omnilmm.image import frames
from omnilmm.image.transform import check_pillow, prepare

_MAX_OPEN_FILES = 32
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def main(arguments: list[str]) -> int:
    limits = ImageLimits(**json.loads(arguments[0]))
    check_pillow()
    confine(limits, parent_pid=int(arguments[1]))
    warnings.simplefilter("ignore")
    requests = os.fdopen(0, "rb", closefd=False)
    answers = os.fdopen(os.dup(1), "wb")
    # From here on nobody but us writes to the pipe, and a library's complaints go nowhere.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _send(answers, frames.pack({}, 0), b"")
    while serve_one(requests, answers, limits):
        pass
    return 0


def confine(limits: ImageLimits, *, parent_pid: int) -> None:
    """Gives up what decoding does not need. Memory is capped by the kernel on Linux only."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    if sys.platform == "linux":
        import ctypes
        import signal

        resource.setrlimit(resource.RLIMIT_AS, (limits.decode_memory_bytes, limits.decode_memory_bytes))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # Reading the end of the pipe ends us when we are idle; this does while we decode.
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent_pid:
            sys.exit(1)  # it died before we could ask to be told


def serve_one(requests: BinaryIO, answers: BinaryIO, limits: ImageLimits) -> bool:
    """Answers one request; False when the parent has closed the pipe."""
    head = requests.read(frames.HEAD_BYTES)
    if len(head) < frames.HEAD_BYTES:
        return False
    fields_bytes, payload_bytes = frames.unpack_head(head)
    policy = frames.policy_of(frames.unpack_fields(requests.read(fields_bytes)))
    data = requests.read(payload_bytes)
    if len(data) < payload_bytes:
        return False
    _allow_cpu(limits.decode_timeout_s)
    try:
        picture = prepare(data, policy=policy, limits=limits, param="")
    except InvalidRequest as error:
        _send(answers, frames.pack(frames.refusal_fields(error), 0), b"")
    else:
        _send(answers, frames.pack(frames.answer_fields(picture.identity), len(picture.square)), picture.square)
    return True


def _allow_cpu(seconds: float) -> None:
    """The kernel kills us when this request takes longer, should the parent be too busy to do it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + 1, hard))


def _send(answers: BinaryIO, head: bytes, payload: bytes) -> None:
    answers.write(head)
    answers.write(payload)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
