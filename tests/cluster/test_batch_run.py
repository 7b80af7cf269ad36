"""`omnilmm batch run` over a tiny model: the command as a user runs it."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from cluster.batch import batch
from omnilmm.errors import ConfigError


@pytest.fixture
def pictures(data, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("coins_gray.png",):
        for copy in range(3):
            shutil.copy(data / "images" / name, folder / f"{copy}-{name}")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


def run(*arguments):
    result = CliRunner().invoke(batch, ["run", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_folder_is_captioned(data, pictures, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ["--model", data / "minicpm-v-tiny", "--dtype", "float32", "--prompt", "What is it?", "--max-tokens", 4]
    told = run(pictures, output, *options, "--greedy", "--kv-blocks", 256)
    assert "3 answered, 1 failed" in told.output
    assert "2 of 3 pictures" in told.output  # the three copies show one picture: encoded once
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["custom_id"] for row in rows][-1] == "broken.png"
    answers = [row["answer"] for row in rows if row["error"] is None]
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert rows[-1]["error_code"] == "invalid_image_format"
    assert "is there already" in run(pictures, output, *options).output


def test_a_dry_run_asks_nothing(data, pictures, tmp_path):
    options = ["--model", data / "minicpm-v-tiny", "--prompt", "What is it?", "--max-tokens", 4]
    told = run(pictures, tmp_path / "out.jsonl", *options, "--dry-run", "--price", 10, 1000)
    assert "4 rows, 4 distinct pictures" in told.output
    assert "at most 16 to write" in told.output
    assert "at most 0.02" in told.output
    assert not (tmp_path / "out.jsonl").exists()


def test_a_few_rows_only(data, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("word\n" + "".join(f"w{i}\n" for i in range(20)))
    common = ["--model", data / "minicpm-v-tiny", "--prompt", "{word}", "--dry-run"]
    assert "3 rows" in run(table, tmp_path / "o.jsonl", *common, "--limit", 3).output
    assert "5 rows" in run(table, tmp_path / "o.jsonl", *common, "--sample", 5).output
    with pytest.raises(ConfigError, match="exclude"):
        run(table, tmp_path / "o.jsonl", *common, "--sample", 5, "--limit", 3)


def test_options_that_would_be_ignored_are_refused(tmp_path):
    lines = tmp_path / "in.jsonl"
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    lines.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    with pytest.raises(ConfigError, match="say themselves"):
        run(lines, tmp_path / "o.jsonl", "--max-tokens", 3)
    with pytest.raises(ConfigError, match="output"):
        run(lines, tmp_path / "o.txt")
