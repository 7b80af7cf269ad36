"""A run's log, its loss curve, and what it shows on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """`log.jsonl`: one JSON object a line, each with the number of steps done by then.

    Opening it for a run that resumes at `step` drops what an interrupted run wrote after that.
    """

    def __init__(self, path: Path, *, step: int = 0) -> None:
        self._path = path
        kept = [entry for entry in read_log(path) if entry["step"] <= step] if step and path.is_file() else []
        path.write_text("".join(map(_line, kept)), encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, oldest first; a last line cut short by a crash is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def draw_curve(log: Path, png: Path) -> None:
    """The loss over steps, and below it every accuracy that was measured on the way.

    Raises:
        ImportError: matplotlib is not installed (it comes with the extra ``train``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = read_log(log)
    measured = [entry for entry in entries if "accuracy" in entry]
    figure = Figure(figsize=(8, 8 if measured else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper = figure.add_subplot(2 if measured else 1, 1, 1)
    for name, label in (("loss", "per answer token (nats)"), ("grounding", "grounding, per picture (nats)")):
        points = [(entry["step"], entry[name]) for entry in entries if entry.get(name)]
        if points:
            upper.plot(*zip(*points, strict=True), linewidth=1, label=label)
    upper.set(xlabel="step", ylabel="loss", yscale="log")
    if upper.has_data():
        upper.legend()
    upper.grid(alpha=0.3, which="both")
    if measured:
        lower = figure.add_subplot(2, 1, 2)
        for name in dict.fromkeys(name for entry in measured for name in entry["accuracy"]):
            points = [(entry["step"], entry["accuracy"][name]) for entry in measured if name in entry["accuracy"]]
            lower.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=name)
        lower.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
        lower.grid(alpha=0.3)
        lower.legend(fontsize=7, ncols=3)
    figure.savefig(png, dpi=110)


class Display(Protocol):
    """Watches a run."""

    def advance(self, step: int, entry: Mapping[str, float] | None) -> None:
        """`step` steps are done; `entry` is what was just logged, if anything was."""
        ...

    def say(self, line: str) -> None: ...


class Quiet:
    def advance(self, step: int, entry: Mapping[str, float] | None) -> None:
        return None

    def say(self, line: str) -> None:
        return None


class Bar:
    """A progress bar with the latest loss and rate; lines said go above it. Use as a context manager."""

    def __init__(self, steps: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps, news="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, step: int, entry: Mapping[str, float] | None) -> None:
        if entry is None:
            self._progress.update(self._task, completed=step)
        else:
            news = f"loss {entry['loss']:.4f}  rate {entry['rate']:.1e}  {entry['rows_per_s']:.1f} rows/s"
            self._progress.update(self._task, completed=step, news=news)

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)
