"""Stage `prepare`: any source of tables → the prepared form in `RUN/data` that all later stages read (`prepared.py`).

Every source becomes one folder of canonical tables (the user's own, or written to `RUN/source` by an importer or the embedded shop), and from
there one way leads on: check and number the rows, spread events over buckets by user, then order, split and write bucket after bucket.
Items, users and one bucket of events are held in memory; events as a whole never are. Both folders appear whole or not at all.

Least that can be worked with: two items, and two users with events; leave-one-out needs users with three events, a time split events in
all three of its ranges.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.config import Config, DataConfig
from oxyray.data import statistics
from oxyray.data.buckets import EVENTS_PER_PART, SCHEMA, Buckets, bucket_of
from oxyray.data.contract import Quarantine, sound_events, sound_rows
from oxyray.data.features import ITEM_FEATURES, encode
from oxyray.data.parts import Parts
from oxyray.data.prepared import FORMAT
from oxyray.data.tables import ACTIONS, Chunk, Ids, Names, Table, find
from oxyray.errors import DataError
from oxyray.files import whole, write_json
from oxyray.progress import bar
from oxyray.run import Run

MOST_SCENARIOS = 1000


def prepare(config: Config, run: Run) -> None:
    """The stage. Raises DataError where the tables cannot be used; earlier artifacts of the run then stay as they were."""
    started, data = time.time(), config.data
    with ExitStack() as folders:
        source = Path(data.path).expanduser() if data.source == "tables" and data.path else folders.enter_context(whole(run.path("source")))
        if data.source != "tables":
            write_source(data, source)
        out = folders.enter_context(whole(run.path("data")))
        meta = write_prepared(data, source, out)
    meta["seconds"] = round(time.time() - started, 1)
    print(statistics.text(meta), flush=True)
    run.log("prepare", statistics.numbers(meta))


def write_source(data: DataConfig, folder: Path) -> None:
    """Canonical tables from what `data.source` names."""
    if data.source == "mall":
        from oxyray.data import mall

        mall.write(data.mall, folder)
    else:
        from oxyray.data import importers

        importers.write(data, folder)


def write_prepared(data: DataConfig, source: Path, out: Path) -> dict[str, Any]:
    """Read the canonical tables of `source`, write the prepared form to `out`, return what is in its `meta.json`."""
    out.mkdir(parents=True)
    quarantine = Quarantine(out / "quarantine", data.max_bad_share)
    items, item_ids = _items(data, source, quarantine)
    users, user_ids = _users(data, source, quarantine)
    events = _open(data, source, "events")
    parts = max(data.shards, -(-events.rows // EVENTS_PER_PART))
    buckets, scenarios = _spread(data, events, item_ids, Buckets(out / ".buckets", parts), quarantine)
    quarantine.close()
    starts = _split_starts(data, buckets)
    ranks = np.argsort(np.argsort(np.array(scenarios))).astype(np.int16)
    writer = Parts(out, ranks, starts)
    bucket_U = bucket_of(users["user_id"], parts)
    with bar(parts, "ordering events", "part") as shown:
        for part in range(parts):
            writer.add(buckets.read(part), users.filter(pa.array(bucket_U == part)))
            buckets.path(part).unlink()
            shown.update()
    buckets.folder.rmdir()
    writer.close()
    side_IC, side = encode(items, [name for name in ITEM_FEATURES if name in items.column_names])
    profile_TP, profile = encode(users, [name for name in users.column_names if name != "user_id"])
    profile_UP = np.concatenate([profile_TP, np.zeros((1, profile_TP.shape[1]), np.int32)])[user_ids.find(writer.users())]
    pq.write_table(items, out / "items.parquet", row_group_size=65_536)
    np.savez(out / "side.npz", side_IC=side_IC, profile_UP=profile_UP)
    pool_SI = _pools(source, sorted(scenarios), item_ids, quarantine)
    np.savez(out / "pools.npz", pool_SI=pool_SI)
    meta = {
        "format": FORMAT,
        "name": data.name,
        "time_unit": data.time_unit,
        "split": data.split,
        "actions": list(ACTIONS),
        "scenarios": sorted(scenarios),
        "items": items.num_rows,
        "side": side,
        "profile": profile,
        "valid_start": None if starts is None else starts[0],
        "test_start": None if starts is None else starts[1],
        "parts": parts,
        "quarantined": dict(quarantine.counts),
        "repaired": dict(quarantine.repaired),
        "ignored_columns": sorted(events.ignored),
        **writer.about(pool_SI),
    }
    _check_enough(data, meta)
    write_json(out / "meta.json", meta)
    return meta


def _open(data: DataConfig, source: Path, name: str) -> Table:
    file = getattr(data, f"{name}_file") if data.source == "tables" else None
    files = find(source, name, file)
    if not files:
        raise DataError(f"{source}: no {name}.parquet (or folder {name}/) there; data.path={source} must hold items and events, see docs")
    return Table(name, files)


def _items(data: DataConfig, source: Path, quarantine: Quarantine) -> tuple[pa.Table, Ids]:
    table = _open(data, source, "items")
    rows = sound_rows("items", Chunk(table.read().combine_chunks(), table.files[0], 0), quarantine)
    quarantine.check("items", table.rows)
    untitled = pc.equal(rows["title"].fill_null(""), "")
    if lost := pc.sum(untitled).as_py():
        quarantine.repaired["items: title is missing, the item_id stands for it"] = lost
        rows = rows.set_column(rows.column_names.index("title"), "title", pc.if_else(untitled, rows["item_id"], rows["title"]))
    rows = rows.sort_by("item_id").combine_chunks()
    if rows.num_rows < 2:
        raise DataError(f"{table.files[0]}: {rows.num_rows} item is left, a recommender needs at least 2")
    return rows, Ids(rows["item_id"].to_pylist())


def _users(data: DataConfig, source: Path, quarantine: Quarantine) -> tuple[pa.Table, Ids]:
    if not find(source, "users", data.users_file if data.source == "tables" else None):
        return pa.table({"user_id": pa.array([], pa.large_string())}), Ids(())
    table = _open(data, source, "users")
    rows = sound_rows("users", Chunk(table.read().combine_chunks(), table.files[0], 0), quarantine).combine_chunks()
    quarantine.check("users", table.rows)
    return rows, Ids(rows["user_id"].to_pylist())


def _spread(data: DataConfig, events: Table, items: Ids, buckets: Buckets, quarantine: Quarantine) -> tuple[Buckets, list[str]]:
    """Check all events once, in bounded memory; sound ones go to the buckets. Returns the scenarios in order of appearance too."""
    latest = data.latest_time if data.time_unit == "position" or data.latest_time is not None else int(time.time())
    scenarios = Names()
    with bar(events.rows, "reading events", "event") as shown:
        for chunk in events.chunks():
            sound = sound_events(chunk, items, latest, quarantine)
            quarantine.check("events", events.rows)
            rows = sound.rows
            scenario_N = scenarios.add(rows["scenario"])
            if len(scenarios) > MOST_SCENARIOS:
                raise DataError(f"{chunk.file}: column scenario has more than {MOST_SCENARIOS} distinct values; is it the right column?")
            columns = {
                "user_id": rows["user_id"],
                "item": pa.array(sound.item_N),
                "time": rows["event_time"],
                "action": pa.array(sound.action_N),
                "scenario": pa.array(scenario_N.astype(np.int16)),
                "trigger": pa.array(sound.trigger_N),
            }
            for name in ("request_id", "query", "price", "quantity"):
                kind = SCHEMA.field(name).type
                columns[name] = rows[name].cast(kind, safe=False) if name in rows.column_names else pa.nulls(rows.num_rows, kind)
            buckets.add(pa.table(columns).select(SCHEMA.names))
            shown.update(chunk.rows.num_rows)
    buckets.close()
    if not buckets.rows:
        raise DataError(f"{events.files[0]}: no event is left after the checks")
    return buckets, list(scenarios)


def _split_starts(data: DataConfig, buckets: Buckets) -> tuple[int, int] | None:
    """First time of the validation and of the test range, by quantiles of event time; None for leave-one-out."""
    if data.split == "leave_one_out":
        return None
    test = min(buckets.rows - 1, int(buckets.rows * (1 - data.test_share)))
    valid = min(test, int(buckets.rows * (1 - data.test_share - data.valid_share)))
    return buckets.time_at(valid), buckets.time_at(test)


def _pools(source: Path, scenarios: list[str], items: Ids, quarantine: Quarantine) -> np.ndarray:
    """bool (scenarios, items): all items where `pools.parquet` says nothing of a scenario."""
    pool_SI = np.zeros((len(scenarios), len(items)), bool)
    if files := find(source, "pools"):
        rows = Table("pools", files).read()
        item_N, scenario_N = items.find(rows["item_id"]), Ids(scenarios).find(rows["scenario"])
        known_N = (item_N >= 0) & (scenario_N >= 0)
        pool_SI[scenario_N[known_N], item_N[known_N]] = True
        if not known_N.all():
            quarantine.repaired["pools: item_id or scenario is unknown, the row was left out"] = int((~known_N).sum())
    pool_SI[~pool_SI.any(axis=1)] = True
    return pool_SI


def _check_enough(data: DataConfig, meta: dict[str, Any]) -> None:
    where = f"{data.name}: "
    if meta["users_with_events"] < 2:
        raise DataError(where + "all events belong to one user; at least 2 users are needed to learn from one for another")
    empty = [name for name, count in meta["splits"].items() if count == 0]
    if empty and data.split == "leave_one_out":
        raise DataError(
            where
            + f"no events for {', '.join(empty)}: leave-one-out needs users with at least 3 events each; more events, or data.split=time"
        )
    if empty:
        raise DataError(
            where + f"no events for {', '.join(empty)}: the time split at {meta['valid_start']} and {meta['test_start']} leaves it empty; "
            "check event_time, or set data.valid_share and data.test_share"
        )
