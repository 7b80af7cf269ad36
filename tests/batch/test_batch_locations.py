"""Inputs, pictures and outputs in stores: the same rows and the same files as on disk, and nothing half written."""

import asyncio
import base64
import json

import pytest

pytest.importorskip("fsspec")
import fsspec

from omnilmm.batch.locations import InStore, OnDisk, locate
from omnilmm.batch.offline import Progress, answer_rows, progress_folder, write_output
from omnilmm.batch.sources import Asking, fingerprint, is_openai, read_rows
from omnilmm.errors import ConfigError, InvalidRequest

PICTURE = b"\x89PNG not really"
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


@pytest.fixture(params=["disk", "file", "memory"])
def root(request, tmp_path):
    """The same folder of pictures as a path, and in two stores."""
    root = {"disk": tmp_path, "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]
    place = locate(root)
    for name in ("pictures/b.png", "pictures/deep/a.JPG", "pictures/notes.txt"):
        put(place.join(name), PICTURE)
    return place


def put(place, content):
    if isinstance(place, OnDisk):
        place.path.parent.mkdir(parents=True, exist_ok=True)
        place.path.write_bytes(content)
    else:
        with fsspec.open(place.url, "wb", auto_mkdir=True) as file:
            file.write(content)


def asked(row):
    parts = row.body()["messages"][-1]["content"]
    return next((part["image_url"]["url"] for part in parts if part["type"] == "image_url"), None), parts[-1]["text"]


async def shout(endpoint, body, request_id):
    text = body["messages"][-1]["content"][-1]["text"]
    return {"choices": [{"message": {"content": text.upper()}, "finish_reason": "stop"}], "usage": {}}


def run(rows, output, folder):
    progress = Progress(folder, "f")
    asyncio.run(answer_rows(rows, shout, progress, max_running=2, tell=lambda done: None))
    write_output(output, rows, progress, is_table=True)
    progress.remove()


def test_paths_stay_paths(tmp_path):
    assert locate(tmp_path) == OnDisk(tmp_path)
    assert locate("C-odd:name.csv").suffix == ".csv"
    assert locate("s3://bucket/a/b.JSONL") == InStore("s3://bucket/a/b.JSONL")
    place = locate("s3://bucket/a/b.JSONL")
    assert (place.name, place.suffix, place.scheme, str(place.parent)) == ("b.JSONL", ".jsonl", "s3", "s3://bucket/a")


def test_a_folder_of_pictures(root):
    rows = read_rows(root.join("pictures"), Asking("m", "What is {image}?"))
    assert [row.custom_id for row in rows] == ["b.png", "deep/a.JPG"]
    assert asked(rows[1]) == (URL, "What is deep/a.JPG?")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_and_its_pictures(root, suffix, tmp_path):
    table, entries = root.join(f"pictures/t.{suffix}"), [{"image": "b.png", "n": "1"}, {"image": "gone.png", "n": "2"}]
    if suffix == "csv":
        put(table, b"image,n\nb.png,1\ngone.png,2\n")
    elif suffix == "jsonl":
        put(table, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "t")
        put(table, (tmp_path / "t").read_bytes())
    rows = read_rows(table, Asking("m", "{n}"))
    assert asked(rows[0]) == (URL, "1")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        rows[1].body()


def test_lines_are_read_where_they_lie(root):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    lines = [{"custom_id": c, "method": "POST", "url": "/v1/chat/completions", "body": body | {"n": 1}} for c in "abc"]
    source = root.join("lines.jsonl")
    put(source, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    assert is_openai(source)
    rows = read_rows(source, Asking("m"))
    assert [row.custom_id for row in rows] == ["a", "b", "c"]
    assert rows[2].body() == body | {"n": 1}
    before = fingerprint(source, rows, {})
    assert before == fingerprint(source, rows, {})
    put(source, b" " + source.read())
    assert fingerprint(source, rows, {}) != before


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_output_is_put_whole(root, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    output = root.join(f"out.{suffix}")
    run(read_rows(root.join("pictures"), Asking("m", "{image}")), output, tmp_path / "journal")
    assert output.is_file()
    assert not any(name.endswith(".part") for name in root.files())
    if suffix == "jsonl":
        assert [json.loads(line)["answer"] for line in output.read().splitlines()] == ["B.PNG", "DEEP/A.JPG"]


def test_nothing_is_there_when_writing_fails(root, tmp_path):
    output, scratch = root.join("out.jsonl"), tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ZeroDivisionError), output.replacing(scratch) as part:  # noqa: PT012
        part.write_bytes(b"half")
        raise ZeroDivisionError
    assert not output.is_file()
    assert not any("out" in name for name in root.files())


def test_a_store_that_breaks_off_leaves_no_half_output(tmp_path, monkeypatch):
    output = locate(f"memory://{tmp_path.name}/out.jsonl")
    store, _ = fsspec.core.url_to_fs(output.url)

    def fail(source, path, **options):
        store.pipe_file(path, b"ha")
        raise OSError("connection lost")

    monkeypatch.setattr(store, "put_file", fail)
    with pytest.raises(OSError, match="lost"), output.replacing(tmp_path) as part:
        part.write_bytes(b"half")
    assert not output.is_file()


def test_where_the_journal_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert progress_folder(locate("/a/out.jsonl")).as_posix() == "/a/out.jsonl.progress"
    assert progress_folder(locate("memory://a/out.jsonl")) == tmp_path / "out.jsonl.progress"


def test_rows_name_pictures_in_allowed_stores_only(tmp_path):
    put(locate(f"memory://{tmp_path.name}/p.png"), PICTURE)
    url = f"memory://{tmp_path.name}/p.png"
    table = tmp_path / "t.csv"
    table.write_text(f"image\n{url}\nfile:///etc/hostname\nmemory://x::{url}\n")
    (row, *_) = read_rows(locate(table), Asking("m", "?"))
    with pytest.raises(InvalidRequest, match="not allowed"):
        row.body()
    rows = read_rows(locate(table), Asking("m", "?", stores=frozenset({"memory"})))
    assert asked(rows[0]) == (URL, "?")
    for other in rows[1:]:
        with pytest.raises(InvalidRequest, match="not allowed"):
            other.body()


def test_a_store_that_is_away_refuses_no_row(tmp_path, monkeypatch):
    table = locate(f"memory://{tmp_path.name}/t.csv")
    put(table, b"image\np.png\n")
    (row,) = read_rows(table, Asking("m", "?"))
    store, _ = fsspec.core.url_to_fs(table.url)

    def fail(path, **options):
        raise ConnectionError("away")

    monkeypatch.setattr(store, "cat_file", fail)
    with pytest.raises(ConnectionError):
        row.body()


def test_stores_that_nobody_knows():
    with pytest.raises(ConfigError, match="nosuchstore"):
        read_rows(locate("nosuchstore://a/b.csv"), Asking("m", "?"))
