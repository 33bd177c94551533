"""Publication of sparse tables on a node: learners write, everybody else on the node reads, without a copy of the table on the way.

A published table is a file in shared memory, apart from the table that trains: it changes only when a version is published, by the rows
that were touched since the version before, so its rows always belong to the dense weights of the same version. A sequence lock fences it:
the writer makes the sequence odd, writes, makes it even again; a reader that met an odd or a changed sequence reads again. Each learner
publishes its own shard; a reader takes rows only while all shards stand at one version. Where learners are spread over nodes, a node holds
a part of the shards only, and `oxyray.cluster.rows` puts the parts together.

Files: `NAME.RANK.rows`, float32 (rows, D), and `NAME.RANK.head`, int64: sequence, version, first row, rows, D, the writer's process id.

Legend: N rows asked for, T touched rows, D row width, S shards, R rows of a shard.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from oxyray.errors import ClusterError

Array = np.ndarray

_SEQUENCE, _VERSION, _FIRST, _ROWS, _WIDTH, _PID, _FIELDS = 0, 1, 2, 3, 4, 5, 8
_PAUSE = 2e-4
_AT_ONCE = 1024  # rows
_THREADS = min(4, len(os.sched_getaffinity(0)))


class Unsettled(ClusterError):
    """The shards of a table came to no common version in time."""


class Reader(Protocol):
    """Rows (N, D) of a published table, and the one version that all of them belong to."""

    def read(self, ids_N: Array, seconds: float = 30.0) -> tuple[Array, int]: ...


Open = Callable[[Path, str], Reader]  # of a folder and a table's name


class PublishedShard:
    """The writer's side of one shard: rows `first ... first + rows - 1` of the table `name`, all zeros at version -1 until published."""

    def __init__(self, folder: Path, name: str, rank: int, first: int, rows: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.first = first
        self._files = [folder / f"{name}.{rank}.{part}" for part in ("rows", "head")]
        self._row_RD = _reserved(self._files[0], rows, width) if rows else np.empty((0, width), np.float32)
        self._head = np.memmap(self._files[1], np.int64, "w+", shape=(_FIELDS,))
        self._head[:] = [0, -1, first, rows, width, os.getpid(), 0, 0]

    @property
    def version(self) -> int:
        return int(self._head[_VERSION])

    def publish(self, version: int, touched_T: Array, row_TD: Array) -> None:
        """Make `row_TD` the rows `touched_T` (numbers within the shard) of `version`, which must rise. Readers wait for the length of the
        copy; should the copy fail, the shard stays closed, since it would be torn."""
        self._begin(version)
        self._row_RD[touched_T] = row_TD
        self._end(version)

    def publish_from(self, version: int, touched_T: Array, table_RD: Array) -> None:
        """As `publish`, with rows straight from a table of the shard's shape: by so few at a time that they pass through the processor's
        cache, and by several threads, since nobody else works while a version is published. Quickest where `touched_T` rises."""
        shape = self._row_RD.shape
        if table_RD.shape != shape or table_RD.dtype != np.float32 or not table_RD.flags.c_contiguous:
            raise ClusterError(f"{self._files[0].name}: rows come from a float32 table {shape} in one piece, not {table_RD.shape}")
        from_R, to_R = _rows(table_RD), _rows(self._row_RD)

        def copy(rows: Array) -> None:
            for first in range(0, len(rows), _AT_ONCE):
                some = rows[first : first + _AT_ONCE]
                to_R[some] = from_R[some]

        self._begin(version)
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in threads.map(copy, np.array_split(touched_T, min(_THREADS, len(touched_T) // _AT_ONCE + 1))):
                pass
        self._end(version)

    def _begin(self, version: int) -> None:
        if version <= self.version:
            raise ClusterError(f"{self._files[0].name}: version {version} cannot follow version {self.version}: versions only rise")
        self._head[_SEQUENCE] += 1

    def _end(self, version: int) -> None:
        self._head[_VERSION] = version
        self._head[_SEQUENCE] += 1

    def close(self) -> None:
        """Take the files away; readers that have them open keep what they see."""
        for file in self._files:
            file.unlink(missing_ok=True)


class TableReader:
    """The reader's side of the shards in one folder. Opening maps them, which takes the same short time at any size.

    Raises ClusterError when there is no shard, or when the shards leave rows out of the table and `whole` asks for all of it.
    """

    def __init__(self, folder: Path, name: str, whole: bool = True) -> None:
        files = sorted(folder.glob(f"{name}.*.head"), key=lambda file: int(file.name.split(".")[-2]))
        if not files:
            raise ClusterError(f"{folder} holds no shard of table {name}: is this the learners' node, and have they started?")
        self.name = name
        self._head_S = [np.memmap(file, np.int64, "r", shape=(_FIELDS,)) for file in files]
        self.ranges = [(int(head[_FIRST]), int(head[_FIRST] + head[_ROWS])) for head in self._head_S]
        self._first_S, self._end_S = np.array(self.ranges, dtype=np.int64).T
        self._solid = solid(self.ranges)
        if whole and not (self._solid and self._first_S[0] == 0):
            rows_S = [end - first for first, end in self.ranges]
            raise ClusterError(
                f"the shards of table {name} in {folder} start at rows {self._first_S.tolist()} but hold {rows_S} rows: one is missing"
            )
        self.width = int(self._head_S[0][_WIDTH])
        self._row_SRD = [
            _mapped(file.with_suffix(".rows"), end - first, self.width) for file, (first, end) in zip(files, self.ranges, strict=True)
        ]

    def __len__(self) -> int:
        return sum(end - first for first, end in self.ranges)

    def read(self, ids_N: Array, seconds: float = 30.0) -> tuple[Array, int]:
        """Rows (N, D) and the version that all of them belong to. Raises ClusterError for ids that no shard holds, Unsettled when no
        version stood still within `seconds`."""
        if len(ids_N) and not self._holds(ids_N):
            raise ClusterError(f"table {self.name} has rows {told(self.ranges)}, asked were {ids_N.min()} to {ids_N.max()}")
        until = time.monotonic() + seconds
        while True:
            before_S = self._stand()
            if before_S is not None:
                row_ND = self._gather(ids_N)
                if self._stand() == before_S:
                    return row_ND, before_S[0][1]
            if time.monotonic() > until:
                said = ", ".join(f"{int(h[_VERSION])}{'' if h[_SEQUENCE] % 2 == 0 else ' and writing'}" for h in self._head_S)
                who = ", ".join(str(int(head[_PID])) for head in self._head_S)
                raise Unsettled(
                    f"table {self.name}: its shards came to no common version within {seconds:g} s (they stand at {said}): "
                    f"look at the learners (processes {who})"
                )
            time.sleep(_PAUSE)

    def _stand(self) -> list[tuple[int, int]] | None:
        """Sequence and version of each shard; None while one is being written or they differ in version."""
        stand_S = [(int(head[_SEQUENCE]), int(head[_VERSION])) for head in self._head_S]
        still = all(sequence % 2 == 0 for sequence, _ in stand_S) and len({version for _, version in stand_S}) == 1
        return stand_S if still else None

    def _holds(self, ids_N: Array) -> bool:
        between = bool(ids_N.min() >= self._first_S[0] and ids_N.max() < self._end_S[-1])
        return between and (self._solid or bool((located(self.ranges, ids_N) >= 0).all()))

    def _gather(self, ids_N: Array) -> Array:
        if len(self._row_SRD) == 1:
            first = int(self._first_S[0])
            return self._row_SRD[0][ids_N - first if first else ids_N]
        shard_N = np.searchsorted(self._end_S, ids_N, side="right")
        row_ND = np.empty((len(ids_N), self.width), dtype=np.float32)
        for shard, row_RD in enumerate(self._row_SRD):
            mine_N = np.flatnonzero(shard_N == shard)
            row_ND[mine_N] = row_RD[ids_N[mine_N] - self._first_S[shard]]
        return row_ND


def located(ranges: Sequence[tuple[int, int]], ids_N: Array) -> Array:
    """Which range (first row, end) holds each id, -1 where none does. Ranges rise and do not overlap."""
    first_S, end_S = np.array([*ranges, (np.iinfo(np.int64).max,) * 2], dtype=np.int64).T
    found_N = np.searchsorted(end_S, ids_N, side="right")
    return np.where(ids_N >= first_S[found_N], found_N, -1)


def solid(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether each range begins where the one before ends."""
    return all(end == first for (_, end), (first, _) in pairwise(ranges))


def told(ranges: Sequence[tuple[int, int]]) -> str:
    """The rows of these ranges, neighbours joined: `0 to 7, 12 to 15`."""
    runs: list[list[int]] = []
    for first, end in ranges:
        if runs and runs[-1][1] == first:
            runs[-1][1] = end
        elif end > first:
            runs.append([first, end])
    return ", ".join(f"{first} to {end - 1}" for first, end in runs) or "none"


def clear_dead(folder: Path) -> list[str]:
    """Remove shards whose writer is gone (a killed run leaves them in memory); gives their names."""
    gone = []
    for file in sorted(folder.glob("*.head")) if folder.is_dir() else []:
        head = np.fromfile(file, np.int64, _FIELDS)
        if len(head) < _FIELDS or not Path(f"/proc/{int(head[_PID])}").exists():
            gone.append(file.name.removesuffix(".head"))
            file.unlink(missing_ok=True)
            file.with_suffix(".rows").unlink(missing_ok=True)
    return gone


def sweep(tables: Path) -> None:
    """Remove what killed commands of the same run left on this node, folders beside `tables` (NAME-NUMBER) whose writers are gone, and
    what learners left there that died in this one."""
    for left in tables.parent.glob(f"{tables.name.rpartition('-')[0]}-*"):
        for folder in sorted(left.glob("**/"), reverse=True):
            clear_dead(folder)
            with suppress(OSError):  # not empty: a writer lives
                folder.rmdir()


def _rows(table_RD: Array) -> Array:
    """Each row as one opaque value, which is copied whole."""
    return np.asarray(table_RD).view(np.dtype((np.void, table_RD.shape[1] * 4)))[:, 0]


def _mapped(file: Path, rows: int, width: int) -> Array:
    """Without numpy's memmap class, whose indexing costs more than the read of a few rows."""
    return np.asarray(np.memmap(file, np.float32, "r", shape=(rows, width))) if rows else np.empty((0, width), np.float32)


def _reserved(file: Path, rows: int, width: int) -> Array:
    """A table of zeros whose memory is there: where shared memory runs out later, the writer dies of a bus error."""
    size = rows * width * 4
    free = os.statvfs(file.parent)
    try:
        if size > free.f_bavail * free.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(file, "wb") as made:
            os.posix_fallocate(made.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        raise ClusterError(
            f"{file.parent} has {free.f_bavail * free.f_frsize / 2**30:.1f} GB free, a table's shard needs {size / 2**30:.1f} GB: "
            "mount a larger /dev/shm (docker: --shm-size), or name another folder"
        ) from error
    return np.memmap(file, np.float32, "r+", shape=(rows, width))
