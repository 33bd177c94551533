"""Work that can be asked to stop: it saves and ends. SIGTERM asks for it; so does an error in what runs beside it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from oxyray.errors import Stopped

_stops: set[Path] = set()  # of the work at hand
_asked = threading.Event()


@contextmanager
def stop_on_sigterm(stop: Path) -> Iterator[None]:
    """Whoever works in the body looks for the file `stop`, which SIGTERM leaves."""
    with _listening():
        _stops.add(stop)
        try:
            if _asked.is_set():
                stop.touch()
            yield
        finally:
            _stops.discard(stop)


def side_by_side(works: Sequence[Callable[[], None]]) -> None:
    """Do all of it at once, each work in a thread of its own. An error in one has the others stop, and is raised when they have."""
    if len(works) == 1:
        return works[0]()
    errors: list[Exception] = []

    def do(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)
            _ask()

    with _listening():
        threads = [threading.Thread(target=do, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asked = _asked.is_set()
    errors.sort(key=lambda error: isinstance(error, Stopped))
    for error in errors[1:]:
        print(error, flush=True)
    if errors:
        raise errors[0]
    if asked:
        raise Stopped("stopped on request; what is finished stays, and the same command goes on from there")


def _ask() -> None:
    _asked.set()
    for stop in list(_stops):
        stop.touch()


@contextmanager
def _listening() -> Iterator[None]:
    """Only the main thread hears signals; work in other threads is asked by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: _ask())
    _asked.clear()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()
