"""Bad input ends in one clear line, and what earlier runs made stays as it was."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oxyray.data.prepared import Prepared
from oxyray.errors import DataError, OxyrayError, RunError
from tests.data import toy

_ONE_USER = [event for event in toy.EVENTS if event["user_id"] == "u0"]
_TOO_FEW = [event for event in toy.EVENTS if event["event_time"] < 1020]


def _without(column: str) -> pa.Table:
    return toy.table(toy.EVENTS).drop_columns([column])


def _with(column: str, values: list[Any]) -> pa.Table:
    table = toy.table(toy.EVENTS)
    return table.set_column(table.column_names.index(column), column, pa.array(values))


def _changed(**values: Any) -> list[dict[str, Any]]:
    return [toy.EVENTS[0] | values, *toy.EVENTS[1:]]


_empty = toy.table(toy.EVENTS).slice(0, 0)
_later = int(time.time()) + 86_400
_users = toy.table([{"user_id": "u0", "city": "Rome"}, {"user_id": "u0", "city": "Oslo"}])

# What is wrong, the tables, and what the one line must say: where, what was found, what is expected or the mend.
_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": (
        {"events": _without("event_time")},
        r"events\.parquet: column event_time is missing \(the file has: user_id, item_id, action",
    ),
    "missing column of items": ({"items": toy.table(toy.ITEMS).drop_columns(["title"])}, r"items\.parquet: column title is missing"),
    "wrong type": (
        {"events": _with("event_time", ["noon"] * 24)},
        r"events\.parquet: column event_time has type string, expected whole numbers",
    ),
    "wrong type of a value": (
        {"events": _with("event_time", [1.5] * 24)},
        r"events\.parquet: column event_time has type double, expected whole numbers",
    ),
    "wrong type of items": (
        {"items": [i | {"price": "cheap"} for i in toy.ITEMS]},
        r"items\.parquet: column price has type string, expected numbers",
    ),
    "duplicate items": (
        {"items": [*toy.ITEMS, toy.ITEMS[3]]},
        r"1 × item_id is repeated; first: .*items\.parquet row 7, item_id is repeated: 'i3'",
    ),
    "duplicate users": (
        {"users": _users},
        r"users: 1 of 2 rows break the contract, .*1 × user_id is repeated; first: .*users\.parquet row 2",
    ),
    "unknown action": (
        {"events": _changed(action="stare")},
        r"1 × action is unknown; first: .*events\.parquet row 1, action is unknown: 'stare'",
    ),
    "unknown item": (
        {"events": _changed(item_id="i77")},
        r"1 of 24 rows break the contract, more than data\.max_bad_share=0\.01 .*unknown: 'i77'",
    ),
    "future time": ({"events": _changed(event_time=_later)}, r"1 × event_time lies in the future; .*" + str(_later)),
    "milliseconds": ({"events": _changed(event_time=1000 * _later)}, r"event_time lies far in the future \(are these milliseconds\?"),
    "negative time": ({"events": _changed(event_time=-5)}, r"event_time is negative: -5"),
    "missing id": ({"events": _changed(user_id=None)}, r"user_id is missing"),
    "empty events": ({"events": _empty}, r"events\.parquet: the events table has no rows"),
    "empty items": ({"items": toy.table(toy.ITEMS).slice(0, 0)}, r"items\.parquet: the items table has no rows"),
    "one user only": ({"events": _ONE_USER}, r"all events belong to one user; at least 2 users are needed"),
    "too few events": ({"events": _TOO_FEW}, r"no events for valid, test, since no user has 3 events or more: .*data\.split=time"),
    "one item only": ({"items": toy.ITEMS[:1]}, r"1 item is left, a recommender needs at least 2"),
}


@pytest.fixture
def earlier(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A run folder in which a sound set was prepared before, and its content."""
    toy.run(toy.write(tmp_path / "sound"), tmp_path / "run")
    (tmp_path / "run/sid").mkdir()
    (tmp_path / "run/sid/catalogue.json").write_text("{}")
    return tmp_path / "run", toy.digest(tmp_path / "run")


def _fails(earlier: tuple[Path, dict[str, str]], kind: type[OxyrayError], said: str, attempt: Callable[[], object]) -> None:
    run, content = earlier
    with pytest.raises(kind, match=said) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + 3 * len(str(run))
    assert toy.digest(run) == content
    assert sorted(path.name for path in run.iterdir()) == ["data", "metrics.jsonl", "sid"]  # nothing half-made is left beside


@pytest.mark.parametrize("wrong", _TABLES)
def test_tables_that_break_the_contract(tmp_path: Path, earlier: tuple[Path, dict[str, str]], wrong: str) -> None:
    tables, said = _TABLES[wrong]
    source = toy.write(tmp_path / "bad", **tables)
    _fails(earlier, DataError, said, lambda: toy.run(source, earlier[0]))


def test_a_table_that_is_not_there(tmp_path: Path, earlier: tuple[Path, dict[str, str]]) -> None:
    (toy.write(tmp_path / "bad") / "events.parquet").unlink()
    _fails(earlier, DataError, r"no events\.parquet \(or folder events/\) there", lambda: toy.run(tmp_path / "bad", earlier[0]))
    _fails(earlier, DataError, r"no such folder; set data\.path", lambda: toy.run(tmp_path / "nowhere", earlier[0]))


@pytest.mark.parametrize("name", ["events", "items", "users", "pools"])
@pytest.mark.parametrize("damage", ["cut", "not parquet", "bytes changed", "empty file"])
def test_corrupted_parquet(tmp_path: Path, earlier: tuple[Path, dict[str, str]], name: str, damage: str) -> None:
    pools = toy.table([{"scenario": "home", "item_id": item["item_id"]} for item in toy.ITEMS])
    source = toy.write(tmp_path / "bad", users=toy.table([{"user_id": "u0", "city": "Rome"}]), pools=pools)
    file = source / f"{name}.parquet"
    content = file.read_bytes()
    page = pq.ParquetFile(file).metadata.row_group(0).column(0).dictionary_page_offset
    changed = {
        "cut": content[:-20],
        "not parquet": b"item_id,title\n1,one\n",
        "bytes changed": content[:page] + b"\xff" * 16 + content[page + 16 :],
        "empty file": b"",
    }
    file.write_bytes(changed[damage])
    _fails(
        earlier,
        DataError,
        rf"{name}\.parquet: not a readable Parquet file \(.*write it or fetch it again",
        lambda: toy.run(source, earlier[0]),
    )


@pytest.mark.parametrize("source", ["files", "amazon_reviews"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [("cut", "the gzip file is cut short after line"), ("changed", "not a sound gzip file"), ("plain", "not a sound gzip file")],
)
def test_truncated_gzip(tmp_path: Path, earlier: tuple[Path, dict[str, str]], source: str, damage: str, said: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    if source == "files":
        (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},thing {n}\n" for n in range(6)))
        text = "user_id,item_id,event_time\n" + "".join(f"u{n % 50},i{n % 6},{n * 7919}\n" for n in range(5000))
        file = folder / "events.csv.gz"
    else:
        (folder / "meta_Toys.json").write_text(
            "\n".join(json.dumps({"asin": item["item_id"], "title": item["title"]}) for item in toy.ITEMS)
        )
        reviews = [{"reviewerID": f"u{n % 50}", "asin": f"i{n % 6}", "unixReviewTime": n * 7919} for n in range(5000)]
        text, file = "\n".join(map(json.dumps, reviews)), folder / "reviews_Toys.json.gz"
    packed = gzip.compress(text.encode())
    middle = len(packed) // 2
    changed = {"cut": packed[:middle], "changed": packed[:middle] + b"\x00" * 50 + packed[middle + 50 :], "plain": text.encode()}
    file.write_bytes(changed[damage])
    _fails(earlier, DataError, rf"{file.name}: {said}.*fetch or write it again", lambda: toy.run(folder, earlier[0], source=source))


def test_few_broken_rows_are_kept_aside_and_counted(tmp_path: Path) -> None:
    prepared = toy.run(toy.write(tmp_path / "tables", _changed(action="stare")), tmp_path / "run", max_bad_share=0.05)
    assert prepared.meta.quarantined == {"events: action is unknown": 1}
    assert prepared.meta.events == len(toy.EVENTS) - 1
    kept = pq.read_table(tmp_path / "run/data/quarantine/events.parquet").to_pylist()
    assert [(row["action"], row["reason"], row["row"]) for row in kept] == [("stare", "action is unknown", 1)]


_FULL_DISK = """
    set -e
    mount -t tmpfs -o size={size}k tmpfs {disk}
    {python} - <<'END'
    from pathlib import Path
    from tests.data import toy
    from oxyray.errors import RunError
    run = Path({disk!r}) / "run"
    toy.run(Path({sound!r}), run)
    before = toy.digest(run)
    try:
        toy.run(Path({big!r}), run, **{data!r})
    except RunError as error:
        print("ERROR", error)
    assert toy.digest(run) == before, "earlier artifacts changed"
    assert sorted(path.name for path in run.iterdir()) == ["data", "metrics.jsonl"], list(run.iterdir())
    toy.run(Path({sound!r}), run)  # and the run can go on
    END
"""


@pytest.mark.parametrize(("source", "size"), [("tables", 100), ("tables", 500), ("tables", 1100), ("files", 100)])
def test_full_disk(tmp_path: Path, source: str, size: int) -> None:
    """A disk that is really full, at different moments of the work: a small file system of its own, which ends with the process."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    sound, disk = toy.write(tmp_path / "sound"), tmp_path / "disk"
    disk.mkdir()
    events = [toy.event(f"user {n * 7919 % 5000}", f"i{n % 6}", 1000 + n * 104_729 % 1_000_003) for n in range(20_000)]
    big = toy.write(tmp_path / "big", events)
    values = {"size": size, "disk": str(disk), "sound": str(sound), "big": str(big), "python": sys.executable, "data": {"source": source}}
    script = textwrap.dedent(_FULL_DISK).format(**values)
    root = Path(__file__).parents[2]
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    told = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
    assert told == [f"ERROR no space left on the disk of {disk}/run: free some or set run_dir to another disk; nothing earlier was lost"]
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    toy.run(toy.write(tmp_path / "tables"), tmp_path / "run")
    path = tmp_path / "run/data/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(RunError, match=r"written by another version of OxyRay: run `oxyray prepare` again"):
        Prepared.load(tmp_path / "run/data")
