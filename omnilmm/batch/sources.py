"""What `omnilmm batch run` reads: lines in OpenAI's shape, a table, or a folder of pictures, all as rows to be asked.

A table is CSV, Parquet, or JSONL whose lines are not OpenAI's. Each of its rows is asked with a prompt made from a
template, in which {column} stands for the row's value, and with the picture its image column names: a path (relative to
the table's folder), a data: or http(s) URL, or the bytes of a file, in Parquet also as Hugging Face's {bytes, path}.
Pictures are read when a row's turn comes, not before.

Inputs lie on disk or in a store (`locations`). A row may name its picture by a URL of the store the table itself comes
from, or of one the operator allowed: a table is data, and data does not choose what is read on whose behalf.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from omnilmm.api.strict_json import parse_json
from omnilmm.batch.lines import Line, LineRules, body_of, scan
from omnilmm.batch.locations import SCHEME, InStore, Location, OnDisk
from omnilmm.batch.order import Place
from omnilmm.batch.states import LineError
from omnilmm.errors import ConfigError, InvalidRequest, OmniError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
CHAT = "/v1/chat/completions"
MAX_ROWS = 10_000_000
REFUSED = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to ask. `body` reads what it needs and may raise InvalidRequest; `columns` go to the output as they
    are. Rows may travel to other processes."""

    number: int
    custom_id: str
    endpoint: str
    place: Place
    body: Callable[[], Mapping[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asking:
    """How the rows of tables and folders are turned into requests. `fields` are further members of every body,
    `stores` the schemes of URLs that pictures may be read from besides the input's own."""

    model: str
    prompt: str | None = None
    system: str | None = None
    image_column: str = "image"
    id_column: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    stores: frozenset[str] = frozenset()


def read_rows(source: Location, asking: Asking) -> list[Row]:
    """All rows of the input.

    Raises:
        ConfigError: there is no such input, it is of no kind we read, or what is wrong with which line of it.
    """
    if source.is_folder():
        rows = list(_folder_rows(source, asking))
    elif not source.is_file():
        raise ConfigError(f"{source}: no such file or folder")
    elif is_openai(source):
        return list(_openai_rows(source))
    else:
        rows = list(_table_rows(source, asking))
    if not rows:
        raise ConfigError(f"{source}: there is nothing to ask about")
    _check_ids(rows)
    return rows


def is_openai(source: Location) -> bool:
    """Whether the first line of a file is one of OpenAI's batches."""
    if source.is_folder() or source.suffix not in (".jsonl", ".ndjson", ".json"):
        return False
    with source.open() as file:
        first = next((raw for raw in file if raw.strip()), b"")
    try:
        document = parse_json(first.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))
    except OmniError:
        return False
    return {"custom_id", "body"} <= document.keys()


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with {column} replaced by the row's value; {{ and }} are braces.

    Raises:
        InvalidRequest: the row has no such column.
    """

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in row:
            raise InvalidRequest("The prompt names a column that the row does not have.", param="prompt")
        return str(row[match[1]])

    return PLACEHOLDER.sub(value, template)


# -- lines in OpenAI's shape --------------------------------------------------------------------------


def _openai_rows(source: Location) -> Iterator[Row]:
    with source.open() as file:
        first = parse_json(next(raw for raw in file if raw.strip()).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))
        endpoint = str(first.get("url"))
        file.seek(0)
        for line in scan(file, LineRules(endpoint, max_lines=MAX_ROWS)):
            if isinstance(line, LineError):
                raise ConfigError(f"{source}, line {line.line}: {line.message} ({line.code})")
            yield Row(line.number, line.custom_id, endpoint, line.place, _LineBody(source, line))


@dataclass(frozen=True, slots=True)
class _LineBody:
    """The body of a line, read again when its turn comes."""

    source: Location
    line: Line

    def __call__(self) -> Mapping[str, Any]:
        return body_of(self.source.read_part(self.line.offset, self.line.length))


# -- tables and folders -------------------------------------------------------------------------------


def _folder_rows(folder: Location, asking: Asking) -> Iterator[Row]:
    names = [name for name in folder.files() if name[name.rfind(".") :].lower() in PICTURES]
    for number, name in enumerate(names, start=1):
        yield _row(number, name, {"image": name}, image=name, folder=folder, asking=asking)


def _table_rows(source: Location, asking: Asking) -> Iterator[Row]:
    kinds: Mapping[str, Callable[[Location], Iterator[Mapping[str, Any]]]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".parquet": _parquet,
    }
    read = kinds.get(source.suffix)
    if read is None:
        raise ConfigError(f"{source}: inputs are .jsonl, .csv and .parquet files, and folders of pictures")
    for number, row in enumerate(islice(read(source), MAX_ROWS), start=1):
        if asking.id_column is not None and asking.id_column not in row:
            raise ConfigError(f"{source}, row {number}: no column {asking.id_column!r}")
        custom_id = str(number) if asking.id_column is None else str(row[asking.id_column])
        image = row.get(asking.image_column)
        yield _row(number, custom_id, row, image=image, folder=source.parent, asking=asking)


def _csv(source: Location) -> Iterator[Mapping[str, Any]]:
    with source.open() as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield from csv.DictReader(text, strict=True)


def _jsonl(source: Location) -> Iterator[Mapping[str, Any]]:
    with source.open() as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield parse_json(raw.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))
            except OmniError:
                raise ConfigError(f"{source}, line {number}: not a JSON object in UTF-8") from None


def _parquet(source: Location) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'omnilmm-serve[batch]'") from None
    with parquet.ParquetFile(source.path if isinstance(source, OnDisk) else source.open()) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _row(
    number: int, custom_id: str, columns: Mapping[str, Any], *, image: object, folder: Location, asking: Asking
) -> Row:
    """A row of a table. The picture itself is not among the columns that go to the output, its name is."""
    if asking.prompt is None:
        raise ConfigError("tables and folders of pictures need a prompt")
    if isinstance(image, Mapping):  # Hugging Face's datasets
        image = image.get("bytes") or image.get("path")
    kept = {name: value for name, value in columns.items() if not _holds_bytes(value)}
    picture = _digest(image)
    place = Place(picture, picture, b"", _opening(asking.prompt, columns))
    return Row(number, custom_id, CHAT, place, _TableBody(asking, columns, image, folder), kept)


@dataclass(frozen=True, slots=True)
class _TableBody:
    """The body made from a row; its picture is read when its turn comes."""

    asking: Asking
    columns: Mapping[str, Any]
    image: object
    folder: Location

    def __call__(self) -> Mapping[str, Any]:
        asking = self.asking
        assert asking.prompt is not None
        parts: list[dict[str, Any]] = []
        if self.image is not None and self.image != "":
            stores = asking.stores | {self.folder.scheme}
            parts.append({"type": "image_url", "image_url": {"url": _url(self.image, self.folder, stores)}})
        parts.append({"type": "text", "text": fill(asking.prompt, self.columns)})
        system = [{"role": "system", "content": asking.system}] if asking.system is not None else []
        messages = [*system, {"role": "user", "content": parts}]
        return {"model": asking.model, "messages": messages, **asking.fields}


def _opening(prompt: str, columns: Mapping[str, Any]) -> str:
    try:
        return fill(prompt, columns)[:128]
    except InvalidRequest:
        return ""


def _holds_bytes(value: object) -> bool:
    return isinstance(value, bytes) or (isinstance(value, Mapping) and any(map(_holds_bytes, value.values())))


def _digest(image: object) -> bytes:
    if image is None or image == "":
        return b""
    written = image if isinstance(image, bytes) else str(image).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(written, digest_size=16).digest()


def _url(image: object, folder: Location, stores: frozenset[str]) -> str:
    """A picture as a URL that a request may hold. Raises InvalidRequest where there is none to read."""
    if isinstance(image, str) and image.partition(":")[0].lower() in ("data", "http", "https"):
        return image
    if isinstance(image, str):
        found = _find(image, folder, stores)
        try:
            image = found.read()
        except (OSError, ValueError) as error:
            if isinstance(found, InStore) and not isinstance(error, (*REFUSED, ValueError)):
                raise  # the store is away for a moment: a row is not refused for that
            raise InvalidRequest("The picture's file cannot be read.", code="invalid_image_url") from None
    if not isinstance(image, bytes):
        raise InvalidRequest("The image column holds neither a path, a URL nor bytes.", code="invalid_image_url")
    # the type is told by the bytes, not by what we claim
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _find(image: str, folder: Location, stores: frozenset[str]) -> Location:
    """Where a row's picture lies. Chained URLs (a::b) could name any store behind an allowed one."""
    scheme = SCHEME.match(image)
    if scheme is None:
        return folder.join(image)
    if scheme[1] not in stores or "::" in image:
        raise InvalidRequest("The picture lies in a store that was not allowed.", code="invalid_image_url")
    return InStore(image)


def _check_ids(rows: list[Row]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        if row.custom_id in seen:
            raise ConfigError(f"rows {seen[row.custom_id]} and {row.number} have the same id")
        seen[row.custom_id] = row.number


def fingerprint(source: Location, rows: list[Row], wanted: Mapping[str, Any]) -> str:
    """Names the job: the same input, asked in the same way."""
    told = [*source.version(), len(rows), [row.custom_id for row in rows[:1] + rows[-1:]], dict(wanted)]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
