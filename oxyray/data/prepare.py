"""Stage `prepare`: any source of tables → the prepared form in `RUN/data` that all later stages read (`prepared.py`).

Every source becomes one folder of canonical tables (the user's own, or written to `RUN/source` by an importer or the embedded shop), and
from there one way leads on: check and number the rows, spread events over buckets by user, then order, split and write bucket after bucket.
Items, users and one bucket of events are held in memory; events as a whole never are. Both folders appear whole or not at all.

Least that can be worked with: two items, and two users with events; leave-one-out needs users with three events, a time split events in
all three of its ranges.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.config import ClusterConfig, Config, DataConfig
from oxyray.data import statistics
from oxyray.data.buckets import EVENTS_PER_PART, SCHEMA, Buckets, bucket_of
from oxyray.data.contract import Quarantine, sound_events, sound_rows
from oxyray.data.features import ITEM_FEATURES, encode
from oxyray.data.parts import Parts
from oxyray.data.prepared import FORMAT, Meta
from oxyray.data.settle import Settled
from oxyray.data.tables import ACTIONS, COLUMNS, Chunk, Ids, Names, Table, find, titled
from oxyray.errors import DataError
from oxyray.files import whole, write_json
from oxyray.progress import bar, track
from oxyray.run import Run

MOST_SCENARIOS = 1000
_MOST = 2**31 - 1  # pieces in one event


def prepare(config: Config, run: Run) -> None:
    """The stage. Raises DataError where the tables cannot be used; earlier artifacts of the run then stay as they were."""
    started, data = time.time(), config.data
    with ExitStack() as folders:
        out = folders.enter_context(whole(run.path("data")))
        out.mkdir(parents=True)
        quarantine = Quarantine(out / "quarantine", data.max_bad_share)
        folders.callback(quarantine.close)
        source = Path(data.path or "").expanduser()
        if data.source != "tables":
            source = folders.enter_context(whole(run.path("source")))
            quarantine.moves = source, run.path("source")
            write_source(data, source, quarantine, config.cluster)
        meta = write_prepared(data, source, out, quarantine)
    print(statistics.text(meta), flush=True)
    run.log("prepare", statistics.numbers(meta) | {"seconds": round(time.time() - started, 1)})


def source_files(data: DataConfig) -> list[Path]:
    """What is read of `data.path`, in order; nothing where a table is not to be found (`prepare` says which)."""
    if data.source == "mall":
        return []
    root = Path(data.path or "").expanduser()
    try:
        if data.source == "tables":
            found = [file for name in COLUMNS for file in find(root, name, getattr(data, f"{name}_file", None))]
        else:
            from oxyray.data import importers

            found = importers.files(data)
    except DataError:
        return []
    return sorted({*found, *(file for file in [root / "exposures.parquet"] if file.is_file())})


def write_source(data: DataConfig, folder: Path, quarantine: Quarantine, cluster: ClusterConfig) -> None:
    """Canonical tables from what `data.source` names."""
    if data.source == "mall":
        from oxyray.data import mall

        mall.write(data.mall, folder, cluster)
    else:
        from oxyray.data import importers

        importers.write(data, folder, quarantine)


def bring_exposures(data: DataConfig, source: Path, out: Path) -> list[Path]:
    """The shop's log of exposures, as it is, so that a run can be moved; it is of use where pages can be split by time. Gives what was
    brought."""
    own = data.source == "mall"
    file = (source if own else Path(data.path or "").expanduser()) / "exposures.parquet"
    if data.split != "time" or not file.is_file():
        return []
    (os.link if own else shutil.copyfile)(file, out / file.name)
    return [out / file.name]


def write_prepared(data: DataConfig, source: Path, out: Path, quarantine: Quarantine) -> Meta:
    """Read the canonical tables of `source`, write the prepared form to `out`, return what is in its `meta.json`."""
    items, item_ids = _items(data, source, quarantine)
    users, user_ids = _users(data, source, quarantine)
    events = _open(data, source, "events")
    buckets = Buckets(out / ".buckets", _part_count(data, events))
    try:
        scenarios = _spread(data, events, item_ids, buckets, quarantine)
    except BaseException:
        buckets.abandon()
        raise
    pool_SI = _pools(source, sorted(scenarios), item_ids, quarantine)
    quarantine.close()
    settled = _settle(buckets, Settled(out / ".settled"))
    if data.core:
        left_I = settled.core_items(len(item_ids), data.core)
        items, pool_SI = items.filter(pa.array(left_I)), pool_SI[:, left_I]
        if empty := [name for name, pool_I in zip(sorted(scenarios), pool_SI, strict=True) if not pool_I.any()]:
            raise DataError(f"{data.name}: data.core={data.core} leaves no item that may be recommended in {', '.join(empty)}: lower it")
    starts = settled.split_starts(data.valid_share, data.test_share) if data.split == "time" else None
    final_I = item_ids.find(items["item_id"])
    item_number = np.full(len(item_ids), -1)
    item_number[final_I] = np.arange(len(final_I))
    parts = Parts(out, item_number, np.argsort(np.argsort(np.array(scenarios))), pool_SI, starts)
    final_users = _write_parts(settled, parts, users, only_active=data.core > 0)
    parts.sign(items)
    side_IC, side = encode(items, [name for name in ITEM_FEATURES if name in items.column_names])
    profile_TP, profile = encode(users, [name for name in users.column_names if name != "user_id"])
    profile_UP = np.concatenate([profile_TP, np.zeros((1, profile_TP.shape[1]), np.int32)])[user_ids.find(final_users)]
    parts.sign(side_IC, profile_UP, pool_SI, *bring_exposures(data, source, out))
    pq.write_table(items, out / "items.parquet", row_group_size=65_536)
    np.savez(out / "side.npz", side_IC=side_IC, profile_UP=profile_UP)
    np.savez(out / "pools.npz", pool_SI=pool_SI)
    meta = Meta(
        format=FORMAT,
        name=data.name,
        time_unit=data.time_unit,
        split=data.split,
        actions=list(ACTIONS),
        scenarios=sorted(scenarios),
        items=items.num_rows,
        merged=settled.merged,
        side=side,
        profile=profile,
        valid_start=starts and starts[0],
        test_start=starts and starts[1],
        quarantined=dict(quarantine.counts),
        repaired=dict(quarantine.repaired),
        ignored_columns=sorted(events.ignored),
        **parts.about(),
    )
    _check_enough(data, meta)
    write_json(out / "meta.json", dataclasses.asdict(meta))
    return meta


def _part_count(data: DataConfig, events: Table) -> int:
    return max(data.shards, -(-events.rows // EVENTS_PER_PART))


def _settle(buckets: Buckets, settled: Settled) -> Settled:
    for bucket in track(range(buckets.count), buckets.count, "ordering events", "part"):
        settled.add(buckets.take(bucket))
    buckets.folder.rmdir()
    return settled


def _write_parts(settled: Settled, parts: Parts, users: pa.Table, only_active: bool) -> pa.ChunkedArray:
    """All parts and the users; returns the user ids in their final order. With `only_active` users without events are left out."""
    count = len(settled.users)
    bucket_U = bucket_of(users["user_id"], count)
    for bucket in track(range(count), count, "writing events", "part"):
        rows, user_ids = settled.take(bucket)
        known = users.filter(pa.array(bucket_U == bucket))
        parts.add(rows, user_ids, known.filter(pc.is_in(known["user_id"], value_set=user_ids)) if only_active else known)
    shutil.rmtree(settled.folder)
    return parts.close()


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
    if lost := pc.sum(pc.equal(rows["title"].fill_null(""), "")).as_py():
        quarantine.repaired["items: title is missing, the item_id stands for it"] = lost
        rows = titled(rows)
    if "price" in rows.column_names:
        nonsense = pc.less(rows["price"], 0).fill_null(False)
        if lost := pc.sum(nonsense).as_py():
            quarantine.repaired["items: price is below 0, left out"] = lost
            rows = rows.set_column(rows.column_names.index("price"), "price", pc.if_else(nonsense, None, rows["price"]))
    for name in (name for name in ("category_1", "category_2", "category_3", "brand") if name in rows.column_names):
        rows = rows.set_column(rows.column_names.index(name), name, pc.if_else(pc.equal(rows[name], ""), None, rows[name]))
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


def _spread(data: DataConfig, events: Table, items: Ids, buckets: Buckets, quarantine: Quarantine) -> list[str]:
    """Check all events once, in bounded memory; sound ones go to the buckets. Returns the scenarios in order of appearance."""
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
                given = rows[name] if name in rows.column_names else pa.nulls(rows.num_rows, kind)
                if name == "quantity" and pa.types.is_integer(given.type):
                    given = pc.min_element_wise(given, _MOST, skip_nulls=False)
                columns[name] = given.cast(kind, safe=False)
            for name in ("request_id", "query"):
                columns[name] = pc.if_else(pc.equal(columns[name], ""), None, columns[name])
            buckets.add(pa.table(columns).select(SCHEMA.names))
            shown.update(chunk.rows.num_rows)
    buckets.close()
    if not buckets.rows:
        raise DataError(f"{events.files[0]}: no event is left after the checks")
    return list(scenarios)


def _pools(source: Path, scenarios: list[str], items: Ids, quarantine: Quarantine) -> np.ndarray:
    """bool (scenarios, items): all items where `pools.parquet` says nothing of a scenario."""
    pool_SI = np.zeros((len(scenarios), len(items)), bool)
    if files := find(source, "pools"):
        rows = Table("pools", files).read()
        item_N, scenario_N = items.find(rows["item_id"]), Ids(scenarios).find(rows["scenario"])
        known_N = (item_N >= 0) & (scenario_N >= 0)
        pool_SI[scenario_N[known_N], item_N[known_N]] = True
        named = np.unique(scenario_N[scenario_N >= 0])
        if empty := [scenarios[scenario] for scenario in named if not pool_SI[scenario].any()]:
            raise DataError(
                f"{files[0]}: none of the items that it names for {', '.join(empty)} is in the items table: are these item_ids?"
            )
        if not known_N.all():
            quarantine.repaired["pools: item_id or scenario is unknown, the row was left out"] = int((~known_N).sum())
    pool_SI[~pool_SI.any(axis=1)] = True
    return pool_SI


def _check_enough(data: DataConfig, meta: Meta) -> None:
    if meta.events == 0 or meta.items < 2:
        raise DataError(
            f"{data.name}: {meta.items} items and {meta.events} events are left"
            + (f" with data.core={data.core}: lower it" if data.core else "")
        )
    if meta.users_with_events < 2:
        raise DataError(
            f"{data.name}: all events belong to one user; at least 2 users are needed, since one user's choices are learnt from others'"
        )
    empty = ", ".join(name for name, count in meta.splits.items() if count == 0)
    if empty and data.split == "leave_one_out":
        raise DataError(f"{data.name}: no events for {empty}, since no user has 3 events or more: give more events, or set data.split=time")
    if empty:
        raise DataError(
            f"{data.name}: the time split leaves no events for {empty}: check event_time, or set data.valid_share and data.test_share"
        )
