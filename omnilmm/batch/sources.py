"""What `omnilmm batch run` reads: lines in OpenAI's shape, a table, or a folder of pictures, all as rows to be asked.

A table is CSV, Parquet, or JSONL whose lines are not OpenAI's. Each of its rows is asked with a prompt made from a
template, in which {column} stands for the row's value, and with the picture its image column names: a path (relative to
the table's folder), a data: or http(s) URL, or the bytes of a file, in Parquet also as Hugging Face's {bytes, path}.
Pictures are read when a row's turn comes, not before.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from omnilmm.api.strict_json import parse_json
from omnilmm.batch.lines import Line, LineRules, read_body, scan
from omnilmm.batch.order import Place
from omnilmm.batch.states import LineError
from omnilmm.errors import ConfigError, InvalidRequest, OmniError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
CHAT = "/v1/chat/completions"
MAX_ROWS = 10_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to ask. `body` reads what it needs and may raise InvalidRequest; `columns` go to the output as they
    are."""

    number: int
    custom_id: str
    endpoint: str
    place: Place
    body: Callable[[], Mapping[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asking:
    """How the rows of tables and folders are turned into requests. `fields` are further members of every body."""

    model: str
    prompt: str | None = None
    system: str | None = None
    image_column: str = "image"
    id_column: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_rows(path: Path, asking: Asking) -> list[Row]:
    """All rows of the input.

    Raises:
        ConfigError: there is no such input, it is of no kind we read, or what is wrong with which line of it.
    """
    if path.is_dir():
        rows = list(_folder_rows(path, asking))
    elif not path.is_file():
        raise ConfigError(f"{path}: no such file or folder")
    elif is_openai(path):
        return list(_openai_rows(path))
    else:
        rows = list(_table_rows(path, asking))
    if not rows:
        raise ConfigError(f"{path}: there is nothing to ask about")
    _check_ids(rows)
    return rows


def is_openai(path: Path) -> bool:
    """Whether the first line of a file is one of OpenAI's batches."""
    if path.is_dir() or path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return False
    with path.open("rb") as file:
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


def _openai_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        first = parse_json(next(raw for raw in file if raw.strip()).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))
        endpoint = str(first.get("url"))
        file.seek(0)
        for line in scan(file, LineRules(endpoint, max_lines=MAX_ROWS)):
            if isinstance(line, LineError):
                raise ConfigError(f"{path}, line {line.line}: {line.message} ({line.code})")
            yield Row(line.number, line.custom_id, endpoint, line.place, _body_of(path, line))


def _body_of(path: Path, line: Line) -> Callable[[], Mapping[str, Any]]:
    def body() -> Mapping[str, Any]:
        with path.open("rb") as file:
            return read_body(file, line)

    return body


# -- tables and folders -------------------------------------------------------------------------------


def _folder_rows(folder: Path, asking: Asking) -> Iterator[Row]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    for number, path in enumerate(paths, start=1):
        name = path.relative_to(folder).as_posix()
        yield _row(number, name, {"image": name}, image=name, folder=folder, asking=asking)


def _table_rows(path: Path, asking: Asking) -> Iterator[Row]:
    kinds: Mapping[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".parquet": _parquet,
    }
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"{path}: inputs are .jsonl, .csv and .parquet files, and folders of pictures")
    for number, row in enumerate(islice(read(path), MAX_ROWS), start=1):
        if asking.id_column is not None and asking.id_column not in row:
            raise ConfigError(f"{path}, row {number}: no column {asking.id_column!r}")
        custom_id = str(number) if asking.id_column is None else str(row[asking.id_column])
        image = row.get(asking.image_column)
        yield _row(number, custom_id, row, image=image, folder=path.parent, asking=asking)


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield parse_json(raw.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))
            except OmniError:
                raise ConfigError(f"{path}, line {number}: not a JSON object in UTF-8") from None


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'omnilmm-serve[batch]'") from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _row(
    number: int, custom_id: str, columns: Mapping[str, Any], *, image: object, folder: Path, asking: Asking
) -> Row:
    """A row of a table. The picture itself is not among the columns that go to the output, its name is."""
    if asking.prompt is None:
        raise ConfigError("tables and folders of pictures need a prompt")
    prompt = asking.prompt
    if isinstance(image, Mapping):  # Hugging Face's datasets
        image = image.get("bytes") or image.get("path")
    kept = {name: value for name, value in columns.items() if not _holds_bytes(value)}

    def body() -> Mapping[str, Any]:
        parts: list[dict[str, Any]] = []
        if image is not None and image != "":
            parts.append({"type": "image_url", "image_url": {"url": _url(image, folder)}})
        parts.append({"type": "text", "text": fill(prompt, columns)})
        system = [{"role": "system", "content": asking.system}] if asking.system is not None else []
        messages = [*system, {"role": "user", "content": parts}]
        return {"model": asking.model, "messages": messages, **asking.fields}

    picture = _digest(image)
    return Row(number, custom_id, CHAT, Place(picture, picture, b"", _opening(prompt, columns)), body, kept)


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


def _url(image: object, folder: Path) -> str:
    """A picture as a URL. Raises InvalidRequest where there is none to read."""
    if isinstance(image, str) and image.partition(":")[0].lower() in ("data", "http", "https"):
        return image
    if isinstance(image, str):
        try:
            image = (folder / image).read_bytes()
        except (OSError, ValueError):
            raise InvalidRequest("The picture's file cannot be read.", code="invalid_image_url") from None
    if not isinstance(image, bytes):
        raise InvalidRequest("The image column holds neither a path, a URL nor bytes.", code="invalid_image_url")
    # the type is told by the bytes, not by what we claim
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _check_ids(rows: list[Row]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        if row.custom_id in seen:
            raise ConfigError(f"rows {seen[row.custom_id]} and {row.number} have the same id")
        seen[row.custom_id] = row.number


def fingerprint(path: Path, rows: list[Row], wanted: Mapping[str, Any]) -> str:
    """Names the job: the same input, asked in the same way."""
    stat = path.stat()
    told = [str(path.resolve()), len(rows), [row.custom_id for row in rows[:1] + rows[-1:]], dict(wanted)]
    if path.is_file():
        told += [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
