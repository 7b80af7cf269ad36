"""The lines of output and error files, as OpenAI writes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from omnilmm.batch.states import BatchUsage, Status
from omnilmm.errors import OmniError

UNFINISHED: Mapping[Status, tuple[str, str]] = {
    Status.EXPIRED: ("batch_expired", "The completion window ended before this line was answered."),
    Status.CANCELLED: ("batch_cancelled", "The batch was cancelled before this line was answered."),
}


def answered(custom_id: str, request_id: str, body: Mapping[str, Any]) -> bytes:
    """The line of a request that was answered."""
    return _line(custom_id, {"status_code": 200, "request_id": request_id, "body": body}, None)


def refused(custom_id: str, request_id: str, error: OmniError) -> bytes:
    """The line of a request that would have met this error over HTTP."""
    return _line(custom_id, {"status_code": error.status, "request_id": request_id, "body": error.body()}, None)


def unfinished(custom_id: str, status: Status) -> bytes:
    """The line of a request whose turn never came because the batch ended so."""
    code, message = UNFINISHED[status]
    return _line(custom_id, None, {"code": code, "message": message})


def usage_of(line: bytes) -> BatchUsage:
    """What an answered line took, by what its body says."""
    usage = json.loads(line)["response"]["body"].get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    images = usage.get("images") or ()
    return BatchUsage(
        input_tokens=usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        cached_tokens=details.get("cached_tokens", 0),
        output_tokens=usage.get("completion_tokens", usage.get("output_tokens", 0)),
        images=len(images),
        encoded=sum(image.get("source") == "encoded" for image in images),
    )


def _line(custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, str] | None) -> bytes:
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
