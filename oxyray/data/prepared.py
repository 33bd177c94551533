"""The prepared form of a shop's tables (`RUN/data`), read back: what every later stage reads.

Items and users are numbered by their row in `items.parquet` and `users.parquet`; events lie in parts, each user wholly in one, sorted by
(user, time, request). Legend: I items, U users, C side features, P profile features, N events of a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.errors import DataError, RunError
from oxyray.files import read_json

FORMAT = 2
EVENT_SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("time", pa.int64()),
        ("action", pa.int8()),
        ("scenario", pa.int16()),
        ("request", pa.int64()),
        ("asked", pa.int64()),
        ("trigger", pa.int32()),
        ("query", pa.large_string()),
        ("price", pa.float32()),
        ("quantity", pa.int32()),
        ("split", pa.int8()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What `meta.json` says. `side` and `profile` give each feature's name and size (its codes lie in 0..size-1, 0 unknown); `users` counts
    all known ones, `users_with_events` those with a history; `part_users` is the first user of each part; `fingerprint` changes with any
    prepared event, item, feature, pool or exposure."""

    format: int
    name: str
    time_unit: str
    split: str
    actions: list[str]
    scenarios: list[str]
    items: int
    users: int
    users_with_events: int
    events: int
    requests: int
    merged: int
    side: list[dict[str, Any]]
    profile: list[dict[str, Any]]
    valid_start: int | None
    test_start: int | None
    parts: int
    part_users: list[int]
    splits: dict[str, int]
    scenario_actions: list[list[int]]
    history_quantiles: dict[str, int]
    time_range: list[int]
    outside_pool: int
    quarantined: dict[str, int]
    repaired: dict[str, int]
    ignored_columns: list[str]
    fingerprint: str


class Prepared:
    """Read with `Prepared.load(RUN/data)`; raises RunError when a file is missing or damaged."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder = folder
        self.meta = meta
        self.query_texts: pa.Array | None = None  # where they are known, events say which of them they have
        with _arrays(folder / "side.npz") as side:
            self.side_IC: np.ndarray = side["side_IC"]
            self.profile_UP: np.ndarray = side["profile_UP"]

    @classmethod
    def load(cls, folder: str | Path) -> Prepared:
        folder = Path(folder)
        values = read_json(folder / "meta.json")
        if values.get("format") != FORMAT or set(values) != {field.name for field in dataclasses.fields(Meta)}:
            raise RunError(f"{folder} was written by another version of OxyRay: run `oxyray prepare` again")
        prepared = cls(folder, Meta(**values))
        rows, said = (len(prepared.side_IC), len(prepared.profile_UP)), (values["items"], values["users"])
        if rows != said:
            raise RunError(f"{folder}/side.npz holds {rows} items and users, meta.json {said}: run `oxyray prepare` again")
        return prepared

    @property
    def parts(self) -> int:
        return self.meta.parts

    @cached_property
    def items(self) -> pa.Table:
        """All columns, with descriptions and pictures: for many items much memory. `item_columns` reads less."""
        return self._table("items.parquet")

    def item_columns(self, *names: str) -> pa.Table:
        """Those of the named columns that the items have."""
        return self._table("items.parquet", [name for name in names if name in self._item_names])

    @cached_property
    def item_ids(self) -> pa.ChunkedArray:
        return self._table("items.parquet", ["item_id"])["item_id"]

    @cached_property
    def user_ids(self) -> pa.ChunkedArray:
        return self._table("users.parquet", ["user_id"])["user_id"]

    @cached_property
    def _item_names(self) -> list[str]:
        with self._readable("items.parquet") as path:
            return list(pq.read_schema(path).names)

    @cached_property
    def users(self) -> pa.Table:
        return self._table("users.parquet")

    @cached_property
    def pools(self) -> dict[str, np.ndarray]:
        """bool per item for each scenario: the items that may be recommended there."""
        with _arrays(self.folder / "pools.npz") as file:
            return dict(zip(self.meta.scenarios, file["pool_SI"], strict=True))

    def events(self, part: int, columns: list[str] | None = None) -> dict[str, np.ndarray]:
        """One part's columns (all of `EVENT_SCHEMA`, or the named ones). `query` holds strings or None; no price is NaN, no quantity 0.
        With `query_texts` known, `query_row` says which of them an event has (-1: none)."""
        return self._columns(self._table(self._part(part), columns))

    def query_column(self, part: int) -> pa.ChunkedArray:
        """The query text of each event of a part, null where there is none."""
        return self._table(self._part(part), ["query"])["query"]

    @property
    def exposures(self) -> Path | None:
        """The shop's log of exposures; None where it has none, or none that can be used: pages are split by time."""
        file = self.folder / "exposures.parquet"
        return file if file.is_file() else None

    def user_events(self, user: int) -> dict[str, np.ndarray]:
        """All events of one user, in time order, whatever their split; without `query_row`."""
        if not 0 <= user < self.meta.users:
            raise DataError(f"user index {user} is out of range: {self.folder} has {self.meta.users} users")
        part = int(np.searchsorted(self.meta.part_users, user, side="right")) - 1
        return self._columns(self._table(self._part(part), filters=pc.field("user") == user), numbered=False)

    @cached_property
    def _train_counts_I(self) -> np.ndarray:
        count_I = np.zeros(self.meta.items, np.int64)
        for part in range(self.parts):
            rows = self.events(part, ["item", "split"])
            count_I += np.bincount(rows["item"][rows["split"] == 0], minlength=len(count_I))
        return count_I

    def train_counts_I(self) -> np.ndarray:
        """int64: training events of each item."""
        return self._train_counts_I

    def item_index(self, item_id: str) -> int:
        return self._index(self.item_ids, item_id, "item")

    def user_index(self, user_id: str) -> int:
        return self._index(self.user_ids, user_id, "user")

    def _index(self, column: pa.ChunkedArray, value: str, what: str) -> int:
        place = pc.index(column, pa.scalar(str(value), pa.large_string())).as_py()
        if place < 0:
            known = ", ".join(column.slice(0, 3).to_pylist())
            raise DataError(f"{what} {value!r} is not in {self.folder} (known are {known}, …)")
        return int(place)

    def _part(self, part: int) -> str:
        if not 0 <= part < self.parts:
            raise RunError(f"{self.folder} has parts 0..{self.parts - 1}, not {part}")
        return f"events/part-{part:05d}.parquet"

    def _columns(self, table: pa.Table, numbered: bool = True) -> dict[str, np.ndarray]:
        columns = {}
        for name in table.column_names:
            column = table[name].fill_null(0) if name == "quantity" else table[name]
            columns[name] = column.to_numpy()
        if numbered and self.query_texts is not None and "query" in columns:
            row = pc.index_in(table["query"], value_set=self.query_texts, skip_nulls=True)
            columns["query_row"] = row.fill_null(-1).to_numpy().astype(np.int64)
        return columns

    def _table(self, name: str, columns: list[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
        with self._readable(name) as path:
            return pq.read_table(path, columns=columns, filters=filters)

    @contextmanager
    def _readable(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        try:
            yield path
        except FileNotFoundError:
            raise RunError(f"{path} is missing: run `oxyray prepare` again") from None
        except (pa.ArrowException, OSError) as error:
            raise RunError(f"{path} is damaged ({str(error).splitlines()[0]}): run `oxyray prepare` again") from error


def _arrays(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: run `oxyray prepare` again") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): run `oxyray prepare` again") from error
