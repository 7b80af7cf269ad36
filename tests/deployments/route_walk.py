"""Every route of an application, found by walking it: a route that is added later is walked too."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastapi import FastAPI

_PARAMETER = re.compile(r"\{[^}]*\}")


def every_route(app: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, path) of each, with "x" for what stands in braces."""
    waiting = list(app.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)  # included, or mounted
        waiting += getattr(inner, "routes", [])
        path = getattr(route, "path", None)
        for method in sorted(getattr(route, "methods", None) or ()):
            if path is not None:
                yield method, _PARAMETER.sub("x", path)
