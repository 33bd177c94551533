"""Progress of long work: what is being done, how far, how fast, how long still.

On a terminal a bar on standard error that moves. Elsewhere (a log file, CI) a whole line every half minute, and none for what takes less
than a few seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_QUIET_S = 30.0
_SHORT_S = 5.0


class _Lines:
    """Makes a bar's redrawings into lines of their own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def track(items: Iterable[T], total: int | None = None, label: str = "", unit: str = "it") -> Iterator[T]:
    """Iterate with a progress bar."""
    with bar(total, label, unit) as shown:
        for item in items:
            yield item
            shown.update(1)


def bar(total: int | None, label: str, unit: str = "it") -> tqdm[Any]:
    """A bar, moved by hand with `.update(n)`; close it, or use it in a `with`."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True, mininterval=0.2)
    lines: Any = _Lines(sys.stderr)
    return tqdm(total=total, desc=label, unit=unit, file=lines, ascii=True, ncols=100, mininterval=_QUIET_S, delay=_SHORT_S, position=0)
