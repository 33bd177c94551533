"""Publication of sparse tables on a node: learners write, everybody else on the node reads, without a copy of the table on the way.

A published table is a file in shared memory, apart from the table that trains: it changes only when a version is published, by the rows
that were touched since the version before, so its rows always belong to the dense weights of the same version. A sequence lock fences it:
the writer makes the sequence odd, writes, makes it even again; a reader that met an odd or a changed sequence reads again. Each learner
publishes its own shard; a reader takes rows only while all shards stand at one version.

Files: `NAME.RANK.rows`, float32 (rows, D), and `NAME.RANK.head`, int64: sequence, version, first row, rows, D, the writer's process id.

Legend: N rows asked for, T touched rows, D row width.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from oxyray.errors import ClusterError

Array = np.ndarray

_SEQUENCE, _VERSION, _FIRST, _ROWS, _WIDTH, _PID, _FIELDS = 0, 1, 2, 3, 4, 5, 8
_PAUSE = 2e-4


class PublishedShard:
    """The writer's side of one shard: rows `first ... first + rows - 1` of the table `name`, all zeros at version -1 until published."""

    def __init__(self, folder: Path, name: str, rank: int, first: int, rows: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _room(folder, rows * width * 4)
        self.first = first
        self._files = [folder / f"{name}.{rank}.{part}" for part in ("rows", "head")]
        self._row_RD = np.memmap(self._files[0], np.float32, "w+", shape=(rows, width)) if rows else np.empty((0, width), np.float32)
        self._head = np.memmap(self._files[1], np.int64, "w+", shape=(_FIELDS,))
        self._head[:] = [0, -1, first, rows, width, os.getpid(), 0, 0]

    @property
    def version(self) -> int:
        return int(self._head[_VERSION])

    def publish(self, version: int, touched_T: Array, row_TD: Array) -> None:
        """Make `row_TD` the rows `touched_T` (numbers within the shard) of `version`, which must rise. Readers wait for the length of the
        copy; should the copy fail, the shard stays closed, since it would be torn."""
        if version <= self.version:
            raise ClusterError(f"{self._files[0].name}: version {version} cannot follow version {self.version}: versions only rise")
        self._head[_SEQUENCE] += 1
        self._row_RD[touched_T] = row_TD
        self._head[_VERSION] = version
        self._head[_SEQUENCE] += 1

    def close(self) -> None:
        """Take the files away; readers that have them open keep what they see."""
        for file in self._files:
            file.unlink(missing_ok=True)


class TableReader:
    """The reader's side of a whole table. Opening maps the shards, which takes the same short time at any size.

    Raises ClusterError when there is no shard, or the shards leave rows out.
    """

    def __init__(self, folder: Path, name: str) -> None:
        files = sorted(folder.glob(f"{name}.*.head"), key=lambda file: int(file.name.split(".")[-2]))
        if not files:
            raise ClusterError(f"{folder} holds no shard of table {name}: is this the learners' node, and have they started?")
        self.name = name
        self._head_S = [np.memmap(file, np.int64, "r", shape=(_FIELDS,)) for file in files]
        first_S = [int(head[_FIRST]) for head in self._head_S]
        rows_S = [int(head[_ROWS]) for head in self._head_S]
        self._end_S = np.cumsum(rows_S)
        if first_S != [int(end) - rows for end, rows in zip(self._end_S, rows_S, strict=True)]:
            raise ClusterError(f"the shards of table {name} in {folder} start at rows {first_S} but hold {rows_S} rows: one is missing")
        self.width = int(self._head_S[0][_WIDTH])
        self._row_SRD = [_mapped(file.with_suffix(".rows"), rows, self.width) for file, rows in zip(files, rows_S, strict=True)]

    def __len__(self) -> int:
        return int(self._end_S[-1])

    def read(self, ids_N: Array, seconds: float = 30.0) -> tuple[Array, int]:
        """Rows (N, D) and the version that all of them belong to. Raises ClusterError for ids outside the table, and when no version stood
        still within `seconds`."""
        if len(ids_N) and not (ids_N.min() >= 0 and ids_N.max() < len(self)):
            raise ClusterError(f"table {self.name} has rows 0 to {len(self) - 1}, asked were {ids_N.min()} to {ids_N.max()}")
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
                raise ClusterError(
                    f"table {self.name}: its shards came to no common version within {seconds:g} s (they stand at {said}): "
                    f"look at the learners (processes {who})"
                )
            time.sleep(_PAUSE)

    def _stand(self) -> list[tuple[int, int]] | None:
        """Sequence and version of each shard; None while one is being written or they differ in version."""
        stand_S = [(int(head[_SEQUENCE]), int(head[_VERSION])) for head in self._head_S]
        still = all(sequence % 2 == 0 for sequence, _ in stand_S) and len({version for _, version in stand_S}) == 1
        return stand_S if still else None

    def _gather(self, ids_N: Array) -> Array:
        if len(self._row_SRD) == 1:
            return self._row_SRD[0][ids_N]
        shard_N = np.searchsorted(self._end_S, ids_N, side="right")
        row_ND = np.empty((len(ids_N), self.width), dtype=np.float32)
        for shard, row_RD in enumerate(self._row_SRD):
            mine_N = np.flatnonzero(shard_N == shard)
            row_ND[mine_N] = row_RD[ids_N[mine_N] - (int(self._end_S[shard]) - len(row_RD))]
        return row_ND


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


def _mapped(file: Path, rows: int, width: int) -> Array:
    """Without numpy's memmap class, whose indexing costs more than the read of a few rows."""
    return np.asarray(np.memmap(file, np.float32, "r", shape=(rows, width))) if rows else np.empty((0, width), np.float32)


def _room(folder: Path, size: int) -> None:
    """Shared memory that is full kills the writer with a bus error: better to refuse before."""
    free = os.statvfs(folder)
    if size > free.f_bavail * free.f_frsize:
        raise ClusterError(
            f"{folder} has {free.f_bavail * free.f_frsize / 2**30:.1f} GB free, a table's shard needs {size / 2**30:.1f} GB: "
            "mount a larger /dev/shm (docker: --shm-size), or name another folder"
        )
