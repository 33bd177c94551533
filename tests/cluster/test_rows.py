"""Tables over several nodes, with the nodes as folders and their servers called in this process: who is asked for what, and what is tried
again. The same on a real Ray is in `tests/chaos/test_two_nodes.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oxyray.cluster import rows
from oxyray.cluster.publish import PublishedShard, TableReader
from oxyray.cluster.rows import RowServer, RowsLost, SpreadReader, opener
from oxyray.cluster.wait import ProcessLost
from oxyray.errors import ClusterError

WIDTH = 6
NODES = {"aaa": [(0, 10), (10, 20)], "bbb": [(20, 30)], "ccc": [(30, 35)]}
TOTAL = 35


class Handle:
    """A server as an actor's handle offers it: a call gives what `wait` turns into the answer."""

    def __init__(self, server: RowServer, calls: list[str]) -> None:
        self._server, self._calls = server, calls

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Callable[[], Any]:
            self._calls.append(f"{self._server.node} {method}")
            return lambda: getattr(self._server, method)(*arguments)

        return type("Method", (), {"remote": staticmethod(remote)})


def answer(refs: list[Callable[[], Any]], seconds: float, what: str) -> list[Any]:
    del seconds, what
    return [ref() for ref in refs]


class Shop:
    """The learners of three nodes, all of whose rows are the version's number, plus the row's own in column 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.shards: dict[str, list[PublishedShard]] = {}
        numbers = iter(range(100))
        for node, ranges in NODES.items():
            self.shards[node] = [PublishedShard(folder / node, "item", next(numbers), first, end - first, WIDTH) for first, end in ranges]
        self.servers = {node: Handle(RowServer(node), self.calls) for node in NODES}

    def publish(self, version: int, *nodes: str) -> None:
        for node in nodes or NODES:
            for shard, (first, end) in zip(self.shards[node], NODES[node], strict=True):
                row_RD = np.full((end - first, WIDTH), version, np.float32)
                row_RD[:, 1] = np.arange(first, end)
                shard.publish(version, np.arange(end - first), row_RD)

    def reader(self, own: str, wait: Any = answer) -> SpreadReader:
        return SpreadReader(self.folder, "item", own, self.servers, wait)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    made = Shop(tmp_path)
    made.publish(0)
    return made


@pytest.mark.parametrize("own", ["aaa", "ccc", "another"])
def test_every_node_is_asked_once_for_its_rows_and_nobody_for_rows_at_hand(shop: Shop, own: str) -> None:
    reader, random = shop.reader(own), np.random.default_rng(0)
    for version in range(1, 4):
        shop.publish(version)
        ids = random.integers(0, TOTAL, 200)
        found, said = reader.read(ids)
        assert said == version
        assert (found[:, 0] == version).all()
        assert found[:, 1].tolist() == ids.tolist()
        assert found.flags.writeable
    others = [node for node in NODES if node != own]
    assert shop.calls == [f"{node} ranges" for node in others] + [f"{node} read" for node in others] * 3
    shop.calls.clear()
    for node, ranges in NODES.items():
        ids = np.array([ranges[0][0], ranges[-1][1] - 1, ranges[0][0]])
        found, said = reader.read(ids)
        assert (said, found[:, 1].tolist()) == (3, ids.tolist())
        assert shop.calls == ([] if node == own else [f"{node} read"])
        shop.calls.clear()
    nothing, said = reader.read(np.empty(0, np.int64))
    assert (nothing.shape, said) == ((0, WIDTH), 3)


def test_a_read_is_repeated_as_a_whole_until_all_nodes_are_of_one_version(shop: Shop) -> None:
    tries = []

    def late(refs: list[Any], seconds: float, what: str) -> list[Any]:
        found = answer(refs, seconds, what)
        tries.append(len(found))
        if len(tries) == 4:
            shop.publish(1, "bbb", "ccc")
        return found

    reader = shop.reader("aaa", late)
    assert reader.read(np.array([0, 25, 32]))[1] == 0
    shop.publish(1, "aaa")
    found, version = reader.read(np.array([0, 25, 32]))
    assert version == 1
    assert (found[:, 0] == 1).all()
    assert tries == [2, 2, 2, 2, 2], "ranges, the first read, then two reads in vain"


def test_versions_that_stay_apart_and_servers_that_stay_away_are_an_error_in_time(shop: Shop) -> None:
    shop.publish(1, "bbb")
    began = time.monotonic()
    with pytest.raises(RowsLost, match=r"table item: .* within 0.1 s \(they stand at 0 on node aaa, 1 on node bbb\): look at the learners"):
        shop.reader("aaa").read(np.array([0, 25]), seconds=0.1)
    assert time.monotonic() - began < 5
    assert shop.reader("aaa").read(np.array([0, 31]))[1] == 0, "who is not asked does not matter"

    def gone(refs: list[Any], seconds: float, what: str) -> list[Any]:
        raise ProcessLost(f"{what}: a process was lost")

    with pytest.raises(RowsLost, match=r"within 0.1 s \(row ranges of table item: a process was lost\)"):
        shop.reader("aaa", gone).read(np.array([0]), seconds=0.1)


def test_a_server_that_comes_back_is_asked_again(shop: Shop) -> None:
    left = [2]

    def away(refs: list[Any], seconds: float, what: str) -> list[Any]:
        if left[0]:
            left[0] -= 1
            raise ProcessLost(f"{what}: a process was lost")
        return answer(refs, seconds, what)

    found, version = shop.reader("bbb", away).read(np.arange(TOTAL), seconds=30)
    assert (version, found[:, 1].tolist()) == (0, list(range(TOTAL)))


def test_a_shard_that_is_half_written_on_another_node_is_not_read(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_PATIENCE_S", 0.02)
    with pytest.raises(ValueError, match="broadcast"):
        shop.shards["bbb"][0].publish(1, np.arange(3), np.ones((2, WIDTH)))
    with pytest.raises(RowsLost, match="they stand at 0 and writing"):
        shop.reader("aaa").read(np.array([0, 25]), seconds=0.1)


def test_what_is_wrong_is_said(shop: Shop) -> None:
    for wrong in (-1, TOTAL):
        with pytest.raises(ClusterError, match=f"table item has rows 0 to {TOTAL - 1}, asked were"):
            shop.reader("aaa").read(np.array([3, wrong]))
    with pytest.raises(ClusterError, match="aaa holds no shard of table user"):
        SpreadReader(shop.folder, "user", "aaa", shop.servers, answer)
    with pytest.raises(ClusterError, match="bbb holds no shard of table user"):
        SpreadReader(shop.folder, "user", "another", {"bbb": shop.servers["bbb"]}, answer).read(np.array([0]))
    some = {node: server for node, server in shop.servers.items() if node != "bbb"}
    with pytest.raises(ClusterError, match="together hold rows 0 to 19, 30 to 34 of table item: a shard is missing"):
        SpreadReader(shop.folder, "item", "aaa", some, answer).read(np.array([0]))


def test_no_mixed_row_is_read_while_nodes_publish_one_after_the_other(shop: Shop) -> None:
    over = threading.Event()

    def write() -> None:
        for version in range(1, 200):
            for node in NODES:
                shop.publish(version, node)
                time.sleep(0.0005 * (version % 3))
            time.sleep(0.005)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader, random, seen = shop.reader("bbb"), np.random.default_rng(1), set()
    while not over.is_set():
        found, version = reader.read(random.integers(0, TOTAL, 30))
        assert (found[:, 0] == version).all()
        seen.add(version)
    writer.join()
    assert len(seen) > 5


def test_a_table_on_this_node_alone_is_opened_as_files(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "here", lambda: "alone")
    PublishedShard(tmp_path / "alone", "item", 0, 0, 4, WIDTH)
    server = shop.servers["aaa"]
    for servers in ([], [("alone", server)]):
        assert isinstance(opener(servers)(tmp_path, "item"), TableReader)
    for servers in ([("aaa", server)], [("alone", server), ("aaa", server)]):
        assert isinstance(opener(servers)(tmp_path, "item"), SpreadReader)
    assert shop.calls == []


def test_a_server_takes_its_folder_away(shop: Shop) -> None:
    server = RowServer("bbb")
    assert server.ranges(str(shop.folder), "item") == [(20, 30)]
    server.clear(str(shop.folder))
    assert not shop.folder.exists()
    with pytest.raises(ClusterError, match="holds no shard"):
        server.read(str(shop.folder), "item", np.array([20]))
