"""Finding and killing the processes of a run that goes on in this process's Ray: by their actor's name, and only children of this test."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import psutil

from oxyray.errors import RunError
from oxyray.files import read_json
from oxyray.run import Run

ROLES = {"rollout": "RolloutProcess", "judge": "JudgeProcess", "learner": "LearnerProcess"}


def processes(role: str) -> list[int]:
    """Process ids of the actors of a role, or of a class, oldest first."""
    found = [child for child in psutil.Process().children(recursive=True) if ROLES.get(role, role) in _title(child)]
    return [child.pid for child in sorted(found, key=lambda child: child.create_time())]


def _title(child: psutil.Process) -> str:
    try:
        return " ".join(child.cmdline())
    except psutil.Error:
        return ""


def kill(role: str) -> None:
    os.kill(processes(role)[-1], signal.SIGKILL)


def gone(role: str, limit_s: float = 60) -> bool:
    """Whether the role's processes end within the limit: Ray ends an actor some time after it was told to."""
    end = time.monotonic() + limit_s
    while processes(role) and time.monotonic() < end:
        time.sleep(0.1)
    return not processes(role)


def when_at(run: Run, step: int, act: Callable[[], None]) -> threading.Thread:
    """Call `act` once the alignment has passed `step`."""

    def passed() -> bool:
        try:
            return bool(read_json(run.path("align", "progress.json"))["step"] >= step)
        except RunError:
            return False

    return _when(passed, act)


def when_seen(role: str, act: Callable[[], None]) -> threading.Thread:
    """Call `act` once the role has a process."""
    return _when(lambda: bool(processes(role)), act)


def _when(come: Callable[[], bool], act: Callable[[], None], limit_s: float = 240) -> threading.Thread:
    def wait() -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if come():
                return act()
            time.sleep(0.01)
        return None

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
