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

from oxyray.cluster.publish import PublishedShard, TableReader, clear_dead, sweep
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


def test_a_reader_sees_what_was_published_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxyray.cluster.publish._AT_ONCE", 16)
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
            if version % 2:
                shard.publish(version, touched, new)
            else:
                table = random.normal(size=(rows, WIDTH)).astype(np.float32)
                table[touched] = new
                shard.publish_from(version, touched, table)
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
    shard = PublishedShard(folder, "item", 1, 4, 4, WIDTH)
    for table_RD in (np.zeros((5, WIDTH), np.float32), np.zeros((4, WIDTH)), np.zeros((WIDTH, 4), np.float32).T):
        with pytest.raises(ClusterError, match=r"rows come from a float32 table \(4, \d+\) in one piece"):
            shard.publish_from(0, np.arange(4), table_RD)
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


def test_a_part_of_the_shards_is_read_when_that_is_asked_for(folder: Path) -> None:
    random = np.random.default_rng(2)
    truth = random.normal(size=(20, WIDTH)).astype(np.float32)
    for rank, (first, end) in {1: (4, 8), 2: (8, 12), 4: (16, 20)}.items():
        PublishedShard(folder, "item", rank, first, end - first, WIDTH).publish(0, np.arange(end - first), truth[first:end])
    with pytest.raises(ClusterError, match="one is missing"):
        TableReader(folder, "item")
    reader = TableReader(folder, "item", whole=False)
    assert (reader.ranges, len(reader)) == ([(4, 8), (8, 12), (16, 20)], 12)
    ids = random.choice([*range(4, 12), *range(16, 20)], 50)
    rows, version = reader.read(ids)
    assert version == 0
    assert np.array_equal(rows, truth[ids])
    for wrong in (3, 12, 15, 20, -1):
        with pytest.raises(ClusterError, match=f"table item has rows 4 to 11, 16 to 19, asked were .*{wrong}"):
            reader.read(np.array([wrong]))
        with pytest.raises(ClusterError, match="has rows 4 to 11, 16 to 19"):
            reader.read(np.array([5, wrong, 17]))


def test_one_shard_from_the_middle_is_read_by_the_tables_own_row_numbers(folder: Path) -> None:
    PublishedShard(folder, "item", 3, 30, 10, WIDTH).publish(5, np.arange(10), np.arange(10, dtype=np.float32)[:, None].repeat(WIDTH, 1))
    rows, version = TableReader(folder, "item", whole=False).read(np.array([39, 30]))
    assert (version, rows[:, 0].tolist()) == (5, [9.0, 0.0])


def test_what_killed_commands_of_the_same_run_left_is_swept(tmp_path: Path) -> None:
    code = "import sys, pathlib; from oxyray.cluster.publish import PublishedShard; "
    code += "[PublishedShard(pathlib.Path(folder), 'item', 0, 0, 4, 8) for folder in sys.argv[1:]]"
    left = [str(tmp_path / name) for name in ("oxyray-a-1/1/node", "oxyray-a-1/2/node", "oxyray-b-1/1/node")]
    subprocess.run([sys.executable, "-c", code, *left], check=True, timeout=120)
    PublishedShard(tmp_path / "oxyray-a-3" / "1" / "node", "item", 0, 0, 4, 8)
    sweep(tmp_path / "oxyray-a-2")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["oxyray-a-3", "oxyray-b-1"], "the living and other runs' stay"
    assert len(list((tmp_path / "oxyray-a-3").rglob("item.*"))) == 2
