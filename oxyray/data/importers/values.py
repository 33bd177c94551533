"""Text cells to typed values, whole columns at a time; what cannot be read is marked, not raised.

Times: numbers are epoch seconds, milliseconds, microseconds or nanoseconds, told apart by their size, fractions cut; other text must be
an ISO date or date-time (`2024-03-01`, `20240301`, `2024-03-01 10:22:33`, `…T10:22:33+02:00`), taken as UTC where it names no zone.
Legend: N cells.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oxyray.data.tables import TYPES, distinct

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_WHOLE = r"^[+-]?([0-9]{1,18}|[0-8][0-9]{18})(\.0*)?$"  # what 64 bits surely hold
_DAY = r"^(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])$"
_NO_TEXT = pa.array(["", "\\N"], pa.large_string())  # the latter is how MySQL and Hive write a null
_NO_ID = pa.array(["", "\\N", "null", "NULL", "nan", "NaN", "None"], pa.large_string())
_EMPTY = pa.array([*_NO_ID.to_pylist(), "NA", "N/A"], pa.large_string())
_SCALES = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
EXPECTED = {
    "time": "an ISO time or an epoch number",
    "whole": "a whole number",
    "number": "a number",
    "text": "text",
    "texts": "texts split by |",
}


def parse(cells: pa.Array, kind: str, scale: str = "seconds", ids: bool = False) -> tuple[pa.Array, np.ndarray]:
    """`cells` (large_string) as `TYPES[kind]`, and bool_N of the cells that are not empty and could not be read (null in the result). In a
    column of `ids` the words that programs write for a missing value are none: rows that share one would be taken for one user's."""
    cells = pc.utf8_trim_whitespace(cells)
    if kind == "text":
        return pc.if_else(pc.is_in(cells, value_set=_NO_ID if ids else _NO_TEXT), None, cells), np.zeros(len(cells), bool)
    cells = pc.if_else(pc.is_in(cells, value_set=_EMPTY), None, cells)
    if kind == "texts":
        return pc.split_pattern(cells, "|").cast(TYPES["texts"]), np.zeros(len(cells), bool)
    if kind == "time":
        parsed = _times(cells, scale)
    elif kind == "whole":
        parsed = _whole(cells)
    else:
        parsed = pc.if_else(pc.match_substring_regex(cells, _NUMBER), cells, None).cast(pa.float64())
    return parsed, cells.is_valid().to_numpy(zero_copy_only=False) & parsed.is_null().to_numpy(zero_copy_only=False)


def time_scale(cells: pa.Array) -> str:
    """What most of the cells (text or whole numbers) are: `ISO`, or the unit of their epoch numbers. `20240301` is a day where all are."""
    words = pc.utf8_trim_whitespace(cells.cast(pa.large_string()))
    number_N = _epoch(words).drop_null().to_numpy()
    if 2 * len(number_N) < len(cells) - cells.null_count or not len(number_N):
        return "ISO"
    if pc.all(pc.match_substring_regex(words, _DAY)).as_py():
        return "ISO"
    middle = float(np.median(np.abs(number_N.astype(np.float64))))
    return next((scale for scale, factor in _SCALES.items() if middle < 10**11 * factor), "nanoseconds")


def to_seconds(numbers: pa.Array, scale: str) -> pa.Array:
    """Whole epoch numbers in `scale` as seconds, rounded down; positions stay."""
    factor = _SCALES.get(scale, 1)
    below = pc.if_else(pc.less(numbers, 0), factor - 1, 0)  # division cuts towards zero
    return pc.divide(pc.subtract(numbers, below), factor)


def _whole(cells: pa.Array) -> pa.Array:
    fits = pc.match_substring_regex(cells, _WHOLE)
    return pc.replace_substring_regex(pc.if_else(fits, cells, None), r"^\+|\.0*$", "").cast(pa.int64())


def _epoch(cells: pa.Array) -> pa.Array:
    """Whole numbers as they are, others rounded down."""
    whole = _whole(cells)
    broken = pc.if_else(pc.and_(whole.is_null(), pc.match_substring_regex(cells, _NUMBER)), cells, None).cast(pa.float64())
    return pc.coalesce(whole, rounded_down(broken))


def rounded_down(numbers: pa.Array) -> pa.Array:
    """Floats as whole numbers; null what 64 bits cannot hold."""
    return pc.if_else(pc.less(pc.abs(numbers), 9e18), pc.floor(numbers), None).cast(pa.int64())


def _times(cells: pa.Array, scale: str) -> pa.Array:
    if scale != "ISO":
        return to_seconds(_epoch(cells), scale)
    values, code_N = distinct(cells)
    seconds_V = [_iso(value) for value in values]
    return pa.array([*seconds_V, None], pa.int64()).take(pa.array(code_N))


def _iso(value: str) -> int | None:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)
