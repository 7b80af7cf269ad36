"""The log survives crashes, the curve is a picture, the bar shows what matters."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from omnilmm.training.curve import Bar, RunLog, draw_curve, read_log


def entries(num: int) -> list[dict[str, object]]:
    return [{"step": step, "loss": 1.0 / step} for step in range(1, num + 1)]


def test_a_resumed_log_goes_on_where_the_state_was(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for entry in entries(5):
        log.write(entry)
    RunLog(tmp_path / "log.jsonl", step=3).write({"step": 4, "loss": 9.0})
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    assert read_log(tmp_path / "log.jsonl")[-1]["loss"] == 9.0
    RunLog(tmp_path / "log.jsonl")
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert len(read_log(path)) == 1


@pytest.mark.parametrize("measured", [False, True])
def test_the_curve_is_a_png(measured: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = RunLog(tmp_path / "log.jsonl")
    for entry in entries(6):
        log.write(entry)
    if measured:
        log.write({"step": 6, "accuracy": {"all": 0.5, "colour": 0.75}})
    draw_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10
        assert (image.height > image.width * 0.8) == measured


def test_an_empty_log_has_an_empty_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    RunLog(tmp_path / "log.jsonl")
    draw_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_bar_shows_steps_loss_and_what_is_said() -> None:
    screen = io.StringIO()
    with Bar(10, Console(file=screen, force_terminal=True, width=120)) as bar:
        bar.advance(3, {"loss": 1.25, "rate": 1e-3, "rows_per_s": 4.0})
        bar.advance(4, None)
        bar.say("step 4: all 0.5")
    shown = screen.getvalue()
    assert "4/10" in shown
    assert "loss 1.2500" in shown
    assert "step 4: all 0.5" in shown
