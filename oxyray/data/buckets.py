"""Events on their way to parts: spread over bucket files by a hash of the user, so that each bucket fits in memory and holds whole users.

A bucket is an Arrow stream on disk; rows keep their input order. Also the exact order statistics of all event times, found by counting
passes over the buckets instead of a sort in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from oxyray.data.tables import distinct

EVENTS_PER_PART = 10_000_000
_BINS = 1 << 16
_FLUSH_ROWS = 65_536

SCHEMA = pa.schema(
    [
        ("user_id", pa.large_string()),
        ("item", pa.int32()),
        ("time", pa.int64()),
        ("action", pa.int8()),
        ("scenario", pa.int16()),
        ("request_id", pa.large_string()),
        ("trigger", pa.int32()),
        ("query", pa.large_string()),
        ("price", pa.float32()),
        ("quantity", pa.int32()),
    ]
)


def bucket_of(users: pa.ChunkedArray | pa.Array, buckets: int) -> np.ndarray:
    """int64 bucket of each user id: the same on every machine and in every run."""
    if buckets == 1:
        return np.zeros(len(users), np.int64)
    values, code_N = distinct(users)
    bucket_V = np.fromiter((zlib.crc32(value.encode()) % buckets for value in values), np.int64, len(values))
    return bucket_V[code_N]


class Buckets:
    """Bucket files in `folder`. Add all rows, `close`, then read."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.count = count
        self.rows = 0
        self.first_time, self.last_time = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self._files = [pa.OSFile(str(self.path(b)), "wb") for b in range(count)]
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writers = [pa.ipc.new_stream(file, SCHEMA, options=options) for file in self._files]
        self._waiting: list[list[pa.Table]] = [[] for _ in range(count)]

    def path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:05d}.arrow"

    def add(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        time_N = rows["time"].to_numpy()
        self.rows += rows.num_rows
        self.first_time, self.last_time = min(self.first_time, int(time_N.min())), max(self.last_time, int(time_N.max()))
        bucket_N = bucket_of(rows["user_id"], self.count)
        order_N = np.argsort(bucket_N, kind="stable")
        ordered = rows if self.count == 1 else rows.take(pa.array(order_N))
        starts = np.searchsorted(bucket_N[order_N], np.arange(self.count + 1))
        for bucket in np.flatnonzero(np.diff(starts)):
            self._waiting[bucket].append(ordered.slice(starts[bucket], starts[bucket + 1] - starts[bucket]))
            if sum(part.num_rows for part in self._waiting[bucket]) >= _FLUSH_ROWS:
                self._flush(bucket)

    def close(self) -> None:
        for bucket in range(self.count):
            self._flush(bucket)
            self._writers[bucket].close()
            self._files[bucket].close()

    def read(self, bucket: int) -> pa.Table:
        with pa.memory_map(str(self.path(bucket))) as file, pa.ipc.open_stream(file) as stream:
            return stream.read_all()

    def times(self) -> Iterator[np.ndarray]:
        for bucket in range(self.count):
            with pa.memory_map(str(self.path(bucket))) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield batch.column("time").to_numpy()

    def time_at(self, rank: int) -> int:
        """The time of the event with 0-based `rank` in time order."""
        low, high = self.first_time, self.last_time
        while low < high:
            width = (high - low) // _BINS + 1
            count_B = np.zeros(_BINS, np.int64)
            below = 0
            for time_N in self.times():
                below += int((time_N < low).sum())
                inside_N = time_N[(time_N >= low) & (time_N <= high)]
                count_B += np.bincount((inside_N - low) // width, minlength=_BINS)
            bin_ = int(np.searchsorted(np.cumsum(count_B) + below, rank, side="right"))
            low, high = low + bin_ * width, min(high, low + (bin_ + 1) * width - 1)
        return low

    def _flush(self, bucket: int) -> None:
        if self._waiting[bucket]:
            self._writers[bucket].write_table(pa.concat_tables(self._waiting[bucket]).combine_chunks())
            self._waiting[bucket] = []
