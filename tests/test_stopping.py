"""Work that is asked to stop, alone and beside other work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from oxyray.errors import Stopped, TrainingError
from oxyray.stopping import side_by_side, stop_on_sigterm

LIMIT = 20.0


def until_asked(stop: Path) -> None:
    """Works until somebody leaves `stop`."""
    ends = time.monotonic() + LIMIT
    with stop_on_sigterm(stop):
        while not stop.exists():
            assert time.monotonic() < ends, f"nobody asked {stop.name} to stop"
            time.sleep(0.01)
    raise Stopped(f"{stop.name} is saved")


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def test_works_are_at_hand_at_the_same_time() -> None:
    both = threading.Barrier(2)
    met: list[int] = []
    side_by_side([lambda: met.append(both.wait(LIMIT))] * 2)
    assert sorted(met) == [0, 1]


def test_one_work_alone_is_done_in_the_main_thread() -> None:
    where: list[threading.Thread] = []
    side_by_side([lambda: where.append(threading.current_thread())])
    assert where == [threading.main_thread()]


def test_an_error_has_the_others_save_and_is_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        time.sleep(0.1)
        raise TrainingError("the loss is not finite")

    with pytest.raises(TrainingError, match="not finite"):
        side_by_side([lambda: until_asked(tmp_path / "a"), fails, lambda: until_asked(tmp_path / "b")])
    assert {"a is saved", "b is saved"} <= set(capsys.readouterr().out.splitlines())


def test_an_end_of_any_kind_is_no_success() -> None:
    with pytest.raises(SystemExit):
        side_by_side([lambda: sys.exit(3), lambda: None])


def test_what_cannot_be_asked_keeps_nobody_from_being_asked(tmp_path: Path) -> None:
    def gone() -> None:
        with stop_on_sigterm(tmp_path / "no such folder" / "stop"):
            time.sleep(0.2)
        raise TrainingError("its folder is gone")

    with pytest.raises(TrainingError, match="is gone"):
        side_by_side([gone, lambda: until_asked(tmp_path / "b")])
    assert (tmp_path / "b").exists()


def test_an_error_elsewhere_than_in_the_main_thread_is_forgotten_with_its_works() -> None:
    told: list[BaseException] = []

    def outside() -> None:
        for works in ([sys.exit, lambda: None], [lambda: None] * 2):
            try:
                side_by_side(works)
            except BaseException as error:
                told.append(error)

    thread = threading.Thread(target=outside)
    thread.start()
    thread.join(LIMIT)
    assert [type(error) for error in told] == [SystemExit]


def test_ctrl_c_lets_the_works_save_first(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever handler others have left in this process
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side([lambda stop=tmp_path / str(n): until_asked(stop) for n in range(2)])  # type: ignore[misc]
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("works", [1, 2])
def test_sigterm_asks_all_that_is_at_hand(works: int, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.2, signalled)
    timer.start()
    with pytest.raises(Stopped, match="is saved"):
        side_by_side([lambda stop=tmp_path / str(n): until_asked(stop) for n in range(works)])  # type: ignore[misc]
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(works)]
    assert signal.getsignal(signal.SIGTERM) == before


def test_work_that_begins_after_sigterm_is_asked_too(tmp_path: Path) -> None:
    def late() -> None:
        signalled()
        until_asked(tmp_path / "late")

    with pytest.raises(Stopped, match="late is saved"):
        side_by_side([late, lambda: None])
    with stop_on_sigterm(tmp_path / "next"):  # that was then
        assert not (tmp_path / "next").exists()


def test_sigterm_between_two_works_ends_the_command() -> None:
    with pytest.raises(Stopped, match="the same command goes on"):
        side_by_side([signalled, lambda: None])
