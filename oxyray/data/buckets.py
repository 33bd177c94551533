"""Events on their way to parts: spread over bucket files by a hash of the user, so that each bucket fits in memory and holds whole users.

A bucket is an Arrow stream on disk; rows keep their input order.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from oxyray.data.tables import distinct

EVENTS_PER_PART = 5_000_000
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
    """Bucket files in `folder`. Add all rows, `close`, then take each bucket once."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.count = count
        self.rows = 0
        self._files = [pa.OSFile(str(self._path(b)), "wb") for b in range(count)]
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writers = [pa.ipc.new_stream(file, SCHEMA, options=options) for file in self._files]
        self._waiting: list[list[pa.Table]] = [[] for _ in range(count)]
        self._waiting_rows = [0] * count

    def add(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        self.rows += rows.num_rows
        bucket_N = bucket_of(rows["user_id"], self.count)
        order_N = np.argsort(bucket_N, kind="stable")
        ordered = rows if self.count == 1 else rows.take(pa.array(order_N))
        starts = np.searchsorted(bucket_N[order_N], np.arange(self.count + 1)).tolist()
        for bucket, (start, stop) in enumerate(pairwise(starts)):
            if stop > start:
                self._waiting[bucket].append(ordered.slice(start, stop - start))
                self._waiting_rows[bucket] += stop - start
                if self._waiting_rows[bucket] >= _FLUSH_ROWS:
                    self._flush(bucket)

    def close(self) -> None:
        for bucket in range(self.count):
            self._flush(bucket)
            self._writers[bucket].close()
            self._files[bucket].close()

    def abandon(self) -> None:
        """Let go of the files after a failure: an open one keeps its place on the disk, also when it was removed."""
        for file in self._files:
            with suppress(OSError):
                file.close()

    def take(self, bucket: int) -> pa.Table:
        """The bucket's rows in input order; its file is removed."""
        with pa.OSFile(str(self._path(bucket)), "rb") as file, pa.ipc.open_stream(file) as stream:
            rows = stream.read_all()
        self._path(bucket).unlink()
        return rows

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:05d}.arrow"

    def _flush(self, bucket: int) -> None:
        if self._waiting[bucket]:
            self._writers[bucket].write_table(pa.concat_tables(self._waiting[bucket]).combine_chunks())
            self._waiting[bucket], self._waiting_rows[bucket] = [], 0
