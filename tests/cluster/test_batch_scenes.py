"""The worked example's two ends: pictures with truth beside them, and the count of right answers."""

import json

import pytest
from typer.testing import CliRunner

from cluster.batch import batch
from omnilmm.errors import ConfigError


def call(*arguments):
    result = CliRunner().invoke(batch, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def answer(folder, path, change):
    rows = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"answer": change(i, row)}) + "\n" for i, row in enumerate(rows)))


def test_what_is_drawn_can_be_scored(tmp_path):
    folder, answers = tmp_path / "scenes", tmp_path / "answers.jsonl"
    assert "drew 10 pictures" in call("draw", folder, "--count", 10, "--seed", 3, "--side", 96)
    assert len(list(folder.glob("*.png"))) == 10
    answer(folder, answers, lambda i, row: row["truth"])
    assert "100.0%" in call("score", answers).splitlines()[-2]
    answer(folder, answers, lambda i, row: row["truth"] if i < 4 else None)
    last = call("score", answers).splitlines()[-2]
    assert "40.0%" in last
    assert "10" in last


def test_a_seed_draws_the_same_again(tmp_path):
    for name in ("a", "b"):
        call("draw", tmp_path / name, "--count", 3, "--seed", 5, "--side", 96, "--kind", "describe", "--language", "zh")
    assert (tmp_path / "a" / "scenes.jsonl").read_text() == (tmp_path / "b" / "scenes.jsonl").read_text()
    assert (tmp_path / "a" / "000002.png").read_bytes() == (tmp_path / "b" / "000002.png").read_bytes()
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "a" / "scenes.jsonl").read_text().splitlines()}
    assert kinds == {"describe"}


@pytest.mark.parametrize("options", [["--kind", "poem"], ["--language", "fr"], ["--kind", "follow-up", "--count", 1]])
def test_what_cannot_be_drawn(tmp_path, options):
    with pytest.raises(ConfigError):
        call("draw", tmp_path / "scenes", *options)


def test_other_files_are_not_scored(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"answer": "x"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        call("score", tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="already"):
        call("draw", tmp_path)
