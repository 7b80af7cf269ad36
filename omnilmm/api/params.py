"""How a place inside a request is spelled in the `param` of an error: ``messages[0].content[1].image_url.url``."""

from __future__ import annotations

import re
from collections.abc import Sequence

Path = tuple[str | int, ...]
"""The way from the top of the body to a value: a name per object entered, a position per array."""

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}|[0-9]{1,20}")


def spell(path: Sequence[str | int]) -> str | None:
    """The path as text, or None for the body itself.

    Names may come from the client. One that is not a plain identifier is not repeated to it: the path then
    ends at the object that holds the name.
    """
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_NAME.fullmatch(step):
            text += f".{step}" if text else step
        else:
            break
    return text or None
