"""A request that is right in everything, to be made wrong in one thing."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("thorough", max_examples=2000, deadline=None)


@pytest.fixture
def good() -> dict[str, Any]:
    return {"model": "omnilmm-12b", "messages": [{"role": "user", "content": "What is this?"}]}


@pytest.fixture(scope="session")
def heavy_body() -> bytes:
    """A request with a picture of 15 MiB, 20 MiB as a data URI, beside text that is not Latin and has escapes."""
    url = "data:image/png;base64," + base64.b64encode(os.urandom(15 * 2**20)).decode()
    text = 'Was steht da?\n"引用" 😀 \\'
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    document = {"model": "omnilmm-12b", "messages": [{"role": "user", "content": parts}]}
    return json.dumps(document, ensure_ascii=False).encode()
