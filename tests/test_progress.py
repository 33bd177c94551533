"""Progress where there is no terminal: whole lines, and silence about short work."""

from __future__ import annotations

import re
import time

import pytest

import oxyray.progress as progress


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), 5, "short", "step")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_long_work_says_whole_lines_with_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.05)
    monkeypatch.setattr(progress, "_SHORT_S", 0.05)
    for done in progress.track(range(2000), 2000, "long", "step"):
        time.sleep(0.03)
        if done == 12:
            break
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    for line in lines:
        said = re.fullmatch(r"long: +\d+%\|[^|]*\| (\d+)/2000 \[\d\d:\d\d<(\d+):(\d\d), +(\d+\.\d+)(step/s|s/step)\]", line)
        assert said is not None, line
        a_step = float(said[4]) if said[5] == "s/step" else 1 / float(said[4])
        assert int(said[2]) * 60 + int(said[3]) == pytest.approx((2000 - int(said[1])) * a_step, abs=1.5, rel=0.01)


def test_a_bar_is_moved_by_hand() -> None:
    with progress.bar(10, "by hand") as shown:
        shown.update(4)
        shown.update(6)
        assert shown.n == 10
