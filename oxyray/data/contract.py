"""Row rules of the canonical tables, and the quarantine for rows that break them.

What is done with a row: a broken key (user, item, time, action, scenario) quarantines it, since it cannot be a training example; a broken
side note (an unknown trigger item, an item's missing title) is left out and the row stays (`repaired` counts these). A user that the users
table does not know is allowed: the profile is unknown. More than `data.max_bad_share` of a table's rows in quarantine stops the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.data.tables import ACTIONS, Chunk, Ids, distinct
from oxyray.errors import DataError


class Quarantine:
    """Collects broken rows as `FOLDER/TABLE.parquet`: the columns, `reason`, and the `file` and 1-based `row` (in text files: line)."""

    def __init__(self, folder: Path, max_share: float) -> None:
        self.folder = folder
        self.max_share = max_share
        self.moves: tuple[Path, Path] | None = None  # a folder that is being written, and where it will stand
        self.counts: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self._table_bad: Counter[str] = Counter()
        self._table_reasons: dict[str, Counter[str]] = {}
        self._example: dict[str, str] = {}
        self._writers: dict[str, pq.ParquetWriter] = {}

    def take(self, table: str, chunk: Chunk, reasons: list[str], reason_N: np.ndarray) -> None:
        """Keep the rows whose `reason_N` is above 0; `reasons[reason - 1]` says why."""
        place_N = np.flatnonzero(reason_N)
        if not len(place_N):
            return
        told, file = [reasons[code - 1] for code in reason_N[place_N]], self._named(chunk.file)
        rows = chunk.rows.take(pa.array(place_N))
        rows = rows.append_column("reason", pa.array(told)).append_column("file", pa.array([str(file)] * len(told)))
        rows = rows.append_column("row", pa.array(place_N + chunk.first_row + 1 if chunk.line_N is None else chunk.line_N[place_N]))
        if table not in self._example:
            first = rows.slice(0, 1).to_pylist()[0]
            value = first.get(told[0].split(" ")[0])
            where = f"{file} {'row' if chunk.line_N is None else 'line'} {first['row']}"
            self._example[table] = f"first: {where}, {told[0]}" + ("" if value is None else f": {value!r}"[:100])
        self._writer(table, rows.schema).write_table(rows)
        count = Counter(told)
        self.counts.update({f"{table}: {why}": n for why, n in count.items()})
        self._table_reasons.setdefault(table, Counter()).update(count)
        self._table_bad[table] += len(told)

    def _named(self, file: Path) -> Path:
        if self.moves and file.is_relative_to(self.moves[0]):
            return self.moves[1] / file.relative_to(self.moves[0])
        return file

    def check(self, table: str, rows: int) -> None:
        """Raises DataError when the table, of `rows` rows in all, has more broken ones than allowed."""
        bad = self._table_bad[table]
        if bad > self.max_share * rows:
            why = ", ".join(f"{n} × {reason}" for reason, n in self._table_reasons[table].most_common())
            raise DataError(
                f"{table}: {bad} of {rows} rows break the contract, more than data.max_bad_share={self.max_share:g} allows "
                f"({why}; {self._example[table]}); mend the table, or raise data.max_bad_share to go on without them"
            )

    def _writer(self, table: str, schema: pa.Schema) -> pq.ParquetWriter:
        """One file for each table; another one where the files of a table differ in their columns' types."""
        name = table
        while name in self._writers and self._writers[name].schema != schema:
            name += "_"
        if name not in self._writers:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writers[name] = pq.ParquetWriter(self.folder / f"{name}.parquet", schema)
        return self._writers[name]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


@dataclass(frozen=True)
class Events:
    """The sound rows of a chunk of events, ids turned into numbers (scenario and user stay text here)."""

    rows: pa.Table
    item_N: np.ndarray
    action_N: np.ndarray
    trigger_N: np.ndarray


EVENT_REASONS = [
    "user_id is missing",
    "item_id is missing",
    "item_id is unknown",
    "event_time is missing",
    "event_time is negative",
    "event_time lies in the future",
    "event_time lies far in the future (are these milliseconds? seconds are expected)",
    "action is missing",
    "action is unknown",
    "scenario is missing",
    "quantity is below 1",
    "price is below 0",
]


def sound_events(chunk: Chunk, items: Ids, latest: int | None, quarantine: Quarantine) -> Events:
    """Send broken rows to the quarantine, return the others. `latest` is the last allowed time (None: positions, not times)."""
    rows = chunk.rows
    item_N, action_N = items.find(rows["item_id"]), Ids(ACTIONS).find(rows["action"])
    time = rows["event_time"]
    time_N = time.fill_null(0).to_numpy()
    last = np.iinfo(np.int64).max // 100 if latest is None else latest
    broken = {
        "user_id is missing": _missing(rows["user_id"]),
        "item_id is missing": _missing(rows["item_id"]),
        "item_id is unknown": item_N < 0,
        "event_time is missing": time.is_null().to_numpy(),
        "event_time is negative": time_N < 0,
        EVENT_REASONS[5]: (time_N > last) & (time_N <= 100 * last),
        EVENT_REASONS[6]: time_N > 100 * last,
        "action is missing": _missing(rows["action"]),
        "action is unknown": action_N < 0,
        "scenario is missing": _missing(rows["scenario"]),
    }
    if "quantity" in rows.column_names:
        broken["quantity is below 1"] = pc.less(rows["quantity"], 1).fill_null(False).to_numpy()
    if "price" in rows.column_names:
        broken["price is below 0"] = pc.less(rows["price"], 0).fill_null(False).to_numpy()
    reason_N = first_reason(EVENT_REASONS, broken, rows.num_rows)
    quarantine.take("events", chunk, EVENT_REASONS, reason_N)
    sound_N = reason_N == 0
    trigger_N = np.full(rows.num_rows, -1, np.int32)
    if "trigger_item_id" in rows.column_names:
        trigger_N = items.find(rows["trigger_item_id"])
        lost = int((~_missing(rows["trigger_item_id"]) & (trigger_N < 0) & sound_N).sum())
        quarantine.repaired.update({"events: trigger_item_id is unknown, the trigger was left out": lost} if lost else {})
    kept = rows if sound_N.all() else rows.filter(pa.array(sound_N))
    return Events(kept, item_N[sound_N], action_N[sound_N].astype(np.int8), trigger_N[sound_N])


def sound_rows(name: str, chunk: Chunk, quarantine: Quarantine) -> pa.Table:
    """Items or users (the whole table in one chunk) without missing and repeated ids; of a repeated id the first row stays."""
    key = {"items": "item_id", "users": "user_id"}[name]
    column = chunk.rows[key]
    _, code_N = distinct(column)
    repeated_N = np.ones(len(code_N), bool)
    repeated_N[np.unique(code_N, return_index=True)[1]] = False
    reasons = [f"{key} is missing", f"{key} is repeated"]
    reason_N = first_reason(reasons, {reasons[0]: _missing(column), reasons[1]: repeated_N}, len(code_N))
    quarantine.take(name, chunk, reasons, reason_N)
    return chunk.rows.filter(pa.array(reason_N == 0))


def first_reason(reasons: list[str], broken: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """int8 per row: 1 + the place of the first reason that holds, 0 for a sound row."""
    reason_N = np.zeros(rows, np.int8)
    for place, reason in enumerate(reasons):
        if reason in broken:
            reason_N[(reason_N == 0) & broken[reason]] = place + 1
    return reason_N


def _missing(column: pa.ChunkedArray) -> np.ndarray:
    return pc.equal(column.fill_null(""), "").to_numpy()
