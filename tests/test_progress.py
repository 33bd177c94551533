"""Progress where there is no terminal: whole lines, and silence about short work."""

from __future__ import annotations

import time

import pytest

import oxyray.progress as progress


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), 5, "short", "step")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_long_work_says_whole_lines_with_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.05)
    monkeypatch.setattr(progress, "_SHORT_S", 0.05)
    for _ in progress.track(range(10), 10, "long", "step"):
        time.sleep(0.03)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all((line.startswith("long: ") and "step/s" in line) or "s/step" in line for line in lines)
    assert "10/10" in lines[-1]


def test_a_bar_is_moved_by_hand() -> None:
    with progress.bar(10, "by hand") as shown:
        shown.update(4)
        shown.update(6)
        assert shown.n == 10
