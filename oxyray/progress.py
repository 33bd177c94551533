"""Progress of long work: what is being done, how far, how fast, how long still."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], total: int | None = None, label: str = "", unit: str = "it") -> Iterator[T]:
    """Iterate with a progress bar on standard error; where that is no terminal (a log file, CI), a line every half minute instead."""
    quiet = not sys.stderr.isatty()
    yield from tqdm(
        items, total=total, desc=label, unit=unit, mininterval=30 if quiet else 0.2, ascii=quiet, dynamic_ncols=not quiet, leave=not quiet
    )


def bar(total: int | None, label: str, unit: str = "it") -> tqdm:  # type: ignore[type-arg]
    """The same bar, moved by hand with `.update(n)`; close it."""
    quiet = not sys.stderr.isatty()
    return tqdm(total=total, desc=label, unit=unit, mininterval=30 if quiet else 0.2, ascii=quiet, dynamic_ncols=not quiet)
