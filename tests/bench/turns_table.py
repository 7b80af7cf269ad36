"""What `multiturn.py` tells of the answers it got: a table, ratios, and a chart of bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and its answer's first token. `part`: "chats", "restarted", "repeats" or "two-replicas".

    `num_prompt_tokens` is 0 where the system does not tell.
    """

    part: str
    turn: int
    ttft_s: float
    num_encodes: int
    num_prompt_tokens: int = 0


ROWS: dict[str, Callable[[Asked], bool]] = {
    "turn 1": lambda one: one.part == "chats" and one.turn == 1,
    "turns 2+": lambda one: one.part == "chats" and one.turn > 1,
    "after a restart": lambda one: one.part == "restarted",
    "80 % known pictures": lambda one: one.part == "repeats",
    "two replicas, turn 1": lambda one: one.part == "two-replicas" and one.turn == 1,
    "two replicas, turns 2+": lambda one: one.part == "two-replicas" and one.turn > 1,
}


def read(path: Path) -> list[Asked]:
    return [Asked(**one) for one in json.loads(path.read_text(encoding="utf-8"))]


def percentiles(asked: Sequence[Asked]) -> tuple[float, float, float]:
    """p50, p90 and p99 of the time to the first token, in milliseconds."""
    ordered = sorted(1000 * one.ttft_s for one in asked)
    p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    return p50, p90, p99


def print_table(figures: dict[str, list[Asked]]) -> None:
    print("\n| TTFT in ms: p50 / p90 / p99 |", " | ".join(figures), "|")
    print("|---|" + "---|" * len(figures))
    rows = {row: [list(filter(belongs, asked)) for asked in figures.values()] for row, belongs in ROWS.items()}
    rows = {row: cells for row, cells in rows.items() if any(cells)}
    print_rows("", rows, lambda mine: " / ".join(f"{value:.0f}" for value in percentiles(mine)))
    print_rows("encodes of questions, ", rows, lambda mine: f"{sum(one.num_encodes for one in mine)} of {len(mine)}")
    print_rows("prompt tokens, median, ", rows, median_length)
    print()
    goals = [("turns 2+", "monolith", " (goal 0.35)"), ("after a restart", "cache-off", " (goal 0.5)")]
    for row, other, goal in (*goals, *((row, "vllm", "") for row in rows)):
        cells = dict(zip(figures, rows.get(row, ()), strict=False))
        if cells.get("ours") and cells.get(other):
            ratio = percentiles(cells["ours"])[0] / percentiles(cells[other])[0]
            print(f"{row}: ours / {other} {ratio:.2f} at the median{goal}")


def print_rows(prefix: str, rows: dict[str, list[list[Asked]]], cell: Callable[[list[Asked]], str]) -> None:
    for row, cells in rows.items():
        print(f"| {prefix}{row} | {' | '.join(cell(mine) if mine else '-' for mine in cells)} |")


def median_length(asked: list[Asked]) -> str:
    lengths = [one.num_prompt_tokens for one in asked]
    return f"{statistics.median(lengths):.0f}" if any(lengths) else "-"


def draw_chart(figures: dict[str, list[Asked]], path: Path) -> None:
    """Medians as bars, up to p99 as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.8 / len(figures)
    rows = {
        row: belongs for row, belongs in ROWS.items() if any(any(map(belongs, asked)) for asked in figures.values())
    }
    for index, (system, asked) in enumerate(figures.items()):
        for number, belongs in enumerate(rows.values()):
            mine = [one for one in asked if belongs(one)]
            if not mine:
                continue
            p50, _, p99 = percentiles(mine)
            place = number + (index - (len(figures) - 1) / 2) * width
            axes.bar(place, p50, width, color=f"C{index}", label=system if number == 0 else None)
            axes.plot([place, place], [p50, p99], color="black", linewidth=1)
    axes.set_xticks(range(len(rows)), [row.replace(", ", ",\n").replace("80 % ", "80 %\n") for row in rows])
    axes.set_ylabel("time to first token, ms (bar: p50, line: to p99)")
    axes.legend(frameon=False, ncols=len(figures), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
