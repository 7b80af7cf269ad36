"""Pictures of an exam: which answers are mistaken for which, and a sheet of scenes with questions and answers."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnilmm.training.evaluation import Answered, Paper, Report
from omnilmm.training.scenes import COLOURS, SHAPES
from omnilmm.training.scenes_check import Kind
from omnilmm.training.scenes_make import MAX_COUNT
from omnilmm.training.scenes_words import Language, named

OTHER = "other"


def confusion(report: Report, kinds: Sequence[Kind], prefix: str, names: Sequence[str]) -> np.ndarray:
    """(len(names), len(names) + 1) counts: rows are what is so, columns what was said, the last for anything else.

    `prefix` is what the names are called after in `scenes_words.named`: "colour", "shape", "number".
    """
    counted: Counter[tuple[str, str]] = Counter()
    for entry in report.answered:
        wanted = {name for name in names if f"{prefix} {name}" in entry.exchange.required}
        if entry.exchange.kind in kinds and len(wanted) == 1:
            said = {*named(entry.text, entry.exchange.language)}
            meant = [name for name in names if f"{prefix} {name}" in said]
            counted[wanted.pop(), meant[0] if len(meant) == 1 else OTHER] += 1
    return np.array([[counted[row, column] for column in (*names, OTHER)] for row in names])


def draw_confusion(report: Report, png: Path) -> None:
    """Colours, shapes and numbers, side by side. Needs matplotlib (the extra ``train``)."""
    tables: tuple[tuple[str, tuple[Kind, ...], str, tuple[str, ...]], ...] = (
        ("colours", (Kind.COLOUR, Kind.FOLLOW_UP), "colour", COLOURS),
        ("shapes", (Kind.WHAT, Kind.FOLLOW_UP), "shape", SHAPES),
        ("how many", (Kind.COUNT, Kind.COUNT_MANY), "number", tuple(str(n) for n in range(1, MAX_COUNT + 1))),
    )
    figure = _figure(16, 5.4)
    for place, (title, kinds, prefix, names) in enumerate(tables, start=1):
        counts = confusion(report, kinds, prefix, names)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes = figure.add_subplot(1, len(tables), place)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names) + 1), (*names, OTHER), rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(title=title, xlabel="said", ylabel="is so")
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=ink)
    figure.savefig(png, dpi=100)


def draw_sheet(papers: Sequence[Paper], report: Report, png: Path, *, columns: int = 4, rows: int = 4) -> None:
    """Scenes as the model gets them, with English questions and its answers; wrong ones in red."""
    chosen = range(min(columns * rows, len(papers)))
    figure = _figure(4.2 * columns, 4.6 * rows)
    for paper in chosen:
        axes = figure.add_subplot(rows, columns, paper + 1)
        axes.imshow(papers[paper].square)
        axes.set_axis_off()
        entries = [entry for entry in report.answered if entry.paper == paper and _is_shown(entry)][:4]
        for line, entry in enumerate(entries):
            text = textwrap.fill(f"{entry.exchange.question}  {_plain(entry.text)}", 58)
            colour = "black" if entry.is_right else "crimson"
            place = {"transform": axes.transAxes, "va": "top", "parse_math": False}
            axes.text(0, -0.06 - 0.115 * line, text, fontsize=8, color=colour, **place)
    figure.savefig(png, dpi=100)


def _is_shown(entry: Answered) -> bool:
    return entry.exchange.language is Language.ENGLISH


def _plain(text: str) -> str:
    """What the font can show, whatever the model said."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
