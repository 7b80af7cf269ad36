"""Runs without a server: what is read, what is written, and going on after a stop."""

import asyncio
import base64
import json

import pytest

from omnilmm.batch import sources
from omnilmm.batch.locations import locate
from omnilmm.batch.offline import Progress, answer_rows, progress_folder, write_output
from omnilmm.batch.sources import Asking, fill
from omnilmm.errors import ConfigError, ContextLengthExceeded, InvalidRequest

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

ASKING = Asking("m", "What is {image}?")
PICTURE = b"\x89PNG not really"
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


def read_rows(path, asking):
    return sources.read_rows(locate(path), asking)


def is_openai(path):
    return sources.is_openai(locate(path))


def fingerprint(path, rows, wanted):
    return sources.fingerprint(locate(path), rows, wanted)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c.webp", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(PICTURE)
    return tmp_path / "in"


def asked(row):
    """(URL of the picture, words) of a row's request."""
    parts = row.body()["messages"][-1]["content"]
    pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return (pictures[0] if pictures else None), parts[-1]["text"]


def test_a_folder_of_pictures(folder):
    rows = read_rows(folder, ASKING)
    assert [row.custom_id for row in rows] == ["a.JPG", "b.png", "deep/c.webp"]
    assert asked(rows[2]) == (URL, "What is deep/c.webp?")


def test_a_csv_table(folder):
    table = folder / "t.csv"
    table.write_text("\ufeffid,image,words\nx,b.png,one\ny,https://e.org/p.png,two\nz,,three\n", encoding="utf-8")
    asking = Asking("m", "Is it {words}?", system="Be kind.", id_column="id", fields={"max_tokens": 3})
    rows = read_rows(table, asking)
    assert [(row.custom_id, *asked(row)) for row in rows] == [
        ("x", URL, "Is it one?"),
        ("y", "https://e.org/p.png", "Is it two?"),
        ("z", None, "Is it three?"),
    ]
    assert rows[0].body()["max_tokens"] == 3
    assert rows[0].body()["messages"][0] == {"role": "system", "content": "Be kind."}
    assert rows[0].columns == {"id": "x", "image": "b.png", "words": "one"}


def test_a_jsonl_table_and_one_of_openai(folder):
    table = folder / "t.jsonl"
    table.write_text('{"image": "b.png", "n": 1}\n\n{"image": "b.png", "n": 2}\n')
    assert not is_openai(table)
    rows = read_rows(table, Asking("m", "{n}"))
    assert [asked(row) for row in rows] == [(URL, "1"), (URL, "2")]
    assert rows[0].place.picture == rows[1].place.picture
    lines = folder / "l.jsonl"
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    lines.write_text(json.dumps(line) + "\n")
    assert is_openai(lines)
    (row,) = read_rows(lines, ASKING)
    assert (row.custom_id, row.endpoint, row.body()) == ("a", "/v1/chat/completions", body)
    lines.write_text(json.dumps(line) + "\n{\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_rows(lines, ASKING)


@pytest.mark.parametrize("shape", [PICTURE, {"bytes": PICTURE, "path": None}, {"bytes": None, "path": "b.png"}])
def test_a_parquet_table(folder, shape):
    table = folder / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"image": shape, "word": "one"}]), table)
    (row,) = read_rows(table, Asking("m", "{word}"))
    assert asked(row) == (URL, "one")
    assert "bytes" not in json.dumps(row.columns) or PICTURE not in str(row.columns).encode()


def test_templates():
    assert fill("{a} and {{b}} {a}", {"a": "{b}", "b": 1}) == "{b} and {b} {b}"
    with pytest.raises(InvalidRequest):
        fill("{a.__class__}", {"a": 1})


@pytest.mark.parametrize(
    ("content", "asking", "wanted"),
    [
        ("image\n", ASKING, "nothing to ask"),
        ("image\na\n", Asking("m"), "need a prompt"),
        ("image,id\na,1\nb,1\n", Asking("m", "?", id_column="id"), "same id"),
        ("image\na\n", Asking("m", "?", id_column="id"), "no column 'id'"),
    ],
)
def test_tables_that_cannot_be_asked(tmp_path, content, asking, wanted):
    table = tmp_path / "t.csv"
    table.write_text(content)
    with pytest.raises(ConfigError, match=wanted):
        read_rows(table, asking)


def test_inputs_of_other_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="inputs are"):
        read_rows(tmp_path / "a.txt", ASKING)
    with pytest.raises(ConfigError, match="no such"):
        read_rows(tmp_path / "b.csv", ASKING)


# -- running ------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """What no handler of errors may catch."""


class Caption:
    """Answers with the words asked, stops after so many."""

    def __init__(self, stop_after=None):
        self.asked, self._stop_after = [], stop_after
        self.has_a_bug = False

    async def __call__(self, endpoint, body, request_id):
        text = body["messages"][-1]["content"][-1]["text"]
        self.asked.append(text)
        number = len(self.asked)
        await asyncio.sleep(0)
        if self._stop_after is not None and number > self._stop_after:
            raise PowerCut
        if "b.png" in text and self.has_a_bug:
            raise RuntimeError("secret")
        if "deep" in text:
            raise ContextLengthExceeded("too long")
        return {
            "choices": [{"message": {"content": text.upper()}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2, "images": [{"source": "encoded"}]},
        }


def run(rows, output, ask, print_="f", *, is_table=True):
    output = locate(output)
    progress = Progress(progress_folder(output), print_)
    try:
        asyncio.run(answer_rows(rows, ask, progress, max_running=2, tell=lambda done: None))
    except BaseException:
        progress.close()
        raise
    write_output(output, rows, progress, is_table=is_table)
    progress.remove()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_table_comes_out(folder, tmp_path, suffix):
    output = tmp_path / f"out.{suffix}"
    run(read_rows(folder, ASKING), output, Caption())
    if suffix == "parquet":
        got = parquet.read_table(output).to_pylist()
    else:
        got = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["custom_id"] for row in got] == ["a.JPG", "b.png", "deep/c.webp"]
    assert (got[0]["answer"], got[0]["completion_tokens"], got[0]["error"]) == ("WHAT IS A.JPG?", 2, None)
    assert (got[2]["answer"], got[2]["error_code"]) == (None, "context_length_exceeded")
    assert [path.name for path in tmp_path.iterdir()] in (["in", output.name], [output.name, "in"])


def test_a_stopped_run_goes_on(folder, tmp_path):
    output, rows = tmp_path / "out.jsonl", read_rows(folder, ASKING)
    first, second = Caption(stop_after=1), Caption()
    with pytest.raises(PowerCut):
        run(rows, output, first)
    assert not output.exists()
    run(rows, output, second)
    assert len(second.asked) == 2
    assert len(output.read_text().splitlines()) == 3


def test_a_fault_of_ours_costs_one_row(folder, tmp_path):
    output, rows, ask = tmp_path / "out.jsonl", read_rows(folder, ASKING), Caption()
    ask.has_a_bug = True
    run(rows, output, ask)
    got = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["error_code"] for row in got] == [None, "internal_error", "context_length_exceeded"]
    assert "secret" not in output.read_text()


def test_progress_belongs_to_one_run_and_one_process(tmp_path):
    progress = Progress(tmp_path / "out", "f")
    with pytest.raises(ConfigError, match="another process"):
        Progress(tmp_path / "out", "f")
    progress.close()
    with pytest.raises(ConfigError, match="another input"):
        Progress(tmp_path / "out", "g")
    Progress(tmp_path / "out", "f").remove()


def test_fingerprints_tell_runs_apart(folder):
    rows = read_rows(folder, ASKING)
    same = fingerprint(folder, rows, {"a": 1})
    assert same == fingerprint(folder, read_rows(folder, ASKING), {"a": 1})
    assert len({same, fingerprint(folder, rows, {"a": 2}), fingerprint(folder, rows[:2], {"a": 1})}) == 3


def test_lines_of_openai_come_out_as_lines_of_openai(tmp_path):
    lines = tmp_path / "in.jsonl"
    content = [{"type": "text", "text": "hello"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    entries = [{"custom_id": i, "method": "POST", "url": "/v1/chat/completions", "body": body} for i in "ab"]
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    output = tmp_path / "out.jsonl"
    run(read_rows(lines, ASKING), output, Caption(), is_table=False)
    got = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["custom_id"] for row in got] == ["a", "b"]
    assert got[0]["response"]["body"]["choices"][0]["message"]["content"] == "HELLO"
