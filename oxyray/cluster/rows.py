"""Rows of published tables over several nodes: from shared memory where a node holds them, by Ray calls from the nodes that do.

A learner publishes in a folder of its node (`FOLDER/NODE`), so that Ray's node id, not the sight of a file, says what is held where. Each
learners' node has one `RowServer`. A `SpreadReader` knows which node holds which rows; a read asks each of them at most once, all at the
same time, and is taken only when all answers are of one version. Otherwise all of it is read again: rows of two versions never meet.
Where everything is on the reader's own node, the reader is a plain `TableReader` and nobody is called.

Legend: N rows asked for, M those of them that one node holds, D row width.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oxyray.cluster.fleet import Member
from oxyray.cluster.publish import Open, Reader, TableReader, Unsettled, located, solid, told
from oxyray.cluster.wait import ProcessLost, answers
from oxyray.errors import ClusterError

Array = np.ndarray
Range = tuple[int, int]  # first row, end
Servers = list[tuple[str, Any]]  # a node, and the handle of its server

_PATIENCE_S = 1.0
_PAUSE_S = 0.02
_AT_ONCE = 8


class RowsLost(ClusterError):
    """Rows were not to be had in one version in time: nodes differ in version, or a server does not answer."""


class RowServer(Member):
    """Answers for the rows that its node holds. An actor that waits for nothing long: who asks asks again."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._readers = dict[tuple[str, str], TableReader]()

    def ranges(self, folder: str, name: str) -> list[Range]:
        """Row ranges (first row, end) of the shards here. Raises ClusterError when there are none."""
        return self._reader(folder, name).ranges

    def read(self, folder: str, name: str, ids_M: Array) -> tuple[Array, int]:
        """Rows (M, D) and their version. Raises as TableReader."""
        return self._reader(folder, name).read(ids_M, _PATIENCE_S)

    def clear(self, folder: str) -> None:
        """Take away what was published there, by whomever; no learner may be at work."""
        self._readers.clear()
        shutil.rmtree(folder, ignore_errors=True)

    def _reader(self, folder: str, name: str) -> TableReader:
        if (folder, name) not in self._readers:
            self._readers[folder, name] = TableReader(Path(folder) / self.node, name, whole=False)
        return self._readers[folder, name]


class SpreadReader:
    """A whole table for a reader on the node `own`, which holds a part of the shards or none. `servers` are of all nodes that hold some.
    `wait` gives the answers of calls, as `oxyray.cluster.wait.answers`."""

    def __init__(self, folder: Path, name: str, own: str, servers: Mapping[str, Any], wait: Callable[..., list[Any]] = answers) -> None:
        self.name, self._folder, self._own, self._wait = name, folder, own, wait
        self._servers = {node: server for node, server in servers.items() if node != own}
        self._local = TableReader(folder / own, name, whole=False) if own in servers else None
        self._ranges: list[Range] = []
        self._nodes: list[str] = []

    def read(self, ids_N: Array, seconds: float = 30.0) -> tuple[Array, int]:
        """Rows (N, D) and the version that all of them belong to. Raises ClusterError for ids outside the table or rows that no node holds,
        RowsLost when no version could be read whole within `seconds`, or at once when a node is gone for good."""
        until = time.monotonic() + seconds
        while True:
            left, hopeless = max(0.0, until - time.monotonic()), False
            try:
                if not self._ranges:
                    self._learn_ranges(left)
                row_ND, versions = self._attempt(ids_N, left)
                if len(set(versions.values())) == 1:
                    return row_ND, next(iter(versions.values()))
                why = "they stand at " + ", ".join(f"{version} on node {node[:8]}" for node, version in versions.items())
            except (ProcessLost, Unsettled) as error:
                why, hopeless = str(error), _gone(error)
            if hopeless or time.monotonic() >= until:
                limit = "" if hopeless else f" within {seconds:g} s"
                raise RowsLost(
                    f"table {self.name}: its rows on several nodes could not be read in one version{limit} ({why}): look at the learners "
                    "and their nodes"
                )
            time.sleep(_PAUSE_S)

    def _learn_ranges(self, left: float) -> None:
        """Ask every node once which rows it holds."""
        refs = [server.ranges.remote(str(self._folder), self.name) for server in self._servers.values()]
        held = dict(zip(self._servers, self._wait(refs, left, f"row ranges of table {self.name}"), strict=True))
        if self._local is not None:
            held[self._own] = self._local.ranges
        pairs = sorted((first, end, node) for node, ranges in held.items() for first, end in ranges if end > first)
        ranges = [(first, end) for first, end, _ in pairs]
        if not ranges or ranges[0][0] != 0 or not solid(ranges):
            raise ClusterError(f"the learners' nodes together hold rows {told(ranges)} of table {self.name}: a shard is missing")
        self._ranges, self._nodes = ranges, [node for _, _, node in pairs]

    def _attempt(self, ids_N: Array, left: float) -> tuple[Array, dict[str, int]]:
        """Rows as the nodes gave them, and the version that each of these stood at."""
        shares = self._shares(ids_N)
        refs = {
            node: self._servers[node].read.remote(str(self._folder), self.name, ids_N[at_M])
            for node, at_M in shares.items()
            if node != self._own
        }
        found = {}
        if self._local is not None and self._own in shares:
            found[self._own] = self._local.read(ids_N[shares[self._own]], min(left, _PATIENCE_S))
        if refs:
            found |= dict(zip(refs, self._wait(list(refs.values()), left, f"rows of table {self.name}"), strict=True))
        width = next(iter(found.values()))[0].shape[1]
        row_ND = np.empty((len(ids_N), width), dtype=np.float32)
        for node, (row_MD, _) in found.items():
            row_ND[shares[node]] = row_MD
        return row_ND, {node: version for node, (_, version) in found.items()}

    def _shares(self, ids_N: Array) -> dict[str, Array]:
        """Which of the ids each node is asked for. Somebody is asked even for none: the answer has a width and a version."""
        range_N = located(self._ranges, ids_N)
        if (range_N < 0).any():
            raise ClusterError(f"table {self.name} has rows {told(self._ranges)}, asked were {ids_N.min()} to {ids_N.max()}")
        shares: dict[str, list[Array]] = {}
        for number in np.unique(range_N).tolist():
            shares.setdefault(self._nodes[number], []).append(np.flatnonzero(range_N == number))
        if not shares:
            return {self._nodes[0] if self._local is None else self._own: np.empty(0, np.int64)}
        return {node: np.concatenate(parts) for node, parts in shares.items()}


def _gone(error: ClusterError) -> bool:
    """Whether a server will not come back: its node is gone, or it was ended."""
    import ray

    return isinstance(error.__cause__, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnschedulableError)


def here() -> str:
    """The id of this process's node."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def several_nodes() -> bool:
    import ray

    return sum(node["Alive"] for node in ray.nodes()) > 1


def opener(servers: Sequence[tuple[str, Any]]) -> Open:
    """What opens a table in this process: as a plain file where the learners are on this node alone (without servers they are)."""
    own, of_node = here(), dict(servers)

    def open_table(folder: Path, name: str) -> Reader:
        return SpreadReader(folder, name, own, of_node) if of_node.keys() - {own} else TableReader(folder / own, name)

    return open_table


def serve(nodes: Iterable[str], environment: dict[str, str], seconds: float) -> Servers:
    """Start a server on each of these nodes; it takes no CPU from Ray and comes back on its node when it dies. Raises ProcessLost when one
    does not start within `seconds`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    servers: Servers = []
    for node in dict.fromkeys(nodes):
        made: Any = ray.remote(RowServer).options(
            num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=_AT_ONCE, runtime_env={"env_vars": environment},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )  # fmt: skip
        servers.append((node, made.remote(node)))
    try:
        answers([server.ping.remote() for _, server in servers], seconds, "row servers start")
    except ProcessLost:
        for _, server in servers:
            ray.kill(server)
        raise
    return servers


def dismiss(servers: Servers, folder: Path, seconds: float = 10.0) -> None:
    """Have `folder` taken away on the servers' nodes, then end them. A node that is gone is not waited for longer than `seconds`."""
    import ray

    refs = [server.clear.remote(str(folder)) for _, server in servers]
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=seconds)
    for _, server in servers:
        ray.kill(server)
