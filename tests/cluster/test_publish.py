"""Published tables: what readers see while writers write as fast as they can, and what they are told when something is wrong."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from oxyray.cluster.publish import PublishedShard, TableReader, clear_dead
from oxyray.errors import ClusterError

ROWS, WIDTH = (300, 500), 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else tmp_path) / f"oxyray-test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture(autouse=True)
def swept(folder: Path):
    yield
    for file in folder.glob("*") if folder.exists() else []:
        file.unlink()
    if folder.exists():
        folder.rmdir()


def test_a_reader_sees_what_was_published_and_nothing_else(folder: Path) -> None:
    random = np.random.default_rng(0)
    shards = [
        PublishedShard(folder, "item", rank, first, rows, WIDTH) for rank, (first, rows) in enumerate(zip((0, 300), ROWS, strict=True))
    ]
    truth = np.zeros((sum(ROWS), WIDTH), np.float32)
    reader = TableReader(folder, "item")
    assert len(reader) == sum(ROWS)
    for version in range(5):
        for shard, rows in zip(shards, ROWS, strict=True):
            touched = random.choice(rows, 40, replace=False)
            new = random.normal(size=(40, WIDTH)).astype(np.float32)
            truth[shard.first + touched] = new
            shard.publish(version, touched, new)
        ids = random.integers(0, sum(ROWS), 200)
        rows_read, said = reader.read(ids)
        assert said == version
        assert np.array_equal(rows_read, truth[ids])
    rows_read, _ = reader.read(np.empty(0, np.int64))
    assert rows_read.shape == (0, WIDTH)


def hammer(folder: Path, rank: int, first: int, rows: int, together: Barrier, rounds: int) -> None:
    shard = PublishedShard(folder, "item", rank, first, rows, WIDTH)
    together.wait(60)
    for version in range(rounds):
        shard.publish(version, np.arange(rows), np.full((rows, WIDTH), version, np.float32))
        together.wait(60)
        time.sleep(0.0005 * (version % 3))


def test_no_torn_and_no_mixed_row_is_ever_read(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(3)
    writers = [
        context.Process(target=hammer, args=(folder, rank, first, rows, together, 400))
        for rank, (first, rows) in enumerate(zip((0, 300), ROWS, strict=True))
    ]
    for writer in writers:
        writer.start()
    together.wait(60)
    reader, random = TableReader(folder, "item"), np.random.default_rng(1)
    waits = context.Process(target=keep_up, args=(together, 400))
    waits.start()
    seen, last = set(), -1
    while last < 399:
        rows, version = reader.read(random.integers(0, sum(ROWS), 64))
        assert (rows == max(version, 0)).all(), f"version {version} held {np.unique(rows)}"
        assert version >= last
        seen.add(version)
        last = version
    for process in (*writers, waits):
        process.join(60)
        assert process.exitcode == 0
    assert len(seen) > 20, "the reader met the writers often"


def keep_up(together: Barrier, rounds: int) -> None:
    for _ in range(rounds):
        together.wait(60)


def test_a_version_never_falls_and_a_shard_that_is_half_written_is_not_read(folder: Path) -> None:
    shard = PublishedShard(folder, "item", 0, 0, 10, WIDTH)
    shard.publish(3, np.arange(2), np.ones((2, WIDTH)))
    with pytest.raises(ClusterError, match="version 3 cannot follow version 3"):
        shard.publish(3, np.arange(2), np.ones((2, WIDTH)))
    reader = TableReader(folder, "item")
    with pytest.raises(ValueError, match="shape mismatch|broadcast"):
        shard.publish(4, np.arange(3), np.ones((2, WIDTH)))
    with pytest.raises(ClusterError, match=rf"no common version within 0.05 s \(they stand at 3 and writing\).*processes {os.getpid()}"):
        reader.read(np.array([1]), seconds=0.05)


def test_shards_apart_in_version_are_not_mixed(folder: Path) -> None:
    one, two = PublishedShard(folder, "item", 0, 0, 4, WIDTH), PublishedShard(folder, "item", 1, 4, 4, WIDTH)
    reader = TableReader(folder, "item")
    one.publish(0, np.arange(4), np.ones((4, WIDTH)))
    with pytest.raises(ClusterError, match=r"stand at 0, -1"):
        reader.read(np.array([0, 5]), seconds=0.05)
    two.publish(0, np.arange(4), np.full((4, WIDTH), 2.0))
    rows, version = reader.read(np.array([0, 5]))
    assert (version, rows[0, 0], rows[1, 0]) == (0, 1, 2)


def test_what_is_wrong_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="no shard of table item"):
        TableReader(folder, "item")
    PublishedShard(folder, "item", 1, 4, 4, WIDTH)
    with pytest.raises(ClusterError, match="one is missing"):
        TableReader(folder, "item")
    PublishedShard(folder, "item", 0, 0, 4, WIDTH)
    with pytest.raises(ClusterError, match="rows 0 to 7, asked were 2 to 8"):
        TableReader(folder, "item").read(np.array([2, 8]))
    with pytest.raises(ClusterError, match=r"GB free, a table's shard needs"):
        PublishedShard(folder, "huge", 0, 0, 2**40, WIDTH)


def test_what_a_dead_writer_left_is_cleared_and_a_living_one_is_not(folder: Path) -> None:
    code = "import sys, pathlib; from oxyray.cluster.publish import PublishedShard; "
    code += "PublishedShard(pathlib.Path(sys.argv[1]), 'old', 0, 0, 4, 8)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)
    shard = PublishedShard(folder, "item", 0, 0, 4, WIDTH)
    assert clear_dead(folder) == ["old.0"]
    assert len(TableReader(folder, "item")) == 4
    shard.close()
    assert list(folder.glob("*")) == []
