"""Text files line by line, plain or gzip, with every failure of reading turned into one line that names the file and the place."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from oxyray.errors import DataError
from oxyray.progress import bar

_MOVE_EVERY = 10_000
_DELIMITERS = (",", "\t", ";", "|")
csv.field_size_limit(1 << 24)


@contextmanager
def _opened(file: Path, label: str | None) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    """The file's bytes, unpacked where the name ends in .gz, and a function that moves a bar over the bytes on disk (no label: no bar)."""
    with open(file, "rb") as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb")) if file.suffix == ".gz" else raw
        if label is None:
            yield stream, lambda: None
        else:
            with bar(file.stat().st_size, f"{label} {file.name}", "B") as shown:
                yield stream, lambda: shown.update(raw.tell() - shown.n)


def lines(file: Path, label: str | None) -> Iterator[tuple[int, bytes]]:
    """1-based number and bytes of each line that is not blank."""
    number = 0
    try:
        with _opened(file, label) as (stream, move):
            for number, line in enumerate(stream, start=1):
                if number % _MOVE_EVERY == 0:
                    move()
                if line.strip():
                    yield number, line
            move()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(file, number, error) from error


@dataclass(frozen=True)
class Rows:
    """Rows of a CSV file as text, column by column, with the 1-based line where each begins. `width_N` is how many fields the line really
    had: rows that are too short were filled with empty text, of too long ones the rest was cut."""

    cells: list[list[str]]
    line_N: np.ndarray
    width_N: np.ndarray


def csv_header(file: Path) -> tuple[list[str], str]:
    """Column names and the delimiter (of comma, tab, semicolon and bar the most frequent in the first line). Raises DataError."""
    first = next(lines(file, None), (0, b""))[1].decode("utf-8-sig", errors="replace")
    delimiter = max(_DELIMITERS, key=first.count)
    header = next((record for _, record in _records(file, delimiter, None)), None)
    if header is None:
        raise DataError(f"{file}: the file is empty")
    header = [name.strip() for name in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{file} line 1: column {twice[0]!r} appears twice; rename one")
    return header, delimiter


def csv_rows(file: Path, batch_rows: int, label: str) -> Iterator[Rows]:
    """The rows under the header, in batches."""
    header, delimiter = csv_header(file)
    width = len(header)
    batch: list[list[str]] = []
    line_N: list[int] = []
    width_N: list[int] = []
    for line, record in islice(_records(file, delimiter, label), 1, None):
        line_N.append(line)
        width_N.append(len(record))
        batch.append(record if len(record) == width else (record + [""] * width)[:width])
        if len(batch) == batch_rows:
            yield Rows([list(column) for column in zip(*batch, strict=True)], np.array(line_N), np.array(width_N))
            batch, line_N, width_N = [], [], []
    if batch:
        yield Rows([list(column) for column in zip(*batch, strict=True)], np.array(line_N), np.array(width_N))


def _records(file: Path, delimiter: str, label: str | None) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each record that is not blank, the header first."""
    line = 0
    try:
        with _opened(file, label) as (stream, move):
            reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter)
            for record in reader:
                begin, line = line + 1, reader.line_num
                if line % _MOVE_EVERY == 0:
                    move()
                if record:
                    yield begin, record
            move()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} after line {line}: not UTF-8 text ({error.reason}); convert it: iconv -f latin1 -t utf-8") from error
    except csv.Error as error:
        raise DataError(f"{file} line {line + 1}: not readable as CSV ({error})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(file, line, error) from error


def _damaged(file: Path, line: int, error: Exception) -> DataError:
    if isinstance(error, EOFError):
        return DataError(f"{file}: the gzip file is cut short after line {line}; fetch or write it again")
    return DataError(f"{file}: not a sound gzip file after line {line} ({error}); fetch or write it again")
