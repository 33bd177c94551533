"""CSV and Parquet files by a column mapping (`data.source=files`).

Which column of the file is which canonical one: as `data.TABLE_columns` says, else the same name, else a usual other name (`plan.py`).
What was inferred is printed before the import goes on. Cells that cannot be read put their row into the quarantine with file, line and
column; too many of them stop the import. Users are held in memory, items and events are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.config import DataConfig
from oxyray.data import tables
from oxyray.data.contract import Quarantine, first_reason
from oxyray.data.importers import text, values
from oxyray.data.importers.plan import Plan, make_plan, plain, shown
from oxyray.data.tables import TYPES, Chunk, Column
from oxyray.errors import DataError

_ROWS = 131_072
_ENDINGS = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".txt", ".txt.gz")


def write(data: DataConfig, folder: Path, quarantine: Quarantine) -> None:
    """Import items, events and, where there are files of them, users and pools into `folder`."""
    for table, found in files(data).items():
        if found:
            _import(data, table, found, folder, quarantine)


def files(data: DataConfig) -> dict[str, list[Path]]:
    """The files of each table. Raises DataError where there is none of items or of events."""
    root = Path(data.path or "").expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.path to the folder of your files")
    found = {table: _files(root, table, getattr(data, f"{table}_file", None)) for table in ("items", "users", "events", "pools")}
    for table in ("items", "events"):
        if not found[table]:
            raise DataError(
                f"{root}: no file of {table} there (looked for {table}.parquet, .csv, .tsv, also .gz); set data.{table}_file=NAME"
            )
    return found


def _files(root: Path, table: str, name: str | None) -> list[Path]:
    """`name` may hold wildcards: `logs/*.csv`."""
    if name is None:
        return [path for ending in _ENDINGS if (path := root / f"{table}{ending}").is_file()][:1]
    found = [Path(name)] if Path(name).is_absolute() else sorted(root.glob(name))
    files = [path for path in found if path.is_file()]
    if not files:
        raise DataError(f"{root / name}: no such file; see data.{table}_file")
    return files


def _import(data: DataConfig, table: str, files: list[Path], folder: Path, quarantine: Quarantine) -> None:
    chunks = (chunk for file in files for chunk in _chunks(file, None if table != "users" else 1 << 62))
    first = next(chunks, None)
    if first is None:
        raise DataError(f"{files[0]}: no rows under the header")
    header = _header(first.file)
    plan = make_plan(data, table, first.file, header, first.rows)
    print(shown(plan, first.file, header, first.rows), flush=True)
    rows = 0
    with pq.ParquetWriter(folder / f"{table}.parquet", plan.schema) as writer:
        for chunk in chain([first], chunks):
            if lost := [name for name in plan.source.values() if name not in chunk.rows.column_names]:
                raise DataError(f"{chunk.file}: column {lost[0]!r} is missing, which {first.file.name} has")
            rows += chunk.rows.num_rows
            writer.write_table(_canonical(plan, chunk, quarantine))
    quarantine.check(f"{table}_import", rows)


def _header(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        with tables.readable(file):
            return list(pq.ParquetFile(file).schema_arrow.names)
    return text.csv_header(file)[0]


def _chunks(file: Path, rows: int | None) -> Iterator[Chunk]:
    """The file's own columns; cells of CSV files as text, and `_width`: how many fields the line had."""
    if file.suffix == ".parquet":
        first = 0
        with tables.readable(file):
            batches = pq.ParquetFile(file).iter_batches(batch_size=min(rows or _ROWS, 1 << 20))
        while True:
            with tables.readable(file):
                batch = next(batches, None)
            if batch is None:
                return
            yield Chunk(pa.Table.from_batches([batch]), file, first)
            first += batch.num_rows
    header = text.csv_header(file)[0]
    for part in text.csv_rows(file, rows or _ROWS, "importing"):
        cells = [pa.array(column, pa.large_string()) for column in part.cells]
        yield Chunk(pa.table([*cells, pa.array(part.width_N)], names=[*header, "_width"]), file, 0, part.line_N)


def _canonical(plan: Plan, chunk: Chunk, quarantine: Quarantine) -> pa.Table:
    """The chunk's sound rows as canonical columns; the others go to the quarantine. A side note that cannot be read is left out alone."""
    count = chunk.rows.num_rows
    arrays: list[pa.Array] = []
    broken: dict[str, np.ndarray] = {}
    if "_width" in chunk.rows.column_names:
        width = chunk.rows.num_columns - 1
        broken[f"line has more or fewer fields than the header's {width}"] = chunk.rows["_width"].to_numpy() != width
    for column in plan.columns:
        if column.name in plan.constants:
            arrays.append(pa.repeat(pa.scalar(plan.constants[column.name], pa.large_string()), count))
            continue
        cells = plain(chunk.rows[plan.source[column.name]])
        if column.kind == "time" and plan.scale == "ISO" and pa.types.is_integer(cells.type):
            cells = cells.cast(pa.large_string())  # days, written as whole numbers
        if tables.is_text(cells.type):
            array, bad_N = values.parse(cells.cast(pa.large_string()), column.kind, plan.scale, column.name in tables.IDS)
            why = f"{column.name} is not {values.EXPECTED[column.kind]} (column {plan.source[column.name]})"
            if column.required:
                broken[why] = bad_N
            elif bad_N.any():
                quarantine.repaired[f"{plan.table}: {why}, left out"] += int(bad_N.sum())
        else:
            array = _typed(plan, column, cells, chunk.file)
        empty_N = array.is_null()
        if column.name == "action":
            array, bad_N = _actions(plan, array)
            broken[f"action is none of {', '.join(plan.words)} (column {plan.source['action']}); see data.action_names"] = bad_N
        if column.name in plan.defaults and (count_empty := pc.sum(empty_N).as_py()):
            stands = plan.defaults[column.name]
            quarantine.repaired[f"{plan.table}: {column.name} is empty, data.default_{column.name}={stands} stands for it"] += count_empty
            array = pc.if_else(empty_N, pa.scalar(stands, pa.large_string()), array)
        arrays.append(array)
    reasons = list(broken)
    reason_N = first_reason(reasons, broken, count)
    used = {canonical: chunk.rows[name] for canonical, name in plan.source.items()}
    quarantine.take(f"{plan.table}_import", Chunk(pa.table(used), chunk.file, chunk.first_row, chunk.line_N), reasons, reason_N)
    return pa.Table.from_arrays(arrays, schema=plan.schema).filter(pa.array(reason_N == 0))


def _typed(plan: Plan, column: Column, cells: pa.Array, file: Path) -> pa.Array:
    name = plan.source[column.name]
    if not tables.fits(cells.type, column.kind):
        raise DataError(
            f"{file}: column {name} has type {cells.type}, expected {values.EXPECTED.get(column.kind, column.kind)} for {column.name}"
        )
    if column.kind == "time" and pa.types.is_floating(cells.type) and plan.scale != "position":
        cells = values.rounded_down(cells)
    array = tables.convert(cells, column.kind, file, name)
    return values.to_seconds(array, plan.scale) if column.kind == "time" and pa.types.is_integer(cells.type) else array


def _actions(plan: Plan, cells: pa.Array) -> tuple[pa.Array, np.ndarray]:
    found, code_N = tables.distinct(cells)
    known = [plan.words.get(word.lower()) for word in found]
    bad_V = np.array([word is None for word in known] + [False])
    return pa.array([*known, None], TYPES["text"]).take(pa.array(code_N)), bad_V[code_N]
