"""The results of a batch as they come in: append-only, one record a line, whole or not there at all.

    CRC32 of the rest, 8 hex digits | kind, "+" or "-" | number of the input line | the line for the output file

in one `write` each. Everyone who works on a batch writes a segment of his own, named by his fencing token. A new worker
first seals the segments of those before him at the length he found: what a worker who was thought dead writes after
that is in no length and never read. A torn tail, left by a process that died in the middle of a write, ends a segment
at its last whole record.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from omnilmm.files.blobs import storage_errors, sync_folder

SUCCESS, FAILURE = b"+", b"-"


@dataclass(frozen=True, slots=True)
class Record:
    """Where the result of an input line lies: `length` bytes from `offset` in the segment of `token`."""

    number: int
    is_success: bool
    token: int
    offset: int
    length: int


class Segment:
    """The segment this process writes."""

    def __init__(self, folder: Path, token: int) -> None:
        self.token = token
        self.num_bytes = 0
        with storage_errors():
            self._descriptor = os.open(
                segment_path(folder, token), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            sync_folder(folder)

    def append(self, number: int, line: bytes, *, is_success: bool) -> Record:
        """Write one result. `line` is JSON without an end of line.

        Raises:
            StorageFull: the disk is full; nothing of the record is left.
        """
        assert b"\n" not in line
        head = b"%b %d " % (SUCCESS if is_success else FAILURE, number)
        record = b"%08x %b%b\n" % (zlib.crc32(head + line), head, line)
        begin = self.num_bytes
        try:
            with storage_errors():
                rest = memoryview(record)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        except BaseException:
            os.ftruncate(self._descriptor, begin)
            raise
        self.num_bytes += len(record)
        return Record(number, is_success, self.token, begin + 9 + len(head), len(line))

    def sync(self) -> None:
        """Make what was appended survive a power cut. Raises StorageFull."""
        with storage_errors():
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def segment_path(folder: Path, token: int) -> Path:
    return folder / f"journal.{token:06d}"


def segment_tokens(folder: Path) -> list[int]:
    """The segments there are, oldest first."""
    return sorted(int(path.suffix[1:]) for path in folder.glob("journal.*"))


def read_segment(folder: Path, token: int, *, max_bytes: int | None = None) -> tuple[list[Record], int]:
    """The whole records of a segment within its first `max_bytes`, and the length they take."""
    records: list[Record] = []
    end = 0
    with segment_path(folder, token).open("rb") as file:
        for line in file:
            if (max_bytes is not None and end + len(line) > max_bytes) or (record := _parse(line, token, end)) is None:
                break
            records.append(record)
            end += len(line)
    return records, end


def read_segments(folder: Path, sealed: Mapping[int, int]) -> dict[int, Record]:
    """By input line, the records within the sealed lengths. The first record of a line is the one that counts."""
    found: dict[int, Record] = {}
    for token in sorted(sealed):
        if sealed[token]:
            for record in read_segment(folder, token, max_bytes=sealed[token])[0]:
                found.setdefault(record.number, record)
    return found


class SegmentReader:
    """Reads results back by their records. Keeps the segments open; close it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[int, int] = {}

    def read(self, record: Record) -> bytes:
        """The line that was appended."""
        if record.token not in self._descriptors:
            path = segment_path(self._folder, record.token)
            self._descriptors[record.token] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._descriptors[record.token], record.length, record.offset)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes, token: int, offset: int) -> Record | None:
    """The record of a journal line; None if it is torn or not ours."""
    content = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(content) or not line.endswith(b"\n"):
        return None
    kind, number, result = content.split(b" ", 2)
    return Record(int(number), kind == SUCCESS, token, offset + len(line) - 1 - len(result), len(result))
