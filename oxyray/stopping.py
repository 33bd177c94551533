"""Work that can be asked to stop: it saves and ends. SIGTERM asks for it; so does an error in what runs beside it."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from oxyray.errors import OxyrayError, Stopped

_PATIENCE_S = 60.0
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
    errors: list[BaseException] = []

    def do(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            _ask()

    with _listening():
        _asked.clear()
        threads = [threading.Thread(target=do, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: they save, if they can do so in time
            _ask()
            for thread in threads:
                thread.join(timeout=_PATIENCE_S)
            raise
        finally:
            asked = _asked.is_set()
            _asked.clear()
    errors.sort(key=lambda error: isinstance(error, Stopped))
    for error in errors[1:]:
        traceback.print_exception(error) if not isinstance(error, OxyrayError) else print(error, flush=True)
    if errors:
        raise errors[0]
    if asked:
        raise Stopped("stopped on request; what is finished stays, and the same command goes on from there")


def asked_to_stop() -> bool:
    """Whether what is at work side by side has been asked to stop."""
    return _asked.is_set()


def _ask() -> None:
    _asked.set()
    for stop in list(_stops):
        with suppress(OSError):  # a full disk; the others must hear of it all the same
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
