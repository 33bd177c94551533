from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.data import buckets, prepare
from oxyray.data.prepared import EVENT_SCHEMA, Prepared
from oxyray.data.requests import timeline
from oxyray.errors import DataError, RunError
from tests.data import toy

_ACTIONS = ["click", "cart", "purchase"]
_SOUND = {
    "user_id": ["u0", "u1", "u2"],
    "item_id": ["i0", "i1", "i2", "i3"],
    "event_time": [1, 2, 3, 4, 5, 6],
    "action": _ACTIONS,
    "scenario": ["home", "feed"],
    "request_id": ["r0", "r1", None],
    "trigger_item_id": ["i0", "i5", "nowhere", None],
    "query": ["red shoe", None],
    "quantity": [1, 3, None],
    "price": [0.0, 2.5, None],
}
_BROKEN = {
    "user_id": ["", None],
    "item_id": ["nowhere", None],
    "event_time": [-1, 10**11, 10**15, None],
    "action": ["stare", "Click", None],
    "scenario": ["", None],
    "quantity": [0, -2],
    "price": [-1.0],
}
_sound = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in _SOUND.items()})
_fault = st.sampled_from([(name, value) for name, values in _BROKEN.items() for value in values])
_row = st.one_of(_sound, _sound, _sound, st.builds(lambda row, fault: row | dict([fault]), _sound, _fault))


def _is_sound(row: dict[str, Any]) -> bool:
    time, quantity, price = row["event_time"], row["quantity"], row["price"]
    return bool(
        row["user_id"]
        and row["item_id"] in {item["item_id"] for item in toy.ITEMS}
        and time is not None
        and 0 <= time < 10**10
        and row["action"] in _ACTIONS
        and row["scenario"]
        and (quantity is None or quantity >= 1)
        and (price is None or price >= 0)
    )


def _expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The contract, said slowly: sound rows, the strongest action within a request, by user and time."""
    sound = [row | {"place": n} for n, row in enumerate(rows) if _is_sound(row)]
    for row in sound:
        named = row["request_id"]
        row["key"] = (row["user_id"], named) if named is not None else (row["user_id"], None, row["event_time"], row["item_id"])
    first = {}
    for row in sound:
        first[row["key"]] = min(first.get(row["key"], (10**9, 0)), (row["event_time"], row["place"]))
    best: dict[Any, dict[str, Any]] = {}
    for row in sound:
        at = (row["key"], row["item_id"])
        if at not in best or _ACTIONS.index(row["action"]) > _ACTIONS.index(best[at]["action"]):
            best[at] = row
    return sorted(best.values(), key=lambda row: (row["user_id"], row["event_time"], first[row["key"]], row["place"]))


@settings(max_examples=30, deadline=None)
@given(st.lists(_row, min_size=15, max_size=50), st.sampled_from([1, 2, 5]))
def test_prepared_events_equal_the_slow_reading_of_the_contract(rows: list[dict[str, Any]], shards: int) -> None:
    rows += [
        toy.event(f"u{u}", "i0", t, request_id=None, trigger_item_id=None, query=None, quantity=None, price=None)
        for u in (0, 1)
        for t in (7, 8, 9)
    ]
    expected = _expected(rows)
    with toy.folder() as folder:
        source = toy.write(Path(folder) / "tables", rows)
        prepared = toy.run(source, Path(folder) / "run", max_bad_share=1, shards=shards)
        found = toy.rows_of(prepared)
        bad = sum(not _is_sound(row) for row in rows)
        assert sum(prepared.meta.quarantined.values()) == bad
        assert not bad or pq.read_metadata(Path(folder) / "run/data/quarantine/events.parquet").num_rows == bad
        assert prepared.parts == shards
        sizes = [len(prepared.events(part)["user"]) for part in range(shards)]
        assert sum(sizes) == prepared.meta.events == len(expected)
        counts = prepared.train_counts_I()
    found.sort(key=lambda row: row["user"])  # stable: the parts' own order within each user stays
    for row, want in zip(found, expected, strict=True):
        assert (row["user"], row["item"], row["time"], row["action"], row["scenario"]) == (
            want["user_id"], want["item_id"], want["event_time"], want["action"], want["scenario"],
        )  # fmt: skip
        trigger = want["trigger_item_id"]
        assert row["trigger"] == (None if trigger == "nowhere" else trigger)
        assert (row["query"], row["quantity"]) == (want["query"], want["quantity"] or 0)
        assert np.isnan(row["price"]) if want["price"] is None else row["price"] == want["price"]
    pairs = {(row["request"], want["key"]) for row, want in zip(found, expected, strict=True)}
    assert len(pairs) == len({number for number, _ in pairs}) == len({key for _, key in pairs}) == prepared.meta.requests
    wanted = Counter(row["item"] for row in found if row["split"] == 0)
    assert counts.tolist() == [wanted[item] for item in prepared.items["item_id"].to_pylist()]


def test_users_lie_in_one_part_each_and_parts_hold_ranges(tmp_path: Path) -> None:
    rows = [toy.event(f"user {u}", f"i{n % 6}", 100 + n) for u in range(40) for n in range(4)]
    prepared = toy.run(toy.write(tmp_path / "tables", rows), tmp_path / "run", shards=4)
    bounds = [*prepared.meta.part_users, prepared.meta.users]
    assert prepared.users["user_id"].length() == 40
    for part in range(4):
        columns = prepared.events(part)
        assert {name: values.dtype for name, values in columns.items() if name != "query"} == {
            field.name: field.type.to_pandas_dtype() for field in EVENT_SCHEMA if field.name != "query"
        }
        assert sorted(set(columns["user"])) == list(range(bounds[part], bounds[part + 1]))
        for user in set(columns["user"].tolist()):
            mine = prepared.user_events(user)
            assert all((mine[name] == columns[name][columns["user"] == user]).all() for name in ("item", "time", "split", "request"))


def test_shards_and_memory_bounds_change_nothing_but_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy.write(tmp_path / "tables")
    one = toy.rows_of(toy.run(source, tmp_path / "one"))
    monkeypatch.setattr(prepare, "EVENTS_PER_PART", 10)
    monkeypatch.setattr(buckets, "_FLUSH_ROWS", 3)
    many = toy.run(source, tmp_path / "many")
    assert many.parts == 3  # 24 events of at most 10 a part
    drop = lambda rows: sorted(([(k, str(v)) for k, v in row.items() if k != "request"] for row in rows), key=str)  # noqa: E731
    assert drop(toy.rows_of(many)) == drop(one)


def test_profile_and_side_features(tmp_path: Path) -> None:
    users = [{"user_id": "u1", "city": "Rome", "age": 30, "member": True}, {"user_id": "idle", "city": "Oslo", "age": None, "member": None}]
    prepared = toy.run(toy.write(tmp_path / "tables", users=toy.table(users)), tmp_path / "run")
    assert [feature["name"] for feature in prepared.meta.profile] == ["city", "age", "member"]
    assert prepared.users.to_pylist()[prepared.user_index("u1")] == {"user_id": "u1", "city": "Rome", "age": 30.0, "member": "true"}
    assert prepared.profile_UP[prepared.user_index("u2")].tolist() == [0, 0, 0]  # not in the users table: allowed, unknown
    assert (prepared.profile_UP[prepared.user_index("u1")] > 0).all()
    idle = prepared.user_index("idle")
    assert prepared.profile_UP[idle].tolist() == [1, 0, 0]
    assert len(prepared.user_events(idle)["item"]) == 0
    assert prepared.meta.users == 5
    assert prepared.meta.users_with_events == 4
    brand, price = prepared.side_IC.T
    assert [feature["name"] for feature in prepared.meta.side] == ["brand", "price"]
    assert len(set(brand.tolist())) == 2
    assert (np.diff(price) > 0).all()  # toy prices rise with the item's number
    for codes, features in ((prepared.side_IC, prepared.meta.side), (prepared.profile_UP, prepared.meta.profile)):
        assert codes.dtype == np.int32
        assert (codes.max(axis=0) < [feature["size"] for feature in features]).all()


def test_pools(tmp_path: Path) -> None:
    rows = [*toy.EVENTS, toy.event("u0", "i0", 5, scenario="feed"), toy.event("u0", "i5", 6, scenario="feed")]
    pools = [{"scenario": "feed", "item_id": f"i{n}"} for n in (0, 1)] + [{"scenario": "feed", "item_id": "nowhere"}]
    prepared = toy.run(toy.write(tmp_path / "tables", rows, pools=toy.table(pools)), tmp_path / "run")
    assert prepared.pools["feed"].tolist() == [True, True, False, False, False, False]
    assert prepared.pools["home"].all()
    assert prepared.meta.outside_pool == 1
    assert sum(prepared.meta.repaired.values()) == 1


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    source = toy.write(tmp_path / "tables")
    first = toy.run(source, tmp_path / "a").meta.fingerprint
    assert toy.run(source, tmp_path / "b").meta.fingerprint == first
    changed = toy.write(tmp_path / "changed", items=[*toy.ITEMS[:-1], toy.ITEMS[-1] | {"title": "another"}])
    assert toy.run(changed, tmp_path / "c").meta.fingerprint != first


def test_looking_up_what_is_not_there(tmp_path: Path) -> None:
    prepared = toy.run(toy.write(tmp_path / "tables"), tmp_path / "run")
    assert prepared.items["item_id"][prepared.item_index("i3")].as_py() == "i3"
    with pytest.raises(DataError, match="user 'nobody' is not in"):
        prepared.user_index("nobody")
    with pytest.raises(DataError, match="out of range"):
        prepared.user_events(99)
    with pytest.raises(RunError, match="run the stage"):
        Prepared.load(tmp_path / "nowhere")
    (tmp_path / "run/data/events/part-00000.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(RunError, match=r"damaged.*run `oxyray prepare` again"):
        prepared.events(0)


@pytest.mark.parametrize(("name", "numbers"), [("amazon-beauty", (22363, 12101, 198502)), ("amazon-sports", (35598, 18357, 296337))])
def test_public_sets_have_their_published_sizes(public_data: Path, tmp_path: Path, name: str, numbers: tuple[int, int, int]) -> None:
    if not (public_data / name).is_dir():
        pytest.skip(f"no {name} in {public_data}")
    # They are 5-cores already, so asking for one must change nothing.
    meta = toy.run(public_data / name, tmp_path, time_unit="position", core=5).meta
    assert (meta.users, meta.items, meta.events) == numbers
    assert (meta.splits["valid"], meta.splits["test"], meta.merged, meta.quarantined) == (numbers[0], numbers[0], 0, {})


def test_online_retail_has_its_published_size(public_data: Path, tmp_path: Path) -> None:
    if not (public_data / "online-retail").is_dir():
        pytest.skip(f"no online-retail in {public_data}")
    meta = toy.run(public_data / "online-retail", tmp_path, split="time").meta
    assert (meta.users, meta.items, meta.events + meta.merged) == (2578, 3072, 129871)
    assert meta.quarantined == {}
    assert abs(meta.splits["test"] - 0.1 * meta.events) < 0.01 * meta.events


def test_a_request_was_asked_when_it_began_whatever_of_it_is_kept(tmp_path: Path) -> None:
    events = [
        toy.event("u0", "i0", 1000, "click", request_id="first"),
        toy.event("u0", "i1", 1020, "click", request_id="second"),
        toy.event("u0", "i0", 1100, "purchase", request_id="first"),
        *(toy.event("u1", f"i{n}", 1000 + n) for n in range(4)),
        *(toy.event("u0", f"i{n}", 1200 + n) for n in range(3)),
    ]
    prepared = toy.run(toy.write(tmp_path / "tables", events), tmp_path / "run")
    mine = prepared.user_events(0)
    assert mine["time"].tolist() == [1020, 1100, 1200, 1201, 1202]
    assert mine["asked"].tolist() == [1020, 1000, 1200, 1201, 1202]
    time = timeline(prepared.events(0))
    bought = int(np.flatnonzero((time.user_E == 0) & (time.action_E == 2))[0])
    assert time.visible_E[bought] == 0, "the click on i1 came after it was asked"


def test_the_fingerprint_knows_what_was_typed_described_and_shown(tmp_path: Path) -> None:
    def fingerprint(name: str, events: list[Any] | None = None, items: list[Any] | None = None, shown: bytes = b"x") -> str:
        folder = toy.write(tmp_path / name, events, items)
        (folder / "exposures.parquet").write_bytes(shown)
        return toy.run(folder, tmp_path / f"{name}-run", split="time", valid_share=0.2, test_share=0.2).meta.fingerprint

    typed = [row | {"query": "pots"} for row in toy.EVENTS]
    described = [row | {"description": "for the kitchen"} for row in toy.ITEMS]
    found = [fingerprint("plain"), fingerprint("typed", typed), fingerprint("described", None, described), fingerprint("shown", shown=b"y")]
    assert len(set(found)) == 4
    assert fingerprint("again") == found[0]


def test_pools_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    wrong = toy.write(tmp_path / "wrong", pools=[{"scenario": "home", "item_id": "nobody's"}])
    with pytest.raises(DataError, match="none of the items that it names for home is in the items table"):
        toy.run(wrong, tmp_path / "run")
    events = [*(toy.event(f"u{u}", f"i{n}", 1000 + n) for u in range(3) for n in range(4)), toy.event("u0", "i5", 1100, scenario="promo")]
    rare = toy.write(tmp_path / "rare", events, pools=[{"scenario": "promo", "item_id": "i5"}])
    with pytest.raises(DataError, match=r"data\.core=2 leaves no item that may be recommended in promo"):
        toy.run(rare, tmp_path / "run2", core=2)


def test_absurd_quantities_and_empty_categories(tmp_path: Path) -> None:
    events = [row | {"quantity": 3_000_000_000} for row in toy.EVENTS]
    items = [row | {"category_1": "" if n % 2 else "tools"} for n, row in enumerate(toy.ITEMS)]
    prepared = toy.run(toy.write(tmp_path / "tables", events, items), tmp_path / "run")
    assert set(prepared.events(0)["quantity"].tolist()) == {2**31 - 1}
    assert prepared.items["category_1"].to_pylist() == ["tools", None] * 3
