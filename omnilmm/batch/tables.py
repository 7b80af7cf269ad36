"""Batches as rows: the tables, and a record in their columns and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sql
from sqlalchemy.schema import SchemaItem

from omnilmm.batch.states import TIMES, Batch, BatchUsage, Counts, LineError, Status


def batches_table() -> tuple[str, Sequence[SchemaItem]]:
    """The table of batches. `serial` is the order of creation."""
    times = [sql.Column(name, sql.BigInteger, nullable=True) for name in TIMES.values()]
    return "batches", (
        sql.Column("serial", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("id", sql.String(64), nullable=False, unique=True),
        sql.Column("tenant", sql.String(64), nullable=False),
        sql.Column("endpoint", sql.String(64), nullable=False),
        sql.Column("model", sql.String(256), nullable=True),
        sql.Column("input_file_id", sql.String(64), nullable=False),
        sql.Column("completion_window", sql.String(16), nullable=False),
        sql.Column("status", sql.String(16), nullable=False, index=True),
        sql.Column("created_at", sql.BigInteger, nullable=False),
        sql.Column("expires_at", sql.BigInteger, nullable=False),
        *times,
        sql.Column("output_file_id", sql.String(64), nullable=True),
        sql.Column("error_file_id", sql.String(64), nullable=True),
        sql.Column("output_expires_after", sql.BigInteger, nullable=True),
        *(sql.Column(field.name, sql.Integer, nullable=False) for field in fields(Counts)),
        sql.Column("usage", sql.Text, nullable=False),
        sql.Column("errors", sql.Text, nullable=False),
        sql.Column("metadata", sql.Text, nullable=False),
        sql.Column("token", sql.Integer, nullable=False),
        sql.Column("lease_until", sql.Float, nullable=False),
        sql.Index("batches_of_tenant", "tenant", "serial"),
    )


def segments_table() -> tuple[str, Sequence[SchemaItem]]:
    """How much of each journal segment counts."""
    return "batch_segments", (
        sql.Column("batch_id", sql.String(64), primary_key=True),
        sql.Column("token", sql.Integer, primary_key=True, autoincrement=False),
        sql.Column("num_bytes", sql.BigInteger, nullable=False),
    )


def as_columns(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the record as their columns hold them: usage, errors and metadata as JSON."""
    told = dict(changes)
    if "usage" in told:
        told["usage"] = json.dumps(asdict(told["usage"]))
    if "errors" in told:
        told["errors"] = json.dumps([asdict(error) for error in told["errors"]])
    if "metadata" in told:
        told["metadata"] = json.dumps(told["metadata"])
    return told


def as_row(batch: Batch) -> dict[str, Any]:
    """The record in columns; who works on it (`token`, `lease_until`) is no part of it."""
    told = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return as_columns(told | asdict(told.pop("counts")) | {"status": batch.status.value})


def as_batch(row: sql.Row) -> Batch:
    """The record in a row of all columns."""
    told = dict(row._mapping)
    for name in ("serial", "token", "lease_until"):
        told.pop(name)
    counts = Counts(*(told.pop(field.name) for field in fields(Counts)))
    return Batch(
        **told
        | {
            "status": Status(told["status"]),
            "counts": counts,
            "usage": BatchUsage(**json.loads(told["usage"])),
            "errors": tuple(LineError(**error) for error in json.loads(told["errors"])),
            "metadata": tuple((name, value) for name, value in json.loads(told["metadata"])),
        }
    )
