"""What is mistaken for what."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from omnilmm.training.evaluation import Answered, Report, make_papers
from omnilmm.training.scenes import COLOURS, Split
from omnilmm.training.scenes_check import Exchange, Kind
from omnilmm.training.scenes_draw import Scenery
from omnilmm.training.scenes_words import Language
from omnilmm.training.sheets import confusion, draw_confusion, draw_sheet


def answered(wanted: str, text: str, language: Language = Language.ENGLISH) -> Answered:
    names = frozenset({f"colour {wanted}"})
    return Answered(0, Exchange(Kind.COLOUR, language, "What colour is the star?", "", names, names), text)


REPORT = Report(
    (
        answered("red", "The star is red."),
        answered("red", "红色。", Language.CHINESE),
        answered("red", "Orange."),
        answered("blue", "Blue or red."),
        answered("blue", "A heart."),
    )
)


def test_rows_are_what_is_so_and_columns_what_was_said() -> None:
    table = confusion(REPORT, (Kind.COLOUR,), "colour", COLOURS)
    red, orange, blue = (COLOURS.index(colour) for colour in ("red", "orange", "blue"))
    assert table[red, red] == 2
    assert table[red, orange] == 1
    assert table[blue, -1] == 2
    assert table.sum() == 5


def test_pictures_are_drawn(bare_scenery: Scenery, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_confusion(REPORT, tmp_path / "confusion.png")
    draw_sheet(make_papers(Split.TEST, 0, 2, scenery=bare_scenery, side=32), REPORT, tmp_path / "sheet.png", rows=1)
    for name in ("confusion.png", "sheet.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 500
