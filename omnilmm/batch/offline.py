"""A batch without a server: rows answered by whoever is given, into one output file, resumed where it stopped.

Beside the output stands a folder `OUTPUT.progress` with a journal of what is done (in the working folder, if the output
is a URL: a journal needs a disk). Running the same command again goes on from there; when all is done, the output is
written whole and the folder goes.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from omnilmm.batch.journal import Record, Segment, SegmentReader, read_segment, read_segments, segment_tokens
from omnilmm.batch.locations import Location, OnDisk
from omnilmm.batch.order import in_order
from omnilmm.batch.pace import Pace
from omnilmm.batch.results import answered, refused
from omnilmm.batch.sources import Row
from omnilmm.errors import ConfigError, OmniError

_log = logging.getLogger(__name__)

Ask = Callable[[str, Mapping[str, Any], str], Awaitable[Mapping[str, Any]]]
"""(endpoint, body, request id) to the response body; raises OmniError."""


@dataclass(frozen=True, slots=True)
class Done:
    """A row's line for the output, and the response body in it: None if the row was refused."""

    row: Row
    result: bytes
    body: Mapping[str, Any] | None


def progress_folder(output: Location) -> Path:
    """Where the journal of a run that ends in `output` lies."""
    name = output.name + ".progress"
    return output.path.with_name(name) if isinstance(output, OnDisk) else Path.cwd() / name


class Progress:
    """The journal of an unfinished run, for one process at a time.

    Args:
        folder: where it lies.
        fingerprint: names what is asked; a journal of something else is refused.

    Raises:
        ConfigError: another process works on it, or the journal there is of another run.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(fingerprint)
        except BaseException:
            os.close(self._lock)
            raise
        tokens = segment_tokens(self.folder)
        self.records = read_segments(self.folder, {token: read_segment(self.folder, token)[1] for token in tokens})
        self.segment = Segment(self.folder, max(tokens, default=0) + 1)

    def _take(self, fingerprint: str) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another process is working on this output") from None
        found = os.pread(self._lock, 200, 0).decode("ascii", "replace")
        if found and found != fingerprint:
            raise ConfigError(
                f"{self.folder} holds the progress of a run with another input or other options: "
                "finish that one, or remove the folder"
            )
        os.pwrite(self._lock, fingerprint.encode("ascii"), 0)

    def add(self, row: Row, result: bytes, *, is_success: bool) -> None:
        """Write a result down; of several for one row, the first counts. Raises StorageFull."""
        if row.number not in self.records:
            self.records[row.number] = self.segment.append(row.number, result, is_success=is_success)

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those without a result, in the order in which they should run."""
        return in_order([row for row in rows if row.number not in self.records])

    def close(self) -> None:
        """Leave it for another time."""
        self.segment.close()
        os.close(self._lock)

    def remove(self) -> None:
        """All is done."""
        self.close()
        shutil.rmtree(self.folder)


async def answer_row(row: Row, ask: Ask, pace: Pace) -> Done:
    """Ask about one row, again where that makes sense. A fault of ours costs this row and no other."""
    request_id = secrets.token_hex(16)

    async def attempt() -> Mapping[str, Any]:
        try:
            return await ask(row.endpoint, row.body(), request_id)
        except OmniError:
            raise
        except Exception as error:
            _log.exception("a row failed")
            raise OmniError("unforeseen") from error

    try:
        body = await pace.run(attempt)
    except OmniError as error:
        return Done(row, refused(row.custom_id, request_id, error), None)
    return Done(row, answered(row.custom_id, request_id, body), body)


async def answer_rows(
    rows: Sequence[Row], ask: Ask, progress: Progress, *, max_running: int, tell: Callable[[Done], None]
) -> None:
    """Answer the rows that are not answered yet, so many at a time, pictures together.

    Raises:
        StorageFull: the disk is full; what was answered is kept.
    """
    waiting = iter(progress.missing(rows))
    pace = Pace(max_running=max_running)

    async def work() -> None:
        for row in waiting:
            done = await answer_row(row, ask, pace)
            progress.add(row, done.result, is_success=done.body is not None)
            tell(done)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_running):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


# -- output -------------------------------------------------------------------------------------------


def write_output(output: Location, rows: Sequence[Row], progress: Progress, *, is_table: bool) -> None:
    """All results in the order of the input, as lines in OpenAI's shape or as a table; whole or not at all."""
    with output.replacing(progress.folder) as part, SegmentReader(progress.folder) as reader:
        results = (reader.read(progress.records[row.number]) for row in rows)
        if not is_table:
            with part.open("wb") as file:
                file.writelines(result + b"\n" for result in results)
            return
        table = (_columns(row, json.loads(result)) for row, result in zip(rows, results, strict=True))
        if output.suffix == ".parquet":
            _write_parquet(part, table)
        else:
            with part.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(columns, ensure_ascii=False, default=str) + "\n" for columns in table)


def _columns(row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own columns and what came of it."""
    response = result["response"]["body"]
    error = response.get("error")
    choice = None if error is not None else response["choices"][0]
    usage = response.get("usage") or {}
    return {
        **row.columns,
        "custom_id": row.custom_id,
        "answer": None if choice is None else choice["message"]["content"],
        "finish_reason": None if choice is None else choice["finish_reason"],
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": None if error is None else error["message"],
        "error_code": None if error is None else error["code"],
    }


def _write_parquet(path: Path, table: Iterator[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    first = list(islice(table, 1000))
    schema = pyarrow.Table.from_pylist(first).schema
    texts = ("answer", "finish_reason", "error", "error_code")
    for name in texts:  # a column that begins with nothing but nulls has no type of its own
        schema = schema.set(schema.get_field_index(name), pyarrow.field(name, pyarrow.string()))
    for name in ("prompt_tokens", "completion_tokens"):
        schema = schema.set(schema.get_field_index(name), pyarrow.field(name, pyarrow.int64()))
    with parquet.ParquetWriter(path, schema) as writer:
        while first:
            writer.write_table(pyarrow.Table.from_pylist(first, schema=schema))
            first = list(islice(table, 1000))


def count_results(records: Mapping[int, Record]) -> tuple[int, int]:
    """(answered, failed)."""
    num_answered = sum(record.is_success for record in records.values())
    return num_answered, len(records) - num_answered
