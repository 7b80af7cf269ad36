"""Lines of a JSONL file become conversations, or are refused by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_cases import write_jsonl

from omnilmm.errors import ConfigError
from omnilmm.training.records import read_records

ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def read(tmp_path: Path, *records: dict[str, Any]) -> Any:
    return [*read_records(write_jsonl(tmp_path / "data.jsonl", *records))]


def test_a_record_of_the_original_format(tmp_path: Path) -> None:
    (record,) = read(tmp_path, {"id": "7", "image": "sub/a.png", "conversations": ASKED})
    assert record.name == "7"
    assert record.pictures == (tmp_path / "sub/a.png",)
    first, second = record.conversation.turns
    assert (len(first.images), first.text, second.role, second.text) == (1, "What?", "assistant", "That.")


def test_pictures_without_places_go_to_the_first_question(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, *ASKED, *ASKED]
    (record,) = read(tmp_path, {"image": ["a.png", "b.png"], "conversations": talk})
    assert [len(turn.images) for turn in record.conversation.turns] == [0, 2, 0, 0, 0]


def test_places_are_filled_in_order_and_leave_no_trace(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "An <image>."},
        {"role": "user", "content": "And <image> or <image>?"},
        ASKED[1],
    ]
    (record,) = read(tmp_path, {"image": ["a.png", "b.png", "c.png"], "conversations": talk})
    turns = record.conversation.turns
    assert [len(turn.images) for turn in turns] == [1, 0, 2, 0]
    assert [turn.text for turn in turns] == ["What?", "An <image>.", "And  or ?", "That."]


def test_no_picture_is_no_picture(tmp_path: Path) -> None:
    (record,) = read(tmp_path, {"conversations": ASKED})
    assert record.pictures == ()
    assert not record.conversation.images


def test_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps({"conversations": ASKED})
    path.write_text(f"\n{line}\n\n{line}")
    assert len([*read_records(path)]) == 2


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"id": "1"}',
        '{"conversations": [], "image": "a.png"}',
        '{"conversations": ["hi"]}',
        '{"conversations": [{"role": "human", "content": "hi"}]}',
        '{"conversations": [{"role": "user", "content": 1}]}',
        '{"image": 3, "conversations": [{"role": "user", "content": "hi"}]}',
        '{"image": ["a", "b"], "conversations": [{"role": "user", "content": "<image>hi"}]}',
        '{"conversations": [{"role": "user", "content": "<image>hi"}]}',
    ],
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl:2"):
        [*read_records(path)]


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        [*read_records(tmp_path / "nothing.jsonl")]
