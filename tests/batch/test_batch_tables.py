"""A batch's record goes into its row and comes back the same, whatever of it is set."""

from dataclasses import fields

import pytest
import sqlalchemy as sql

from omnilmm.batch.states import TIMES, Batch, BatchUsage, Counts, LineError, Status
from omnilmm.batch.tables import as_batch, as_columns, as_row, batches_table, segments_table
from omnilmm.database import Database, tables

BARE = Batch("batch_1", "acme", "/v1/chat/completions", "file-1", "24h", Status.VALIDATING, 100, 200)
FULL = Batch(
    *("batch_2", "acme", "/v1/responses", "file-2", "24h", Status.COMPLETED, 100, 200, "m"),
    **{name: 101 + i for i, name in enumerate(TIMES.values())},
    output_file_id="file-3",
    error_file_id="file-4",
    output_expires_after=3600,
    counts=Counts(5, 3, 2),
    usage=BatchUsage(1, 2, 3, 4, 5),
    errors=(LineError("bad_line", "It is “bad”.", 7, "body"), LineError("empty", "Nothing.")),
    metadata=(("b", "2"), ("a", "猫")),
)


@pytest.fixture
def table(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/records.db")
    metadata = tables(batches_table(), segments_table())
    database.require(metadata, room="batch", version=1)
    yield database, metadata.tables["batches"]
    database.close()


@pytest.mark.parametrize("batch", [BARE, FULL], ids=["bare", "full"])
def test_a_record_comes_back_as_it_went(table, batch):
    database, batches = table
    with database.write() as connection:
        connection.execute(batches.insert().values(**as_row(batch), token=3, lease_until=1.5))
        row = connection.execute(sql.select(batches)).one()
    assert as_batch(row) == batch


def test_every_field_has_a_column_of_its_own(table):
    _, batches = table
    assert {*as_row(FULL)} | {"serial", "token", "lease_until"} == {column.name for column in batches.columns}
    assert {field.name for field in fields(Batch)} - {"counts"} <= {*as_row(FULL)}


def test_changes_of_some_fields_are_their_columns_alone():
    row = as_row(FULL)
    changes = {"usage": FULL.usage, "errors": FULL.errors, "metadata": FULL.metadata, "model": "m"}
    assert as_columns(changes) == {name: row[name] for name in changes}
    assert as_columns({}) == {}
