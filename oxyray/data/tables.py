"""Canonical tables on disk: which columns they have, of which types, and how they are read in bounded memory.

A table is one Parquet file (`events.parquet`) or a folder of them (`events/` or `events.parquet/`, subfolders too, in name order). Choices:
files are read one by one, batch by batch, so a table may be larger than memory and every error names its file; a type is changed only where
no value is lost (whole-number ids to strings, 3.0 to 3; timestamps are rounded down to seconds), anything else is a DataError that names
file, column, found and expected type; columns outside the contract are left out of events and items, and kept as the profile of users.
Rules about single rows are in `contract.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.config.model import ACTIONS as ACTIONS  # the contract names them
from oxyray.errors import DataError

BATCH_ROWS = 262_144

TYPES: dict[str, pa.DataType] = {
    "text": pa.large_string(),
    "texts": pa.list_(pa.large_string()),
    "time": pa.int64(),
    "whole": pa.int64(),
    "number": pa.float64(),
    "bytes": pa.large_binary(),
}
_EXPECTED = {
    "text": "string",
    "texts": "list of strings",
    "time": "whole numbers or a timestamp",
    "whole": "whole numbers",
    "number": "numbers",
    "bytes": "binary (an encoded picture)",
}


IDS = ("user_id", "item_id", "request_id", "trigger_item_id")


@dataclass(frozen=True)
class Column:
    name: str
    kind: str
    required: bool = False


COLUMNS: dict[str, tuple[Column, ...]] = {
    "items": (
        Column("item_id", "text", True),
        Column("title", "text", True),
        Column("description", "text"),
        Column("category_1", "text"),
        Column("category_2", "text"),
        Column("category_3", "text"),
        Column("brand", "text"),
        Column("price", "number"),
        Column("image", "bytes"),
        Column("attributes", "texts"),
    ),
    "users": (Column("user_id", "text", True),),
    "events": (
        Column("user_id", "text", True),
        Column("item_id", "text", True),
        Column("event_time", "time", True),
        Column("action", "text", True),
        Column("scenario", "text", True),
        Column("request_id", "text"),
        Column("trigger_item_id", "text"),
        Column("query", "text"),
        Column("quantity", "whole"),
        Column("price", "number"),
    ),
    "pools": (Column("scenario", "text", True), Column("item_id", "text", True)),
}


@dataclass(frozen=True)
class Chunk:
    """Rows of one file. `first_row` is the 0-based number of the first one in `file`; `line_N` their 1-based lines in a text file."""

    rows: pa.Table
    file: Path
    first_row: int = 0
    line_N: np.ndarray | None = None


class Table:
    """One canonical table. Opening it reads the footers only and checks columns and types; raises DataError."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name = name
        self.files = files
        self.ignored: set[str] = set()
        found: dict[str, Column] = {}
        self.rows = 0
        for file in files:
            with readable(file):
                parquet = pq.ParquetFile(file)
            self.rows += parquet.metadata.num_rows
            found |= {column.name: column for column in self._check(file, parquet.schema_arrow)}
        self.columns = tuple(found.values())
        if self.rows == 0:
            raise DataError(f"{_place(files)}: the {name} table has no rows")

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(column.name, TYPES[column.kind]) for column in self.columns])

    def chunks(self, batch_rows: int = BATCH_ROWS) -> Iterator[Chunk]:
        """The rows in order, in canonical types; an optional column that a file lacks is null there."""
        for file in self.files:
            row = 0
            with readable(file):
                parquet = pq.ParquetFile(file)
                names = [column.name for column in self.columns if column.name in parquet.schema_arrow.names]
                batches = parquet.iter_batches(batch_size=batch_rows, columns=names)
            while True:
                with readable(file):
                    batch = next(batches, None)
                if batch is None:
                    break
                if batch.num_rows:
                    yield Chunk(self._canonical(batch, file), file, row)
                row += batch.num_rows

    def read(self) -> pa.Table:
        """All rows in memory: for the tables that fit (items, users, pools)."""
        return pa.concat_tables([chunk.rows for chunk in self.chunks()])

    def _check(self, file: Path, schema: pa.Schema) -> list[Column]:
        columns = []
        for column in COLUMNS[self.name]:
            if column.name not in schema.names:
                if column.required:
                    have = ", ".join(schema.names)
                    raise DataError(
                        f"{file}: column {column.name} is missing (the file has: {have}); rename a column, or import with data=files, "
                        f"which maps columns"
                    )
                continue
            kind = schema.field(column.name).type
            if not fits(kind, column.kind):
                raise DataError(f"{file}: column {column.name} has type {kind}, expected {_EXPECTED[column.kind]}")
            columns.append(column)
        known = {column.name for column in COLUMNS[self.name]}
        extra = [name for name in schema.names if name not in known]
        if self.name == "users":
            return columns + [_profile(file, name, schema.field(name).type) for name in extra]
        self.ignored |= set(extra)
        return columns

    def _canonical(self, batch: pa.RecordBatch, file: Path) -> pa.Table:
        arrays = []
        for column in self.columns:
            if column.name in batch.schema.names:
                arrays.append(convert(batch.column(column.name), column.kind, file, column.name))
            else:
                arrays.append(pa.nulls(batch.num_rows, TYPES[column.kind]))
        return pa.Table.from_arrays(arrays, schema=self.schema)


def find(folder: Path, name: str, file: str | None = None) -> list[Path]:
    """The files of table `name` in `folder`, [] where there is none. `file` names it otherwise (relative to the folder, or absolute)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set data.path to the folder of your tables")
    if file is not None:
        path = folder / file
        if not path.exists():
            raise DataError(f"{path}: no such file; see data.{name}_file")
        return _parquet_files(path)
    for path in (folder / f"{name}.parquet", folder / name):
        if path.exists():
            return _parquet_files(path)
    return []


def fits(found: pa.DataType, kind: str) -> bool:
    """Whether type `found` can be turned into `kind` without a loss (for floats: if the values are whole, which `convert` checks)."""
    if pa.types.is_dictionary(found):
        return fits(found.value_type, kind)
    if pa.types.is_null(found):
        return True
    text = is_text(found)
    whole, number = pa.types.is_integer(found), pa.types.is_floating(found) or pa.types.is_decimal(found)
    if kind == "text":
        return text or whole or number
    if kind == "time":
        return whole or number or pa.types.is_timestamp(found) or pa.types.is_date(found)
    if kind == "texts":
        return (pa.types.is_list(found) or pa.types.is_large_list(found)) and fits(found.value_type, "text")
    if kind == "bytes":
        return pa.types.is_binary(found) or pa.types.is_large_binary(found) or pa.types.is_binary_view(found)
    return whole or number


def is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)


def convert(array: pa.Array, kind: str, file: Path, name: str) -> pa.Array:
    """`array` as the canonical type of `kind` (`fits` must hold); raises DataError where a value would change."""
    found = array.type
    try:
        if pa.types.is_dictionary(found):
            array = array.dictionary_decode()
        if kind == "time" and (pa.types.is_timestamp(found) or pa.types.is_date(found)):
            seconds = pc.floor_temporal(array.cast(pa.timestamp("us", getattr(found, "tz", None)), safe=False), unit="second")
            return seconds.cast(pa.timestamp("s", getattr(found, "tz", None)), safe=False).cast(pa.int64())
        if kind in ("text", "time", "whole") and (pa.types.is_floating(array.type) or pa.types.is_decimal(array.type)):
            array = pc.if_else(pc.is_nan(array), None, array) if pa.types.is_floating(array.type) else array
            array = array.cast(pa.int64())
        return array.cast(TYPES[kind])
    except pa.ArrowInvalid as error:
        why = str(error).splitlines()[0]
        raise DataError(
            f"{file}: column {name} has type {found}, expected {_EXPECTED[kind]}, and a value does not convert ({why})"
        ) from error


def _profile(file: Path, name: str, kind: pa.DataType) -> Column:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_floating(value) or pa.types.is_integer(value) or pa.types.is_decimal(value):
        return Column(name, "number")
    if fits(value, "text") or pa.types.is_boolean(value):
        return Column(name, "text")
    raise DataError(
        f"{file}: profile column {name} has type {kind}, expected strings, numbers or true/false; leave it out of the users table"
    )


def _parquet_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(f"{path}: no *.parquet file in this folder")
    return files


def _place(files: list[Path]) -> str:
    return str(files[0] if len(files) == 1 else files[0].parent)


class readable:
    """Turns pyarrow's errors of reading `file` into one line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (pa.ArrowException, OSError)):
            why = str(error).splitlines()[0][:200]
            raise DataError(f"{self.file}: not a readable Parquet file ({why}); write it or fetch it again") from error


class Ids:
    """String ids as whole numbers: an id's number is its place in `ids`."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._at = {value: place for place, value in enumerate(ids)}

    def __len__(self) -> int:
        return len(self._at)

    def find(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """int32 number of each value; -1 for unknown ones and nulls."""
        values, code_N = distinct(column)
        number_V = np.fromiter((self._at.get(value, -1) for value in values), np.int32, len(values))
        return np.append(number_V, np.int32(-1))[code_N]


class Names(Ids):
    """Ids that take in new values as they come."""

    def __init__(self) -> None:
        super().__init__(())

    def add(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """As `find`, but an unknown value gets the next number; nulls stay -1."""
        for value in distinct(column)[0]:
            self._at.setdefault(value, len(self._at))
        return self.find(column)

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)


def distinct(column: pa.ChunkedArray | pa.Array) -> tuple[list[str], np.ndarray]:
    """The distinct values, and for each row which one it has (a null has `len(values)`)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = array.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    return values, encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64)


def titled(items: pa.Table) -> pa.Table:
    """Items without a title are known by their item_id."""
    if "title" not in items.column_names:
        return items.append_column("title", items["item_id"])
    untitled = pc.equal(items["title"].fill_null(""), "")
    return items.set_column(items.column_names.index("title"), "title", pc.if_else(untitled, items["item_id"], items["title"]))
