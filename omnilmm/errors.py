"""Every failure a user can meet, with the HTTP status and the safe words it carries.

    OmniError                        500  what we did not foresee; the message never leaves the process
    ├── InvalidRequest               400  a field or a combination of fields is wrong (`param`, `code`)
    │   ├── ImageError               400  a picture is wrong (`code` is one of IMAGE_CODES)
    │   ├── ContextLengthExceeded    400  prompt + max_tokens do not fit the model
    │   ├── PayloadTooLarge          413  the body or a picture file is over its byte cap
    │   └── UnsupportedMediaType     415  the body is not plain application/json
    ├── Unauthorized                 401  no key, or not one of ours
    ├── Forbidden                    403  a good key that may not do this
    ├── NotFound                     404  unknown model, file, batch or route
    ├── RateLimited                  429  the tenant is over a limit of its own
    ├── Overloaded                   503  we have no room; come back after `retry_after` seconds
    │   ├── QueueFull                503  a line holds as much of this tenant as it may; so it will a moment later
    │   └── ReplicaLost              503  the replica serving this died; the flow retries it elsewhere
    ├── DeadlineExceeded             504  the request's own time ran out
    └── StartupError                  -   a checkpoint, a setting or a server cannot be used (never over HTTP)
        ├── CheckpointError           -   names the file and the tensor
        └── ConfigError               -   names the setting

Messages are written by us, never built from a payload, a path or another library's error text.
"""

from __future__ import annotations

from typing import Any

MAX_MESSAGE_CHARS = 512

IMAGE_CODES = frozenset(
    {
        "invalid_image",
        "invalid_image_format",
        "invalid_base64_image",
        "invalid_image_url",
        "image_too_large",
        "image_too_small",
        "image_parse_error",
        "invalid_image_mode",
        "image_file_too_large",
        "unsupported_image_media_type",
        "empty_image_file",
        "failed_to_download_image",
    }
)
"""OpenAI's own list of picture error codes."""


class OmniError(Exception):
    """The root. `str(error)` is safe to show only where the subclass's status is not 500.

    Args:
        message: one sentence for the client, cut at 512 characters.
        param: path of the offending field, e.g. ``messages[0].content[1].image_url.url``.
        code: machine-readable reason; the class's default if omitted.
        retry_after: seconds after which a retry makes sense (429 and 503 only).
    """

    status: int = 500
    type: str = "server_error"
    default_code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.code, self.retry_after))

    def body(self) -> dict[str, Any]:
        """The OpenAI error object: ``{"error": {"message", "type", "param", "code"}}``."""
        message = self.message if self.status != 500 else "The server had an error processing your request."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(
    cls: type[OmniError], message: str, param: str | None, code: str | None, retry_after: float | None
) -> OmniError:
    return cls(message, param=param, code=code, retry_after=retry_after)


class InvalidRequest(OmniError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class ImageError(InvalidRequest):
    """A picture that cannot be used; `code` is one of IMAGE_CODES."""

    default_code = "invalid_image"


class ContextLengthExceeded(InvalidRequest):
    default_code = "context_length_exceeded"


class PayloadTooLarge(InvalidRequest):
    status = 413
    default_code = "payload_too_large"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    default_code = "unsupported_media_type"


class Unauthorized(OmniError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(OmniError):
    status = 403
    type = "invalid_request_error"
    default_code = "forbidden"


class NotFound(OmniError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class RateLimited(OmniError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Overloaded(OmniError):
    status = 503
    type = "server_error"
    default_code = "overloaded"


class QueueFull(Overloaded):
    """A line holds as much of this tenant as it may.

    `lasts_s` is for how many seconds whoever asks for the same tenant and `model` may be told so again without another
    look; 0 for not at all. Neither travels between processes.
    """

    lasts_s: float = 0.0
    model: str = ""


class ReplicaLost(Overloaded):
    default_code = "replica_lost"


class DeadlineExceeded(OmniError):
    status = 504
    type = "server_error"
    default_code = "deadline_exceeded"


class StartupError(OmniError):
    default_code = "startup_error"


class CheckpointError(StartupError):
    default_code = "checkpoint_error"


class ConfigError(StartupError):
    default_code = "config_error"
