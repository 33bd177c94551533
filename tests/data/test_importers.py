from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxyray.data.importers import values
from oxyray.data.prepared import Prepared
from oxyray.errors import ConfigError, DataError
from tests.data import toy

_ITEMS_CSV = "sku,name,qty_left,price\n" + "".join(f'i{n},"thing, number {n}",7,{n}.50\n' for n in range(6))


def _events_csv(time: Any = lambda seconds: seconds) -> str:
    return "visitorid,itemid,timestamp,event,extra\n" + "".join(
        f"{row['user_id']},{row['item_id']},{time(row['event_time'])},{'view' if n % 2 else 'transaction'},x\n"
        for n, row in enumerate(toy.EVENTS)
    )


def _import(folder: Path, run: Path, **data: Any) -> Prepared:
    return toy.run(folder, run, **{"source": "files", **data})


def _files(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        path = folder / name.replace("__", ".")
        content = text.encode() if isinstance(text, str) else text
        path.write_bytes(gzip.compress(content) if name.endswith("__gz") else content)
    return folder


def test_csv_with_usual_names_needs_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = _import(_files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv__gz=_events_csv()), tmp_path / "run")
    assert prepared.items["title"].to_pylist() == [f"thing, number {n}" for n in range(6)]
    assert prepared.items["price"].to_pylist() == [n + 0.5 for n in range(6)]
    rows = toy.rows_of(prepared)
    assert sorted((r["user"], r["item"], r["time"]) for r in rows) == sorted(
        (e["user_id"], e["item_id"], e["event_time"]) for e in toy.EVENTS
    )
    assert {row["action"] for row in rows} == {"click", "purchase"}
    assert {row["scenario"] for row in rows} == {"toy"}
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["event_time", "timestamp", "epoch", "seconds", "1000"] in shown
    assert ["scenario", "(constant)", "text", "toy"] in shown
    assert ["not", "used:", "extra"] in shown


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (lambda s: s + 1_600_000_000, "epoch seconds"),
        (lambda s: 1000 * (s + 1_600_000_000) + 999, "epoch milliseconds"),
        (lambda s: 1_000_000 * (s + 1_600_000_000), "epoch microseconds"),
        (lambda s: 1_000_000_000 * (s + 1_600_000_000) + 5, "epoch nanoseconds"),
        (lambda s: f"{s + 1_600_000_000}.75", "epoch seconds"),
        (lambda s: f"{(s + 1_600_000_000) / 1e9:.12f}e9", "epoch seconds"),
        (lambda s: datetime.fromtimestamp(s + 1_600_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S"), "ISO time"),
        (lambda s: datetime.fromtimestamp(s + 1_600_000_000 + 7200, UTC).strftime("%Y-%m-%dT%H:%M:%S.123+02:00"), "ISO time"),
    ],
)
def test_times_become_epoch_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str], time: Any, said: str) -> None:
    prepared = _import(_files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=_events_csv(time)), tmp_path / "run")
    assert sorted(row["time"] for row in toy.rows_of(prepared)) == sorted(1_600_000_000 + e["event_time"] for e in toy.EVENTS)
    assert said in capsys.readouterr().out


def test_mapping_words_and_several_files(tmp_path: Path) -> None:
    lines = ["who;what;when;did;where"] + [f"{e['user_id']};{e['item_id']};{e['event_time']};stared;{e['scenario']}" for e in toy.EVENTS]
    folder = _files(tmp_path / "in", items__tsv=_ITEMS_CSV.replace('"', "").replace(", ", " ").replace(",", "\t"))
    for n in range(3):
        _files(folder, **{f"log{n}__csv": "\n".join([lines[0], *lines[1 + 8 * n : 9 + 8 * n]])})
    columns = {"user_id": "who", "item_id": "what", "event_time": "when", "action": "did", "scenario": "where"}
    prepared = _import(folder, tmp_path / "run", events_file="log*.csv", events_columns=columns, action_names={"Stared": "cart"})
    assert prepared.meta.events == len(toy.EVENTS)
    assert {(row["action"], row["scenario"]) for row in toy.rows_of(prepared)} == {("cart", "home")}


def test_parquet_with_other_names_and_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _files(tmp_path / "in")
    moments = pa.array([datetime.fromtimestamp(e["event_time"], UTC) for e in toy.EVENTS], pa.timestamp("us", "UTC"))
    users = pa.array([int(e["user_id"][1:]) for e in toy.EVENTS])
    items = pa.array([e["item_id"] for e in toy.EVENTS]).dictionary_encode()
    pq.write_table(pa.table({"customer_id": users, "sku": items, "ts": moments}), folder / "events.parquet")
    pq.write_table(toy.table([{"sku": item["item_id"], "product_name": item["title"]} for item in toy.ITEMS]), folder / "items.parquet")
    prepared = _import(folder, tmp_path / "run")
    wanted = sorted((e["user_id"][1:], e["item_id"], e["event_time"], "purchase") for e in toy.EVENTS)
    assert sorted((r["user"], r["item"], r["time"], r["action"]) for r in toy.rows_of(prepared)) == wanted
    assert "sku" in capsys.readouterr().out


def test_users_bring_their_profile(tmp_path: Path) -> None:
    users = "user,town,age\nu0,Rome,31\nu1,Oslo,\n"
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=_events_csv(), users__csv=users)
    prepared = _import(folder, tmp_path / "run", users_columns={"city": "town"})
    assert {feature["name"] for feature in prepared.meta.profile} == {"city", "age"}
    assert prepared.users.to_pylist()[prepared.user_index("u0")] == {"user_id": "u0", "city": "Rome", "age": 31.0}


def test_days_written_as_whole_numbers_are_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = [20240101 + n for n in range(len(toy.EVENTS))]
    table = toy.table([e | {"event_time": day} for e, day in zip(toy.EVENTS, days, strict=True)])
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=_events_csv(lambda s: 20240301))
    prepared = _import(folder, tmp_path / "run", split="leave_one_out")
    assert {row["time"] for row in toy.rows_of(prepared)} == {1709251200}
    (folder / "events.csv").unlink()
    pq.write_table(table, folder / "events.parquet")
    prepared = _import(folder, tmp_path / "other")
    assert sorted(row["time"] for row in toy.rows_of(prepared)) == [1704067200 + 86_400 * n for n in range(len(days))]
    assert "ISO time" in capsys.readouterr().out


def test_what_programs_write_for_nothing_is_no_id(tmp_path: Path) -> None:
    """Rows of one request do not see each other: a word taken for a request would fold a history into one page."""
    header = "user_id,item_id,timestamp,request_id,trigger_item_id\n"
    for number, word in enumerate(("", "NULL", "\\N", "nan", "None")):
        lines = [f"{e['user_id']},{e['item_id']},{e['event_time']},{word},{word}" for e in toy.EVENTS]
        lines += [f"{word},i1,1000,r{n},i2" for n in range(3)]
        folder = _files(tmp_path / f"in{number}", items__csv=_ITEMS_CSV, events__csv=header + "\n".join(lines))
        prepared = _import(folder, tmp_path / f"run{number}", max_bad_share=0.2)
        assert (prepared.meta.events, prepared.meta.requests, prepared.meta.merged) == (24, 24, 0)
        assert prepared.meta.quarantined == {"events: user_id is missing": 3}
        assert not prepared.meta.repaired


def test_an_empty_scenario_or_action_takes_the_default(tmp_path: Path) -> None:
    rows = [(e, ("home", "", "NULL")[n % 3], ("view", "", "buy")[n % 3]) for n, e in enumerate(toy.EVENTS)]
    lines = [f"{e['user_id']},{e['item_id']},{e['event_time']},{page if page != 'NULL' else ''},{did}" for e, page, did in rows]
    text = "user_id,item_id,timestamp,page,event\n" + "\n".join(lines)
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=text)
    prepared = _import(folder, tmp_path / "run", default_scenario="elsewhere", default_action="cart")
    found = [(row["scenario"], row["action"]) for row in toy.rows_of(prepared)]
    assert sorted(found) == sorted([("home", "click"), ("elsewhere", "cart"), ("elsewhere", "purchase")] * 8)
    assert prepared.meta.repaired == {
        "events: scenario is empty, data.default_scenario=elsewhere stands for it": 16,
        "events: action is empty, data.default_action=cart stands for it": 8,
    }


def test_a_side_note_that_cannot_be_read_leaves_its_row(tmp_path: Path) -> None:
    items = _ITEMS_CSV.replace("3.50", "on request")
    prepared = _import(_files(tmp_path / "in", items__csv=items, events__csv=_events_csv()), tmp_path / "run")
    assert prepared.items["price"].to_pylist() == [0.5, 1.5, 2.5, None, 4.5, 5.5]
    assert prepared.meta.events == len(toy.EVENTS)
    assert prepared.meta.repaired == {"items: price is not a number (column price), left out": 1}


def test_profile_columns_of_other_types_are_words_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=_events_csv())
    users = {"user": ["u0", "u1"], "member": [True, None], "born": [datetime(2000, 1, 1), None], "tags": [["a"], []], "age": [31.0, None]}
    pq.write_table(pa.table(users), folder / "users.parquet")
    prepared = _import(folder, tmp_path / "run")
    assert {feature["name"] for feature in prepared.meta.profile} == {"member", "age"}
    assert prepared.users.to_pylist()[prepared.user_index("u0")] == {"user_id": "u0", "member": "true", "age": 31.0}
    assert "not used: born, tags" in capsys.readouterr().out


def test_pools_are_imported_too(tmp_path: Path) -> None:
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=_events_csv(), pools__csv="page,sku\ntoy,i1\ntoy,i2\n")
    assert np.flatnonzero(_import(folder, tmp_path / "run").pools["toy"]).tolist() == [1, 2]
    (folder / "pools.csv").write_text("where,sku\ntoy,i1\n")
    with pytest.raises(DataError, match=r"pools\.csv line 1: no column for scenario .*; it has to bear that name"):
        _import(folder, tmp_path / "run")


def test_an_unreadable_cell_is_named_by_file_line_and_column(tmp_path: Path) -> None:
    text = _events_csv().replace("u0,i1,1010", 'u0,"i\n1",1010').replace("u0,i3,1030", "u0,i3,soon")
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=text)
    with pytest.raises(
        DataError, match=r"events_import: 1 of 24 rows .*events\.csv line 6, event_time is not .*\(column timestamp\): 'soon'"
    ):
        _import(folder, tmp_path / "run")
    prepared = _import(folder, tmp_path / "run", max_bad_share=0.1)  # the id with a line break is unknown, so two rows are out
    assert prepared.meta.events == 22
    kept = pq.read_table(tmp_path / "run/data/quarantine/events_import.parquet").to_pylist()
    assert [(row["row"], row["event_time"], Path(row["file"]).name) for row in kept] == [(6, "soon", "events.csv")]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (_events_csv().replace("u2,i2", "u2,i2,more"), r"1 × line has more or fewer fields than the header's 5; first: .* line 14"),
        (_events_csv().replace("view", "gaze"), r"12 × action is none of .*see data\.action_names.*line 3, .*: 'gaze'"),
        (
            _events_csv().replace("itemid", "thing"),
            r"events\.csv line 1: no column for item_id \(the file has: visitorid, thing, .*data\.events_columns\.item_id=",
        ),
        (_events_csv().replace("extra", "event"), r"events\.csv line 1: column 'event' appears twice"),
        (_events_csv().encode().replace(b"u2,", b"\xe9,"), r"events\.csv after line \d+: not UTF-8 text"),
        ("", r"events\.csv: the file is empty"),
        ("user,item,time\n", r"events\.csv: no rows under the header"),
    ],
)
def test_broken_csv_is_one_clear_line(tmp_path: Path, events: str | bytes, said: str) -> None:
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=events)
    with pytest.raises(DataError, match=said) as caught:
        _import(folder, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_wrong_mapping_is_one_clear_line(tmp_path: Path) -> None:
    folder = _files(tmp_path / "in", items__csv=_ITEMS_CSV, events__csv=_events_csv())
    with pytest.raises(DataError, match=r"no column 'visitor_id' \(did you mean 'visitorid'\?\); see data\.events_columns\.user_id"):
        _import(folder, tmp_path / "run", events_columns={"user_id": "visitor_id"})
    with pytest.raises(ConfigError, match=r"data\.events_columns\.person: no such canonical column"):
        _import(folder, tmp_path / "run", events_columns={"person": "visitorid"})
    with pytest.raises(ConfigError, match=r"data\.action_names\.look: must be one of click, cart, purchase, got 'watch'"):
        _import(folder, tmp_path / "run", action_names={"look": "watch"})
    with pytest.raises(DataError, match=r"no file of items there"):
        _import(_files(tmp_path / "half", events__csv=_events_csv()), tmp_path / "run")


_CELLS = (st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(8 * 10**18), 8 * 10**18), st.text(max_size=6))


@given(st.lists(st.one_of(*_CELLS)))
def test_cells_are_read_as_python_reads_them(cells: list[Any]) -> None:
    text = [None if c is None else str(c) for c in cells]
    numbers, bad_N = values.parse(pa.array(text, pa.large_string()), "number")
    whole, not_whole_N = values.parse(pa.array(text, pa.large_string()), "whole")
    for cell, number, bad, integer, not_whole in zip(cells, numbers.to_pylist(), bad_N, whole.to_pylist(), not_whole_N, strict=True):
        if isinstance(cell, float):
            assert number == cell
        if isinstance(cell, int):
            assert integer == cell
        assert not (bad and number is not None)
        assert not (not_whole and integer is not None)


@given(st.lists(st.integers(-(10**15), 10**15)))
def test_milliseconds_round_down(numbers: list[int]) -> None:
    assert values.to_seconds(pa.array(numbers, pa.int64()), "milliseconds").to_pylist() == [n // 1000 for n in numbers]


def _review(form: int, user: str, item: str, time: int) -> dict[str, Any]:
    if form == 2023:
        return {
            "rating": 5.0,
            "title": "Fine",
            "text": "ok",
            "asin": "variant",
            "parent_asin": item,
            "user_id": user,
            "timestamp": 1000 * time + 7,
        }
    return {
        "reviewerID": user,
        "asin": item,
        "reviewerName": 'J. "Jo" O\'Hara',
        "overall": 5.0,
        "reviewText": "it's",
        "unixReviewTime": time,
    }


def _meta(form: int, item: dict[str, Any]) -> str:
    title = item["title"] + ' 5" &amp; more'
    if form == 2014:  # Python's notation, several category paths
        return repr(
            {
                "asin": item["item_id"],
                "title": title,
                "price": 3.5,
                "brand": "L'Or",
                "categories": [["Beauty", "Skin", "Face", "Cream"], ["X"]],
            }
        )
    if form == 2018:
        lines = ["<b>soft</b>", "and &quot;kind&quot;"]
        return json.dumps(
            {"asin": item["item_id"], "title": title, "price": "$1,003.50", "brand": "L'Or", "category": ["Beauty"], "description": lines}
        )
    facts = {"main_category": "All Beauty", "store": "L'Or", "price": None, "categories": [], "features": ["soft"], "description": []}
    return json.dumps({"parent_asin": item["item_id"], "title": title, **facts})


def _amazon(folder: Path, form: int, cut: int = 0) -> Path:
    reviews = [_review(form, e["user_id"], e["item_id"], e["event_time"]) for e in toy.EVENTS]
    reviews += [_review(form, f"once {n}", "i1", 500) for n in range(5)] + [_review(form, "u0", "rare", 100)]
    folder.mkdir(exist_ok=True)
    packed = gzip.compress("\n".join(map(json.dumps, reviews)).encode())
    (folder / ("reviews_Toys_5.json.gz" if form < 2023 else "Toys.jsonl.gz")).write_bytes(packed[: len(packed) - cut])
    meta = [_meta(form, item) for item in [*toy.ITEMS[1:], toy.ITEMS[1], {"item_id": "unseen", "title": "never reviewed"}]]
    (folder / ("meta_Toys.json" if form < 2023 else "meta_Toys.jsonl")).write_text("\n".join(meta))
    return folder


@pytest.mark.parametrize("form", [2014, 2018, 2023])
def test_amazon_reviews_of_each_year(tmp_path: Path, form: int) -> None:
    prepared = toy.run(_amazon(tmp_path / "in", form), tmp_path / "run", source="amazon_reviews", core=3)
    wanted = sorted((e["user_id"], e["item_id"], e["event_time"], "purchase", "toy") for e in toy.EVENTS)
    assert sorted((r["user"], r["item"], r["time"], r["action"], r["scenario"]) for r in toy.rows_of(prepared)) == wanted
    items = {item["item_id"]: item for item in prepared.items.to_pylist()}
    assert items["i0"]["title"] == "i0"  # reviewed, but not in the meta file
    assert items["i2"]["title"] == 'thing number 2 5" & more'
    assert items["i2"]["brand"] == "L'Or"
    assert [items["i2"][name] for name in ("category_1", "category_2", "category_3", "price", "description")] == {
        2014: ["Beauty", "Skin", "Face", 3.5, None],
        2018: ["Beauty", None, None, 1003.5, 'soft and "kind"'],
        2023: ["All Beauty", None, None, None, "soft"],
    }[form]
    assert prepared.users["user_id"].to_pylist() == ["u0", "u1", "u2", "u3"]
    everything = toy.run(_amazon(tmp_path / "in", form), tmp_path / "all", source="amazon_reviews")
    assert everything.meta.events == len(toy.EVENTS) + 6
    assert "unseen" not in everything.items["item_id"].to_pylist()


def test_amazon_lines_that_are_no_reviews_are_quarantined(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    _amazon(folder, 2018)
    path = folder / "reviews_Toys_5.json.gz"
    good = gzip.decompress(path.read_bytes())
    bad = b'{"asin": "i1"}\n__import__("os").abort()\n[1, 2]\n\xff\n'
    path.write_bytes(gzip.compress(bad + good))
    with pytest.raises(DataError, match=r"4 of 34 rows .*first: .*reviews_Toys_5\.json\.gz line 1, line has no reviewerID or user_id"):
        toy.run(folder, tmp_path / "run", source="amazon_reviews")
    prepared = toy.run(folder, tmp_path / "run", source="amazon_reviews", max_bad_share=0.2)
    assert sorted(prepared.meta.quarantined.values()) == [1, 3]
    assert pq.read_table(tmp_path / "run/data/quarantine/events_import.parquet")["row"].to_pylist() == [1, 2, 3, 4]


def test_amazon_files_are_found_by_their_names(tmp_path: Path) -> None:
    folder = _amazon(tmp_path / "in", 2014)
    (folder / "reviews_Toys.json.gz").write_bytes((folder / "reviews_Toys_5.json.gz").read_bytes())
    with pytest.raises(
        DataError,
        match=r"one reviews file is expected .*found 2 \(reviews_Toys\.json\.gz, reviews_Toys_5\.json\.gz\); set data\.events_file=NAME",
    ):
        toy.run(folder, tmp_path / "run", source="amazon_reviews")
    assert toy.run(folder, tmp_path / "run", source="amazon_reviews", events_file="reviews_Toys.json.gz").meta.events == len(toy.EVENTS) + 6
    (folder / "meta_Toys.json").unlink()
    with pytest.raises(DataError, match=r"one meta file is expected"):
        toy.run(folder, tmp_path / "run", source="amazon_reviews", events_file="reviews_Toys.json.gz")


def test_imported_tables_are_canonical_ones(tmp_path: Path) -> None:
    prepared = toy.run(_amazon(tmp_path / "in", 2018), tmp_path / "run", source="amazon_reviews", core=3)
    again = toy.run(tmp_path / "run/source", tmp_path / "again", core=3)
    assert again.meta == prepared.meta
    assert np.array_equal(again.side_IC, prepared.side_IC)
