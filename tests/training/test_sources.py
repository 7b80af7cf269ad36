"""Rows come in a known order, grouped by picture, and bad data is refused before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_cases import square, write_jsonl

from omnilmm.config import ImagePolicy
from omnilmm.errors import ConfigError
from omnilmm.training.config import JsonlConfig
from omnilmm.training.sequences import SequenceMaker
from omnilmm.training.sources import JsonlSource, row_index

POLICY = ImagePolicy(side=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def record(image: str | list[str] | None, *texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    talk = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"conversations": talk} | ({"image": image} if image is not None else {})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(3):
        Image.fromarray(square(number)).save(tmp_path / f"{number}.png")
    return tmp_path


def source(maker: SequenceMaker, folder: Path, *records: dict[str, Any], **settings: Any) -> JsonlSource:
    path = write_jsonl(folder / "data.jsonl", *records)
    return JsonlSource([path], maker=maker, policy=POLICY, settings=JsonlConfig(train=(str(path),), **settings))


def test_every_round_has_every_row_once_in_an_order_of_its_own() -> None:
    rounds = [[row_index(position, 7, 3) for position in range(7 * n, 7 * n + 7)] for n in range(3)]
    assert all(sorted(order) == [*range(7)] for order in rounds)
    assert len({tuple(order) for order in rounds}) == 3
    assert rounds != [[row_index(position, 7, 4) for position in range(7 * n, 7 * n + 7)] for n in range(3)]
    assert [row_index(position, None, 0) for position in (0, 9)] == [0, 9]


def test_neighbours_about_one_picture_share_a_row(maker: SequenceMaker, pictures: Path) -> None:
    asked = [
        record("0.png", "a?", "b"),
        record("0.png", "c?", "d"),
        record("1.png", "a?", "b"),
        record("0.png", "e?", "f"),
    ]
    grouped = source(maker, pictures, *asked)
    assert grouped.num_rows == 3
    assert [len(grouped.row(index, 0).target_nodes) > 0 for index in range(3)] == [True] * 3
    assert len(grouped.row(0, 0).spans) == 1
    assert source(maker, pictures, *asked, max_group=1).num_rows == 4


def test_text_alone_is_a_row_of_its_own(maker: SequenceMaker, pictures: Path) -> None:
    made = source(
        maker, pictures, record(None, "a?", "b"), record(None, "a?", "c"), record(["0.png", "1.png"], "d?", "e")
    )
    assert made.num_rows == 3
    assert [len(made.row(index, 0).pictures) for index in range(3)] == [0, 0, 2]


def test_pictures_are_those_of_the_files(maker: SequenceMaker, pictures: Path) -> None:
    made = source(maker, pictures, record(["2.png", "0.png"], "a?", "b"))
    for _ in range(2):  # the second time from memory
        row = made.row(0, 0)
        np.testing.assert_array_equal(row.pictures[0], square(2))
        np.testing.assert_array_equal(row.pictures[1], square(0))


def test_what_is_too_long_is_left_out_and_counted(maker: SequenceMaker, pictures: Path) -> None:
    long = record("0.png", "a?", "b " * 500)
    made = source(maker, pictures, record("0.png", "a?", "b"), long, max_tokens=300)
    assert (made.num_rows, made.num_left_out) == (1, 1)
    with pytest.raises(ConfigError, match="short enough"):
        source(maker, pictures, long, max_tokens=300)


@pytest.mark.parametrize(
    "bad",
    [
        record("missing.png", "a?", "b"),
        record("0.png", "only a question"),
        record("0.png", "a?", "b", "the last is no answer \ud800", "c"),
    ],
)
def test_bad_records_are_refused_at_once(bad: dict[str, Any], maker: SequenceMaker, pictures: Path) -> None:
    path = pictures / "data.jsonl"
    path.write_text(json.dumps(bad) + "\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl"):
        JsonlSource([path], maker=maker, policy=POLICY, settings=JsonlConfig(train=(str(path),)))


def test_a_broken_picture_is_an_error_of_ours(maker: SequenceMaker, pictures: Path) -> None:
    (pictures / "0.png").write_bytes(b"not a picture")
    made = source(maker, pictures, record("0.png", "a?", "b"))
    with pytest.raises(ConfigError, match=r"0\.png"):
        made.row(0, 0)
