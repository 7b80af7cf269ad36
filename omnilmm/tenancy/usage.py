"""What was used: one receipt a request, and sums a day, in durable records.

A receipt and its share of the sums are written in one transaction, and a receipt that is written twice counts once, so
the sums of the receipts always equal the sums of the days. Old receipts can be dropped; the days stay.
"""

from __future__ import annotations

import csv
import io
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, TypeVar

import sqlalchemy as sql

from omnilmm.database import Database, tables
from omnilmm.errors import InvalidRequest
from omnilmm.messages import ImageSource, Usage

T = TypeVar("T")

ROOM: Final = "usage"
VERSION: Final = 1
MAX_DAYS: Final = 3660
_CHUNK: Final = 500
_MAX_WORD_CHARS: Final = 160

SUMS: Final = (
    "requests",
    "failed_requests",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "image_tokens",
    *(f"images_{source.value}" for source in ImageSource),
    "encode_us",
    "decode_us",
    "embedding_bytes",
)
"""What is summed. Times are whole microseconds, so that sums are exact in any order."""
_KEYS: Final = ("day", "tenant", "model", "adapter")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One request. `at` is its end in Unix seconds, `status` the HTTP status, 499 if the client left.

    `adapter` and `batch_id` are "" where there is none. `id` makes writing it twice harmless.
    """

    at: float
    tenant: str
    key_id: str
    model: str
    status: int
    request_id: str
    adapter: str = ""
    batch_id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    images_encoded: int = 0
    images_cache: int = 0
    images_flight: int = 0
    images_kv: int = 0
    encode_us: int = 0
    decode_us: int = 0
    embedding_bytes: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    @classmethod
    def of(cls, usage: Usage | None, **about: Any) -> Receipt:
        """From what an answer took (None for a request that failed before it took anything), and about whom."""
        if usage is None:
            return cls(**about)
        sources = Counter(image.source for image in usage.images)
        return cls(
            **about,
            images_encoded=sources[ImageSource.ENCODED],
            images_cache=sources[ImageSource.CACHE],
            images_flight=sources[ImageSource.FLIGHT],
            images_kv=sources[ImageSource.KV],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            image_tokens=usage.image_tokens,
            encode_us=round(usage.encode_s * 1e6),
            decode_us=round(usage.decode_s * 1e6),
            embedding_bytes=usage.embedding_bytes,
        )

    @property
    def day(self) -> str:
        """The day of its end, in UTC: 2026-11-23."""
        return datetime.fromtimestamp(self.at, UTC).date().isoformat()

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def amounts(self) -> dict[str, int]:
        """What it adds to each of SUMS."""
        counted = {"requests": 1, "failed_requests": int(self.status >= 400)}
        return {name: counted[name] if name in counted else getattr(self, name) for name in SUMS}


@dataclass(frozen=True, slots=True)
class DayUsage:
    """What one tenant used of one model on one day (UTC)."""

    day: str
    tenant: str
    model: str
    adapter: str
    sums: Mapping[str, int]

    def document(self) -> dict[str, Any]:
        return {"day": self.day, "tenant": self.tenant, "model": self.model, "adapter": self.adapter, **self.sums}


class Ledger:
    """The records of usage. All calls block; see `omnilmm.database`."""

    def __init__(self, database: Database) -> None:
        words = [
            sql.Column(name, sql.String(_MAX_WORD_CHARS), nullable=False)
            for name in ("request_id", "adapter", "batch_id")
        ]
        amounts = [name for name in SUMS if name not in ("requests", "failed_requests")]
        metadata = tables(
            (
                "usage_receipts",
                (
                    sql.Column("id", sql.String(32), primary_key=True),
                    sql.Column("at", sql.Float(53), nullable=False),
                    sql.Column("day", sql.String(10), nullable=False, index=True),
                    sql.Column("tenant", sql.String(_MAX_WORD_CHARS), nullable=False),
                    sql.Column("key_id", sql.String(_MAX_WORD_CHARS), nullable=False),
                    sql.Column("model", sql.String(_MAX_WORD_CHARS), nullable=False),
                    sql.Column("status", sql.Integer, nullable=False),
                    *words,
                    *(sql.Column(name, sql.BigInteger, nullable=False) for name in amounts),
                    sql.Index("usage_receipts_by_tenant", "tenant", "at"),
                ),
            ),
            (
                "usage_days",
                (
                    sql.Column("day", sql.String(10), primary_key=True),
                    sql.Column("tenant", sql.String(_MAX_WORD_CHARS), primary_key=True),
                    sql.Column("model", sql.String(_MAX_WORD_CHARS), primary_key=True),
                    sql.Column("adapter", sql.String(_MAX_WORD_CHARS), primary_key=True),
                    *(sql.Column(name, sql.BigInteger, nullable=False) for name in SUMS),
                ),
            ),
        )
        database.require(metadata, room=ROOM, version=VERSION)
        self._database = database
        self._receipts = metadata.tables["usage_receipts"]
        self._days = metadata.tables["usage_days"]

    def write(self, receipts: Sequence[Receipt]) -> None:
        """Write receipts and add them to their days, all or nothing. Those already written count no second time.

        Raises:
            Overloaded: the database cannot be reached; write the same receipts again.
        """
        with self._database.write() as connection:
            new = {receipt.id: _fitted(receipt) for receipt in receipts}
            for ids in _chunks([*new]):
                known = sql.select(self._receipts.c.id).where(self._receipts.c.id.in_(ids))
                for id in connection.scalars(known).all():
                    del new[id]
            for some in _chunks([*new.values()]):
                connection.execute(
                    sql.insert(self._receipts), [{**asdict(receipt), "day": receipt.day} for receipt in some]
                )
            # one order for all writers, so that two of them never wait for each other in a circle
            rows = [{**dict(zip(_KEYS, k, strict=True)), **sums} for k, sums in sorted(_add_up(new.values()).items())]
            self._database.add_to(connection, self._days, rows, key=_KEYS, sums=SUMS)

    def days(self, first: date, last: date, *, tenant: str | None = None) -> list[DayUsage]:
        """Both ends included; every tenant or one. Raises InvalidRequest for a span that is no span or too long."""
        if not timedelta(0) <= last - first < timedelta(days=MAX_DAYS):
            raise InvalidRequest(f"'end' must be on or after 'start', and within {MAX_DAYS} days.", param="end")
        asked = sql.select(self._days).where(self._days.c.day.between(first.isoformat(), last.isoformat()))
        if tenant is not None:
            asked = asked.where(self._days.c.tenant == tenant)
        with self._database.read() as connection:
            rows = connection.execute(asked.order_by(*_KEYS)).all()
        return [
            DayUsage(row.day, row.tenant, row.model, row.adapter, {name: getattr(row, name) for name in SUMS})
            for row in rows
        ]

    def receipts(
        self, first: date, last: date, *, tenant: str | None = None, after: str = "", limit: int = 1000
    ) -> list[Receipt]:
        """Receipts of these days in the order of their ids, from the one after `after`."""
        table = self._receipts
        asked = sql.select(table).where(table.c.day.between(first.isoformat(), last.isoformat()), table.c.id > after)
        if tenant is not None:
            asked = asked.where(table.c.tenant == tenant)
        with self._database.read() as connection:
            rows = connection.execute(asked.order_by(table.c.id).limit(limit)).mappings().all()
        return [_receipt(row) for row in rows]

    def forget_receipts(self, before: date) -> int:
        """Drop the receipts of days before `before`; their sums stay. Returns how many there were."""
        with self._database.write() as connection:
            gone = connection.execute(sql.delete(self._receipts).where(self._receipts.c.day < before.isoformat()))
            return gone.rowcount

    def check_integrity(self) -> None:
        """Assert that the receipts of every day add up to its sums. Days whose receipts were dropped are left out."""
        with self._database.read() as connection:
            rows = connection.execute(sql.select(self._receipts)).mappings().all()
            days = connection.execute(sql.select(self._days)).mappings().all()
        added = _add_up(map(_receipt, rows))
        oldest = min((row["day"] for row in rows), default="9999")
        told = {tuple(row[k] for k in _KEYS): {n: row[n] for n in SUMS} for row in days if row["day"] >= oldest}
        assert added == told, "usage: the receipts do not add up to the days"


def to_csv(days: Iterable[DayUsage]) -> str:
    """One line a day, tenant, model and adapter, under a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*_KEYS, *SUMS], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(day.document() for day in days)
    return text.getvalue()


def _add_up(receipts: Iterable[Receipt]) -> dict[tuple[str, str, str, str], dict[str, int]]:
    added: dict[tuple[str, str, str, str], dict[str, int]] = {}
    for receipt in receipts:
        sums = added.setdefault((receipt.day, receipt.tenant, receipt.model, receipt.adapter), dict.fromkeys(SUMS, 0))
        for name, amount in receipt.amounts().items():
            sums[name] += amount
    return added


def _fitted(receipt: Receipt) -> Receipt:
    """With words that every database takes: one receipt that cannot be written would hold up all others."""
    words = ("tenant", "key_id", "model", "adapter", "request_id", "batch_id")
    return replace(receipt, **{name: getattr(receipt, name).replace("\0", "")[:_MAX_WORD_CHARS] for name in words})


def _receipt(row: sql.RowMapping) -> Receipt:
    return Receipt(**{name: value for name, value in row.items() if name != "day"})


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[begin : begin + _CHUNK] for begin in range(0, len(items), _CHUNK))
