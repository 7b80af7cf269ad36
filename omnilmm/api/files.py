"""``/v1/files`` on the wire: OpenAI's `file` objects, and the form and query that ask for them.

Rules that are ours to choose: the purposes are `batch`, `vision` and `user_data` (the others belong to services we do
not have: `unsupported_value`); a file for a batch that is given no lifetime expires after 30 days, as OpenAI's do;
`status` is always "processed", because a file is whole and usable when its upload is answered.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

from omnilmm.errors import InvalidRequest

MIN_EXPIRES_S, MAX_EXPIRES_S = 3600, 30 * 24 * 3600
BATCH_EXPIRES_S = MAX_EXPIRES_S
MAX_UPLOAD_BYTES = 200 * 1024**2
"""What a file may have, unless the operator says otherwise: OpenAI's cap for a batch's input."""
MAX_FILENAME_CHARS = 255
MAX_FILES_LISTED = 10_000
PURPOSES = ("batch", "vision", "user_data")
OTHER_PURPOSES = ("assistants", "evals", "fine-tune")

UploadPurpose = Literal["batch", "vision", "user_data"]


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output", "vision", "user_data"]
    status: Literal["processed"]
    status_details: None


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(TypedDict):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


def file_list(files: Iterable[FileObject], *, has_more: bool) -> FileList:
    data = list(files)
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def file_deleted(file_id: str) -> FileDeleted:
    return {"id": file_id, "object": "file", "deleted": True}


@dataclass(frozen=True, slots=True)
class UploadForm:
    """The fields of an upload beside the file itself. `expires_after` in seconds from its creation, None for never."""

    purpose: UploadPurpose
    expires_after: int | None


def parse_upload_form(fields: Mapping[str, str]) -> UploadForm:
    """Check the text fields of the form: `purpose`, `expires_after[anchor]`, `expires_after[seconds]`.

    Raises:
        InvalidRequest: with the field as `param`.
    """
    for name in fields:
        if name not in ("purpose", "expires_after[anchor]", "expires_after[seconds]"):
            raise InvalidRequest("The form has a field that is not known.", code="unknown_parameter")
    purpose = fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("'purpose' is required.", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        code = "unsupported_value" if purpose in OTHER_PURPOSES else "invalid_value"
        raise InvalidRequest(f"'purpose' must be one of {', '.join(PURPOSES)}.", param="purpose", code=code)
    default = BATCH_EXPIRES_S if purpose == "batch" else None
    return UploadForm(purpose, _expires_after(fields) or default)  # type: ignore[arg-type]


def _expires_after(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("'expires_after[anchor]' must be created_at.", param="expires_after[anchor]")
    if seconds is None:
        raise InvalidRequest(
            "'expires_after[seconds]' is required.", param="expires_after[seconds]", code="missing_required_parameter"
        )
    return whole_number(seconds, "expires_after[seconds]", least=MIN_EXPIRES_S, most=MAX_EXPIRES_S)


def check_filename(filename: str | None) -> str:
    """The name a client gave its file. It is only ever shown, never used as a path.

    Raises:
        InvalidRequest: there is none, or it is longer than 255 characters or has control characters.
    """
    if not filename:
        raise InvalidRequest("'file' must be a file with a name.", param="file", code="missing_required_parameter")
    if len(filename) > MAX_FILENAME_CHARS:
        raise InvalidRequest(
            f"The file's name is longer than {MAX_FILENAME_CHARS} characters.",
            param="file",
            code="string_above_max_length",
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in filename):
        raise InvalidRequest("The file's name has control characters.", param="file")
    return filename


def whole_number(text: str, param: str, *, least: int, most: int) -> int:
    """A number in a query or a form.

    Raises:
        InvalidRequest: not digits alone, or out of range.
    """
    if not (text.isascii() and text.isdecimal()) or len(text) > 12:
        raise InvalidRequest(f"'{param}' must be a whole number.", param=param, code="invalid_type")
    value = int(text)
    if value < least:
        raise InvalidRequest(f"'{param}' must be >= {least}.", param=param, code="integer_below_min_value")
    if value > most:
        raise InvalidRequest(f"'{param}' must be <= {most}.", param=param, code="integer_above_max_value")
    return value


@dataclass(frozen=True, slots=True)
class ListQuery:
    """Which part of a listing is wanted."""

    after: str | None
    limit: int
    order: Literal["asc", "desc"]
    purpose: str | None


def parse_list_query(
    query: Iterable[tuple[str, str]], *, max_limit: int, default_limit: int, names: frozenset[str]
) -> ListQuery:
    """Check a query string; `names` are the parameters this listing has.

    Raises:
        InvalidRequest: an unknown or repeated parameter, or a value out of range.
    """
    given: dict[str, str] = {}
    for name, value in query:
        if name not in names:
            raise InvalidRequest("The query has a parameter that is not known.", code="unknown_parameter")
        if name in given:
            raise InvalidRequest(f"'{name}' is given twice.", param=name)
        given[name] = value
    after, order, purpose = given.get("after"), given.get("order", "desc"), given.get("purpose")
    if after is not None and not 1 <= len(after) <= 64:
        raise InvalidRequest("'after' is not an id.", param="after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("'order' must be asc or desc.", param="order")
    if purpose is not None and purpose not in (*PURPOSES, "batch_output"):
        raise InvalidRequest("'purpose' is not one of this server's purposes.", param="purpose")
    limit = default_limit
    if "limit" in given:
        limit = whole_number(given["limit"], "limit", least=1, most=max_limit)
    return ListQuery(after, limit, "asc" if order == "asc" else "desc", purpose)
