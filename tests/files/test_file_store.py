"""Files on disk and their records: who sees what, what a crash leaves, what a full disk does."""

import os
import stat

import pytest

from omnilmm.database import Database
from omnilmm.errors import Forbidden, NotFound, PayloadTooLarge
from omnilmm.files.blobs import StorageFull
from omnilmm.files.store import FileStore, Purpose


class Clock:
    now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def files(tmp_path, clock):
    store = FileStore(
        Database(f"sqlite:///{tmp_path}/records.db"), tmp_path / "files", max_tenant_bytes=100, clock=clock
    )
    yield store
    store.check_integrity()


def put(files, content=b"hello", tenant="acme", purpose=Purpose.USER_DATA, expires_after=None):
    with files.upload(tenant, max_bytes=1000) as upload:
        upload.write(content)
        return upload.finish(purpose=purpose, filename="a.bin", expires_after=expires_after)


async def test_what_was_put_can_be_read(files):
    stored = put(files, b"")
    assert await files.read("acme", stored.id) == b""
    stored = put(files)
    assert files.get("acme", stored.id) == stored
    assert await files.read("acme", stored.id) == b"hello"
    assert (stored.num_bytes, stored.digest[:8]) == (5, "2cf24dba")


def test_ids_are_random_and_long(files):
    ids = {put(files, b"").id for _ in range(50)}
    assert len({file_id[:13] for file_id in ids}) == 50
    assert all(file_id.startswith("file-") and len(bytes.fromhex(file_id[5:])) == 16 for file_id in ids)


def test_nobody_else_can_read_the_disk(files, tmp_path):
    put(files, tenant="..")
    put(files, tenant="a/b")
    for path in (tmp_path / "files").rglob("*"):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted
    assert sorted(path.name for path in tmp_path.iterdir() if "records" not in path.name) == ["files"]


async def test_another_tenants_file_is_not_there(files):
    theirs = put(files, tenant="other").id
    told = set()
    for file_id in (theirs, "file-" + "0" * 32, "", "../x", "x\0"):
        for call in (files.get, files.open, files.delete):
            with pytest.raises(NotFound) as caught:
                call("acme", file_id)
            told.add(str(caught.value.body()))
        with pytest.raises(NotFound):
            await files.read("acme", file_id)
    assert len(told) == 1
    assert files.get("other", theirs)


def test_listing(files):
    ids = [put(files, b"", purpose=Purpose.VISION if i % 2 else Purpose.BATCH).id for i in range(6)]
    put(files, b"", tenant="other")

    def listed(**query):
        page = files.list("acme", **query)
        return [ids.index(stored.id) for stored in page.items], page.has_more

    assert listed() == ([5, 4, 3, 2, 1, 0], False)
    assert listed(limit=2) == ([5, 4], True)
    assert listed(limit=2, after=ids[4]) == ([3, 2], True)
    assert listed(limit=2, after=ids[1], order="asc") == ([2, 3], True)
    assert listed(purpose=Purpose.VISION) == ([5, 3, 1], False)
    assert listed(limit=6) == ([5, 4, 3, 2, 1, 0], False)
    with pytest.raises(NotFound):
        files.list("acme", after="file-nothing")


def test_files_expire(files, clock):
    short, long = put(files, expires_after=3600), put(files)
    clock.now += 3599
    assert files.get("acme", short.id)
    clock.now += 1
    with pytest.raises(NotFound):
        files.open("acme", short.id)
    assert [stored.id for stored in files.list("acme").items] == [long.id]
    assert files.expired() == [short]
    files.remove_expired(short)
    assert files.expired() == []
    assert [blob.name for blob in files.blobs.blobs()] == [long.id]


def test_a_deleted_file_can_be_read_to_its_end(files):
    stored = put(files)
    with files.open("acme", stored.id) as file:
        files.delete("acme", stored.id)
        assert file.read() == b"hello"
    with pytest.raises(NotFound):
        files.delete("acme", stored.id)
    assert [*files.blobs.blobs()] == []


def test_too_much(files):
    with files.upload("acme", max_bytes=10) as upload:
        upload.write(b"x" * 6)
        with pytest.raises(PayloadTooLarge):
            upload.write(b"x" * 5)
    put(files, b"x" * 60)
    with pytest.raises(Forbidden) as caught:
        put(files, b"x" * 60)
    assert caught.value.code == "storage_quota_exceeded"
    put(files, b"x" * 60, tenant="other")
    put(files, b"x" * 60, purpose=Purpose.BATCH_OUTPUT)  # what a batch has done is never thrown away
    assert [*files.blobs.incoming()] == []
    assert len([*files.blobs.blobs()]) == 3


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(files, monkeypatch, call):
    def full(*args, **options):
        raise OSError(28, "full")

    with monkeypatch.context() as patch, pytest.raises(StorageFull):  # noqa: PT012
        patch.setattr(f"omnilmm.files.blobs.os.{call}", full)
        put(files)
    assert files.list("acme").items == ()
    assert [*files.blobs.incoming(), *files.blobs.blobs()] == []
    put(files)


def test_short_writes_are_completed(files, monkeypatch):
    real = os.write
    monkeypatch.setattr("omnilmm.files.blobs.os.write", lambda descriptor, data: real(descriptor, data[:2]))
    stored = put(files, b"hello there")
    monkeypatch.undo()
    with files.open("acme", stored.id) as file:
        assert file.read() == b"hello there"


def test_what_a_crash_leaves_is_swept_when_it_is_old(files):
    kept = put(files)
    lost = files.upload("acme", max_bytes=10)
    lost.write(b"x")
    with files.upload("acme", max_bytes=10) as upload:
        placed = upload.place(purpose=Purpose.USER_DATA, filename="a")
    assert files.sweep() == 0  # they may still be in the making
    for path in [*files.blobs.incoming(), *files.blobs.blobs()]:
        os.utime(path, (0, 0))
    assert files.sweep() == 2
    assert [blob.name for blob in files.blobs.blobs()] == [kept.id] != [placed.id]
    lost.abandon()


def test_a_tenant_that_goes(files):
    put(files)
    put(files)
    other = put(files, tenant="other")
    assert files.delete_tenant("acme") == 2
    assert [blob.name for blob in files.blobs.blobs()] == [other.id]


def test_a_lost_blob_is_noticed(files):
    stored = put(files)
    files.discard(stored)
    with pytest.raises(AssertionError):
        files.check_integrity()
    files.delete("acme", stored.id)
