"""wandb in offline mode, for real: the files it writes, and a resumed run that goes on under its id without sending a line twice."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oxyray.config import TrackingConfig
from oxyray.run import Run
from oxyray.tracking import Follower, tracked


class Kept:
    """A tracker that keeps what it is sent."""

    def __init__(self, fails_after: int = 10**9) -> None:
        self.lines: list[tuple[dict[str, Any], int | None]] = []
        self.finished = False
        self.fails_after = fails_after

    def log(self, values: dict[str, Any], step: int | None) -> None:
        if len(self.lines) >= self.fails_after:
            raise ConnectionError("the tracker is gone")
        self.lines.append((values, step))

    def finish(self) -> None:
        self.finished = True


def wandb_rows(run: Run) -> list[dict[str, Any]]:
    """The history rows in wandb's own offline files.

    wandb's process closes a file some time after `finish` came back; that its end is waited for makes the files whole.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    rows: list[dict[str, Any]] = []
    for file in sorted(run.folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime):
        for data in _records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form:

    a 7-byte head, then blocks of 32 KiB with pieces of records (checksum, length, kind, bytes).
    """
    assert data[:4] == b":W&B"
    at, joined = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        joined += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield joined
            joined = b""


def test_a_follower_sends_each_line_once_and_leaves_the_unfinished_one(tmp_path: Path) -> None:
    run, tracker = Run(tmp_path), Kept()
    run.log("sid", {"coverage": 0.5})
    first = Follower(run, tracker, "id")
    first.start()
    run.log("pretrain", {"loss": 2.0}, step=1)
    with open(run.path("metrics.jsonl"), "a") as file:
        file.write('{"stage": "pretrain", "step": 2, "lo')
    first.stop()
    assert [(values["stage"], step) for values, step in tracker.lines] == [("sid", None), ("pretrain", 1)]
    assert tracker.finished
    with open(run.path("metrics.jsonl"), "a") as file:
        file.write('ss": 1.5}\n')
    state = json.loads(run.path("tracking.json").read_text())
    second = Follower(run, tracker, state["id"], state["sent_bytes"])
    second.start()
    second.stop()
    assert [values.get("loss") for values, _ in tracker.lines] == [None, 2.0, 1.5]


def test_a_tracker_that_breaks_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, tracker = Run(tmp_path), Kept(fails_after=1)
    for step in range(3):
        run.log("pretrain", {"loss": 1.0}, step=step)
    follower = Follower(run, tracker, "id")
    follower.start()
    follower.stop()
    assert len(tracker.lines) == 1
    assert capsys.readouterr().out.count("tracking stopped") == 1
    assert len(run.metrics()) == 3


def test_no_tracker_unless_asked_for(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with tracked(TrackingConfig(), run, {}):
        run.log("sid", {"coverage": 1.0})
    assert sorted(path.name for path in run.folder.iterdir()) == ["metrics.jsonl"]


def test_wandb_offline_writes_its_files_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    run, config = Run(tmp_path / "run"), TrackingConfig(wandb=True)
    run.folder.mkdir()
    with tracked(config, run, {"model": {"width": 64}}):
        run.log("pretrain", {"loss": 2.5}, step=10)
    run_id = json.loads(run.path("tracking.json").read_text())["id"]
    with tracked(config, run, {"model": {"width": 64}}):
        run.log("pretrain", {"loss": 1.25}, step=20)
        run.log("evaluate", {"hr@10": 0.125})
    assert json.loads(run.path("tracking.json").read_text())["id"] == run_id
    files = sorted(run.folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{run_id}"] * 2
    rows = wandb_rows(run)
    assert [(row["pretrain/loss"], row["pretrain/step"]) for row in rows if "pretrain/loss" in row] == [(2.5, 10), (1.25, 20)]
    assert [row["evaluate/hr@10"] for row in rows if "evaluate/hr@10" in row] == [0.125]
