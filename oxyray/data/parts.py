"""Writes the prepared events: one bucket in, one part out, users numbered on the way, statistics and the content hash gathered.

Legend: N events of the part, U users.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.data import order
from oxyray.data.prepared import EVENT_SCHEMA
from oxyray.data.tables import ACTIONS, distinct

ROW_GROUP = 131_072
_SPLITS = ("train", "valid", "test")


class Parts:
    """`scenario_rank` renumbers scenarios; `starts` are the first times of validation and test (None: leave-one-out)."""

    def __init__(self, out: Path, scenario_rank: np.ndarray, starts: tuple[int, int] | None) -> None:
        self.out, self.scenario_rank, self.starts = out, scenario_rank, starts
        self.part_users: list[int] = []
        self._users: list[pa.Table] = []
        self._requests = 0
        self._merged = 0
        self._lengths: list[np.ndarray] = []
        self._times: list[int] = []
        self._splits = np.zeros(len(_SPLITS), np.int64)
        self._table = np.zeros((len(scenario_rank), len(ACTIONS)), np.int64)
        self._seen = np.zeros((len(scenario_rank), 0), np.int64)
        self._hash = hashlib.sha256()
        (out / "events").mkdir()

    def add(self, rows: pa.Table, users: pa.Table) -> None:
        """`rows` in `buckets.SCHEMA`; `users`: the rows of the users table that belong to this bucket."""
        first_user = sum(table.num_rows for table in self._users)
        ids = pc.unique(pa.chunked_array([*rows["user_id"].chunks, *users["user_id"].chunks], pa.large_string()))
        ids = ids.take(pc.sort_indices(ids))
        columns = self._ordered(rows, pc.index_in(rows["user_id"].combine_chunks(), value_set=ids).to_numpy().astype(np.int32))
        length_U = np.bincount(columns["user"], minlength=len(ids))
        columns["user"] = (columns["user"] + first_user).astype(np.int32)
        columns["request"] += self._requests
        self._requests = int(columns["request"].max(initial=self._requests - 1)) + 1
        arrays = [columns[field.name] for field in EVENT_SCHEMA]
        table = pa.table([pa.array(a) if isinstance(a, np.ndarray) else a for a in arrays], schema=EVENT_SCHEMA)
        pq.write_table(table, self.out / "events" / f"part-{len(self.part_users):05d}.parquet", row_group_size=ROW_GROUP)
        self.part_users.append(first_user)
        self._users.append(pa.table({"user_id": ids}).append_column("row", pc.index_in(ids, value_set=users["user_id"].combine_chunks())))
        profile = users.drop_columns(["user_id"]).take(self._users[-1]["row"])
        self._users[-1] = pa.table([ids, *profile.columns], names=["user_id", *profile.column_names])
        self._note(columns, length_U)

    def close(self) -> None:
        pq.write_table(pa.concat_tables(self._users), self.out / "users.parquet", row_group_size=ROW_GROUP)

    def users(self) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for table in self._users for chunk in table["user_id"].chunks], pa.large_string())

    def about(self, pool_SI: np.ndarray) -> dict[str, Any]:
        """What `meta.json` says of users and events."""
        length_U = np.concatenate(self._lengths)
        real_U = length_U[length_U > 0]
        quantiles = np.quantile(real_U, [0, 0.25, 0.5, 0.75, 0.95, 1], method="inverted_cdf") if len(real_U) else []
        return {
            "users": len(length_U),
            "users_with_events": len(real_U),
            "events": int(self._splits.sum()),
            "requests": self._requests,
            "merged": self._merged,
            "part_users": self.part_users,
            "splits": dict(zip(_SPLITS, self._splits.tolist(), strict=True)),
            "scenario_actions": self._table.tolist(),
            "history_quantiles": dict(zip(("min", "p25", "p50", "p75", "p95", "max"), (int(q) for q in quantiles), strict=False)),
            "time_range": [min(self._times), max(self._times)],
            "fingerprint": self._hash.hexdigest(),
        }

    def _ordered(self, rows: pa.Table, user_N: np.ndarray) -> dict[str, Any]:
        time_N, item_N, action_N = rows["time"].to_numpy(), rows["item"].to_numpy(), rows["action"].to_numpy()
        names, named_N = distinct(rows["request_id"])
        named_N[named_N == len(names)] = -1
        request_N = order.number_requests(user_N, time_N, named_N)
        keep_N = np.flatnonzero(order.strongest(request_N, item_N, action_N))
        self._merged += len(item_N) - len(keep_N)
        keep_N = keep_N[np.lexsort((keep_N, request_N[keep_N], time_N[keep_N], user_N[keep_N]))]
        kept = rows.take(pa.array(keep_N))
        columns: dict[str, Any] = {
            "user": user_N[keep_N],
            "item": item_N[keep_N],
            "time": time_N[keep_N],
            "action": action_N[keep_N],
            "scenario": self.scenario_rank[rows["scenario"].to_numpy()[keep_N]],
            "request": request_N[keep_N],
            "trigger": rows["trigger"].to_numpy()[keep_N],
        }
        columns |= {name: kept[name] for name in ("query", "price", "quantity")}
        columns["split"] = order.leave_one_out(columns["user"]) if self.starts is None else order.by_time(columns["time"], *self.starts)
        return columns

    def _note(self, columns: dict[str, Any], length_U: np.ndarray) -> None:
        self._lengths.append(length_U)
        self._splits += np.bincount(columns["split"], minlength=len(_SPLITS))
        np.add.at(self._table, (columns["scenario"], columns["action"]), 1)
        if len(columns["time"]):
            self._times += [int(columns["time"].min()), int(columns["time"].max())]
        for name in ("user", "item", "time", "action", "scenario", "request", "trigger", "split"):
            self._hash.update(np.ascontiguousarray(columns[name]).tobytes())
