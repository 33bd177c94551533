"""Between buckets and parts: each bucket's events are put in order once ("settled"); then the questions that need all events are asked in
passes over the settled files, mapped into memory a few columns at a time: which items and users have enough events (`core_items`), and when
validation and test begin (`split_starts`).

Legend: N events of a bucket, U its users, I items.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oxyray.data import order
from oxyray.data.tables import distinct

SCHEMA = pa.schema(
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
    ]
)


class Settled:
    """Settled buckets in `folder`: rows by (user, time, request), users numbered from 0 within the bucket in the order of their ids."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.merged = 0
        self.users: list[pa.Array] = []
        self._alive_I: np.ndarray | None = None
        self._core = 0

    def add(self, rows: pa.Table) -> None:
        """Settle the next bucket, rows in `buckets.SCHEMA`."""
        user_ids = pc.unique(rows["user_id"])
        user_ids = user_ids.take(pc.sort_indices(user_ids))
        user_N = pc.index_in(rows["user_id"], value_set=user_ids).to_numpy().astype(np.int32)
        time_N, item_N = rows["time"].to_numpy(), rows["item"].to_numpy()
        names, named_N = distinct(rows["request_id"])
        named_N[named_N == len(names)] = -1
        request_N = order.number_requests(user_N, time_N, item_N, named_N)
        asked_N = order.asked(request_N, time_N)
        keep_N = np.flatnonzero(order.strongest(request_N, item_N, rows["action"].to_numpy()))
        keep_N = keep_N[np.lexsort((keep_N, request_N[keep_N], time_N[keep_N], user_N[keep_N]))]
        self.merged += rows.num_rows - len(keep_N)
        kept = rows.drop_columns(["user_id", "request_id"]).take(pa.array(keep_N))
        numbers = {"user": user_N, "request": request_N, "asked": asked_N}
        for name, value_N in numbers.items():
            kept = kept.append_column(name, pa.array(value_N[keep_N]))
        kept = kept.select(SCHEMA.names)
        with pa.OSFile(str(self._path(len(self.users))), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(kept.combine_chunks())
        self.users.append(user_ids)

    def take(self, bucket: int) -> tuple[pa.Table, pa.Array]:
        """The bucket's remaining rows, and the ids of their users, which number them from 0 without gaps."""
        rows = self._read(bucket)
        user_N = rows["user"].to_numpy()
        alive_N, alive_U = self._alive(bucket, user_N, rows["item"].to_numpy())
        if not alive_N.all():
            number_U = (np.cumsum(alive_U) - 1).astype(np.int32)
            rows = rows.set_column(0, SCHEMA.field("user"), pa.array(number_U[user_N])).filter(pa.array(alive_N))
        return rows, self.users[bucket].filter(pa.array(alive_U))

    def core_items(self, items: int, core: int) -> np.ndarray:
        """Keep users and items with at least `core` events, again and again until all that are left have them; bool_I of the items left."""
        self._core, self._alive_I = core, np.ones(items, bool)
        while True:
            count_I = np.zeros(items, np.int64)
            for bucket in range(len(self.users)):
                columns = self._read(bucket, ["user", "item"])
                user_N, item_N = columns["user"].to_numpy(), columns["item"].to_numpy()
                count_I += np.bincount(item_N[self._alive(bucket, user_N, item_N)[0]], minlength=items)
            enough_I = count_I >= core
            if (enough_I == self._alive_I).all():
                return enough_I
            self._alive_I = enough_I

    def split_starts(self, valid_share: float, test_share: float) -> tuple[int, int]:
        """First time of validation and of test: quantiles of the remaining events' times."""
        rows, low, high = 0, np.iinfo(np.int64).max, np.iinfo(np.int64).min
        for time_N in self._times():
            rows += len(time_N)
            low, high = min(low, int(time_N.min(initial=low))), max(high, int(time_N.max(initial=high)))
        if not rows:
            return 0, 0
        test = min(rows - 1, round(rows * (1 - test_share)))
        valid = min(test, round(rows * (1 - test_share - valid_share)))
        return order.nth_time(self._times, valid, low, high), order.nth_time(self._times, test, low, high)

    def _times(self) -> Iterator[np.ndarray]:
        for bucket in range(len(self.users)):
            columns = self._read(bucket, ["user", "item", "time"])
            alive_N, _ = self._alive(bucket, columns["user"].to_numpy(), columns["item"].to_numpy())
            yield columns["time"].to_numpy()[alive_N]

    def _alive(self, bucket: int, user_N: np.ndarray, item_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool_N of rows and bool_U of users that remain. A user remains with `core` events on remaining items: at the end of `core_items`
        this is the k-core, since a user that fell out earlier had too few events on a larger set of items."""
        if self._alive_I is None:
            return np.ones(len(user_N), bool), np.ones(len(self.users[bucket]), bool)
        sold_N = self._alive_I[item_N]
        alive_U = np.bincount(user_N[sold_N], minlength=len(self.users[bucket])) >= self._core
        return sold_N & alive_U[user_N], alive_U

    def _read(self, bucket: int, columns: list[str] | None = None) -> pa.Table:
        options = pa.ipc.IpcReadOptions(
            included_fields=None if columns is None else sorted(SCHEMA.get_field_index(name) for name in columns)
        )
        with pa.memory_map(str(self._path(bucket))) as file, pa.ipc.open_file(file, options=options) as reader:
            return reader.read_all()

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:05d}.arrow"
