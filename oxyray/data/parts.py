"""Writes the prepared events: one settled bucket in, one part out, users and items numbered for good, statistics and the content hash
gathered.

Legend: N events of the part, U users, S scenarios, A actions.
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
from oxyray.data.tables import ACTIONS

ROW_GROUP = 131_072


class Parts:
    """`item_number` and `scenario_number` turn the numbers of settled rows into final ones (-1: gone); `pool_SI` is in final numbers;
    `starts` are the first times of validation and test (None: leave-one-out)."""

    def __init__(
        self, out: Path, item_number: np.ndarray, scenario_number: np.ndarray, pool_SI: np.ndarray, starts: tuple[int, int] | None
    ) -> None:
        self.out, self.pool_SI, self.starts = out, pool_SI, starts
        self.item_number, self.scenario_number = np.append(item_number, -1).astype(np.int32), scenario_number.astype(np.int16)
        self.part_users: list[int] = []
        self._users: list[pa.Table] = []
        self._user_count = 0
        self._requests = 0
        self._outside_pool = 0
        self._lengths: list[np.ndarray] = []
        self._times: list[int] = []
        self._splits = np.zeros(len(order.SPLITS), np.int64)
        self._table_SA = np.zeros((len(scenario_number), len(ACTIONS)), np.int64)
        self._hash = hashlib.sha256()
        (out / "events").mkdir()

    def add(self, rows: pa.Table, user_ids: pa.Array, users: pa.Table) -> None:
        """`rows` in `settle.SCHEMA`, their users numbered by `user_ids`; `users`: the rows of the users table to write with this part."""
        ids = pc.unique(pa.chunked_array([user_ids, *users["user_id"].chunks], pa.large_string()))
        ids = ids.take(pc.sort_indices(ids))
        user_N = pc.index_in(user_ids, value_set=ids).to_numpy()[rows["user"].to_numpy()]
        length_U = np.bincount(user_N, minlength=len(ids))
        columns: dict[str, Any] = {
            "user": (user_N + self._user_count).astype(np.int32),
            "item": self.item_number[rows["item"].to_numpy()],
            "time": rows["time"].to_numpy(),
            "action": rows["action"].to_numpy(),
            "scenario": self.scenario_number[rows["scenario"].to_numpy()],
            "request": np.unique(rows["request"].to_numpy(), return_inverse=True)[1] + self._requests,
            "asked": rows["asked"].to_numpy(),
            "trigger": self.item_number[rows["trigger"].to_numpy()],
        }
        columns["split"] = (
            order.leave_one_out(columns["user"], columns["request"])
            if self.starts is None
            else order.by_time(columns["time"], *self.starts)
        )
        columns |= {name: rows[name] for name in ("query", "price", "quantity")}
        table = pa.table({field.name: columns[field.name] for field in EVENT_SCHEMA}, schema=EVENT_SCHEMA)
        pq.write_table(table, self.out / "events" / f"part-{len(self.part_users):05d}.parquet", row_group_size=ROW_GROUP)
        profile = users.drop_columns(["user_id"]).take(pc.index_in(ids, value_set=users["user_id"].combine_chunks()))
        self._users.append(pa.table([ids, *profile.columns], names=["user_id", *profile.column_names]))
        self.part_users.append(self._user_count)
        self._user_count += len(ids)
        self._note(columns, length_U)
        self.sign(table)

    def close(self) -> pa.ChunkedArray:
        """Write the users; returns their ids in order."""
        users = pa.concat_tables(self._users)
        pq.write_table(users, self.out / "users.parquet", row_group_size=ROW_GROUP)
        return users["user_id"]

    def sign(self, *contents: np.ndarray | pa.Table | Path) -> None:
        """Let the fingerprint depend on these too."""
        for content in contents:
            if isinstance(content, pa.Table):
                for batch in content.combine_chunks().to_batches():
                    self._hash.update(batch.serialize())
            elif isinstance(content, Path):
                with open(content, "rb") as file:
                    self._hash.update(hashlib.file_digest(file, "sha256").digest())
            else:
                self._hash.update(np.ascontiguousarray(content).tobytes())

    def about(self) -> dict[str, Any]:
        """What `meta.json` says of users and events."""
        length_U = np.concatenate(self._lengths)
        length_U = length_U[length_U > 0]
        names, shares = ("min", "p25", "p50", "p75", "p95", "max"), (0, 0.25, 0.5, 0.75, 0.95, 1)
        quantiles = np.quantile(length_U, shares, method="inverted_cdf").tolist() if len(length_U) else []
        return {
            "users": self._user_count,
            "users_with_events": len(length_U),
            "events": int(self._splits.sum()),
            "requests": self._requests,
            "outside_pool": self._outside_pool,
            "parts": len(self.part_users),
            "part_users": self.part_users,
            "splits": dict(zip(order.SPLITS, self._splits.tolist(), strict=True)),
            "scenario_actions": self._table_SA.tolist(),
            "history_quantiles": dict(zip(names, quantiles, strict=False)),
            "time_range": [min(self._times, default=0), max(self._times, default=0)],
            "fingerprint": self._hash.hexdigest(),
        }

    def _note(self, columns: dict[str, Any], length_U: np.ndarray) -> None:
        self._lengths.append(length_U)
        self._splits += np.bincount(columns["split"], minlength=len(order.SPLITS))
        np.add.at(self._table_SA, (columns["scenario"], columns["action"]), 1)
        self._outside_pool += int((~self.pool_SI[columns["scenario"], columns["item"]]).sum())
        if len(columns["time"]):
            self._times += [int(columns["time"].min()), int(columns["time"].max())]
            self._requests = int(columns["request"].max()) + 1
