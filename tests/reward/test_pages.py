"""Label packing: logs to pages against the rules written out, stretches that ask every page once, files that cannot be used."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.config import Config, DataConfig, MallConfig
from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.errors import DataError
from oxyray.reward.pages import Pages, _over, exposed_pages, sampled_pages, stretches
from oxyray.run import Run
from tests.data import toy
from tests.reward.toys import random_pages

TIMES = [1000 + 10 * n + u for u in range(4) for n in range(6)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("shop")
    return toy.run(toy.write(folder / "tables"), folder / "run", split="time", valid_share=0.2, test_share=0.2)


def page(user: str, time: int, items: list[str], actions: list[Any], scenario: str = "home", trigger: str | None = None) -> dict[str, Any]:
    return {"user_id": user, "event_time": time, "scenario": scenario, "trigger_item_id": trigger, "item_ids": items, "actions": actions}


def read(prepared: Prepared, folder: Path, rows: list[dict[str, Any]]) -> Pages:
    pq.write_table(pa.Table.from_pylist(rows), folder / "exposures.parquet")
    return exposed_pages(prepared, folder / "exposures.parquet")


def test_exposures_are_ordered_numbered_and_split(prepared: Prepared, tmp_path: Path):
    late = prepared.meta.test_start
    assert late is not None
    rows = [
        page("u1", 1030, ["i1", "i2"], [0, 2], trigger="i0"),
        page("u0", late, ["i3"], [1]),
        page("u0", 1000, ["i4", "nobody's", "i5"], [0, 3, 2]),
        page("u0", 1000, ["i0"], [0]),
        page("u0", 1010, ["i1"], [3]),
        page("stranger", 1010, ["i1", "i2"], [3, 0]),
        page("u2", 1010, ["nothing"], [3]),
        page("u2", 1010, ["i1"], [3], scenario="elsewhere"),
        page("u2", 1010, [], []),
    ]
    found = read(prepared, tmp_path, rows)
    names = prepared.items["item_id"].to_pylist()
    assert [prepared.users["user_id"][int(u)].as_py() for u in found.user_R] == ["u0"] * 4 + ["u1"]
    assert found.time_R.tolist() == [1000, 1000, 1010, late, 1030]
    assert [names[i] for i in found.item_C] == ["i4", "i5", "i0", "i1", "i3", "i1", "i2"]
    assert found.done_C.tolist() == [0, 2, 0, 3, 1, 0, 2]
    assert found.offset_R1.tolist() == [0, 2, 3, 4, 5, 7]
    assert found.visible_R.tolist() == [0, 0, 2, 3, 0]
    assert found.split_R.tolist() == [0, 0, 0, 2, 0]
    assert found.trigger_R.tolist() == [-1, -1, -1, -1, names.index("i0")]
    assert (found.left_out, found.seen_C.all(), found.queries) == (5, True, ())
    rows[0]["query"], rows[3]["query"] = "pans", "pots"
    found = read(prepared, tmp_path, rows)
    assert [found.queries[q] if q >= 0 else None for q in found.query_R] == [None, "pots", None, None, "pans"]


def test_a_page_is_over_when_the_last_of_what_it_says_was_done(tmp_path: Path):
    late = [toy.event("u0", "i3", 1037), toy.event("u0", "i3", 1039, "purchase"), toy.event("u0", "i3", 1080, "purchase")]
    tables = toy.write(tmp_path / "tables", [*toy.EVENTS, *late])
    prepared = toy.run(tables, tmp_path / "run", split="time", valid_share=0.2, test_share=0.2)
    rows = [
        page("u0", 1031, ["i2", "i3"], [0, 3]),  # i3 was bought at 1039
        page("u0", 1032, ["i4", "i5"], [0, 2]),  # of a cart the events know nothing
        page("u0", 1033, ["i0"], [0]),
        page("u0", 1038, ["i1"], [0]),
        page("u0", 1039, ["i1"], [0]),
        page("u0", 1040, ["i1"], [0]),
    ]
    found = read(prepared, tmp_path, rows)
    assert found.time_R.tolist() == [1032, 1033, 1038, 1031, 1039, 1040]
    assert found.over_R.tolist() == [1032, 1033, 1038, 1039, 1039, 1040]
    assert found.visible_R.tolist() == [0, 1, 2, 0, 3, 5]
    names = prepared.items["item_id"].to_pylist()
    assert [names[i] for i in found.item_C] == ["i4", "i5", "i0", "i1", "i2", "i3", "i1", "i1"]


@given(st.integers(0, 10**6), st.integers(1, 25))
@settings(max_examples=80, deadline=None)
def test_when_pages_are_over_against_a_look_at_every_event(seed: int, pages: int):
    random = np.random.default_rng(seed)

    class Events:
        parts = 2

        def events(self, part: int, columns: list[str]) -> dict[str, np.ndarray]:
            assert columns == ["user", "item", "action", "time"]
            return {name: column[part::2] for name, column in logged.items()}

    count = int(random.integers(0, 30))
    logged = {"user": random.integers(0, 3, count), "item": random.integers(0, 4, count), "action": random.integers(0, 3, count),
              "time": random.integers(0, 20, count)}  # fmt: skip
    user_R, time_R, size_R = random.integers(0, 3, pages), random.integers(0, 20, pages), random.integers(0, 4, pages)
    item_C, done_C = random.integers(0, 4, size_R.sum()), random.integers(0, 4, size_R.sum())
    want, page_C = time_R.copy(), np.repeat(np.arange(pages), size_R)
    for user, item, action in itertools.product(range(3), range(4), range(3)):
        here = (user_R[page_C] == user) & (item_C == item) & (done_C == action + 1)
        waiting = [(int(time_R[page]), 0, int(page)) for page in page_C[here]]
        same = (logged["user"] == user) & (logged["item"] == item) & (logged["action"] == action)
        queue: list[int] = []
        for time, is_event, page in sorted([*waiting, *((int(time), 1, -1) for time in logged["time"][same])]):
            if not is_event:
                queue.append(page)
            elif queue:
                served = queue.pop(0)
                want[served] = max(want[served], time)
        on_item = logged["time"][(logged["user"] == user) & (logged["item"] == item) & (logged["action"] > action)]
        for page in queue:  # what was done stands in the events as something stronger
            want[page] = max([int(want[page]), *sorted(int(time) for time in on_item if time >= time_R[page])[:1]])
    assert _over(Events(), user_R, time_R, size_R, item_C, done_C).tolist() == want.tolist()  # type: ignore[arg-type]


def test_exposures_that_cannot_be_used(prepared: Prepared, tmp_path: Path):
    with pytest.raises(DataError, match="another number of actions"):
        read(prepared, tmp_path, [page("u0", 1000, ["i1", "i2"], [0])])
    for action in (4, -1, None):
        with pytest.raises(DataError, match=r"actions lie in 0\.\.3"):
            read(prepared, tmp_path, [page("u0", 1000, ["i1", "i2"], [0, action])])
    with pytest.raises(DataError, match="missing: trigger_item_id"):
        read(prepared, tmp_path, [{k: v for k, v in page("u0", 1000, ["i1"], [0]).items() if k != "trigger_item_id"}])
    with pytest.raises(DataError, match="no page shows a known item"):
        read(prepared, tmp_path, [page("stranger", 1000, ["i1"], [0])])
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a readable log"):
        exposed_pages(prepared, tmp_path / "junk.parquet")


def test_the_embedded_shop_packs(tmp_path: Path):
    data = DataConfig(name="mall", source="mall", mall=MallConfig(size="tiny"))
    prepare(Config(run_dir=str(tmp_path), data=data), Run(tmp_path))
    prepared = Prepared.load(tmp_path / "data")
    assert prepared.exposures is not None
    pages = exposed_pages(prepared, prepared.exposures)
    clicks = np.add.reduceat(pages.done_C > 0, pages.offset_R1[:-1])
    assert clicks.max() == 1
    assert (clicks == 1).sum() == prepared.meta.requests
    assert pages.left_out == 0
    taken = stretches(pages, 30)
    assert (taken.stop_B - taken.asked_B).sum() == (pages.split_R == 0).sum()


@st.composite
def events(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Random events whose requests overlap in time, as `Prepared.events` gives them."""
    count = draw(st.integers(1, 30))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    user, asked = np.sort(random.integers(0, 3, count)), random.integers(0, 6, count)
    return {
        "user": user,
        "item": random.integers(0, 9, count),
        "time": random.integers(0, 12, count),
        "action": random.integers(0, 3, count),
        "scenario": np.zeros(count, int),
        "request": user * 10 + asked,
        "trigger": random.integers(-1, 9, count),
        "split": random.integers(0, 3, count),
        "query": np.where(asked > 2, asked.astype(str).astype(object), None),
    }


@given(events(), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_pages_of_events(columns: dict[str, np.ndarray], negatives: int):
    pool_SI = np.arange(9)[None] < 7
    found = sampled_pages(columns, pool_SI, negatives=negatives, seed=5)
    again = sampled_pages(columns, pool_SI, negatives=negatives, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(vars(found).values(), vars(again).values(), strict=True) if a is not None)
    rows_of = {r: np.flatnonzero(columns["request"] == r) for r in np.unique(columns["request"])}
    assert len(found) == len(rows_of)
    span = {r: (columns["time"][rows].min(), columns["time"][rows].max()) for r, rows in rows_of.items()}
    page_of = {}
    for n in range(len(found)):
        here = slice(found.offset_R1[n], found.offset_R1[n + 1])
        item, done, seen = found.item_C[here], found.done_C[here], found.seen_C[here]
        taken = {(i, d) for i, d in zip(item, done, strict=True) if d > 0}
        match = [
            r
            for r, rows in rows_of.items()
            if columns["user"][rows[0]] == found.user_R[n]
            and span[r] == (found.time_R[n], found.over_R[n])
            and {(i, 1 + a) for i, a in zip(columns["item"][rows], columns["action"][rows], strict=True)} == taken
            and r not in page_of.values()
            and (found.queries[found.query_R[n]] if found.query_R[n] >= 0 else None) == columns["query"][rows[0]]
        ]
        assert match, "a page is a request"
        page_of[n] = match[0]
        drawn = item[~seen]
        assert (done[~seen] == 0).all()
        assert (done[seen] > 0).all()
        assert len(set(drawn)) == len(drawn) <= negatives
        assert set(drawn) <= set(range(7)) - set(item[seen])
        first = found.first_R[n]
        for k in range(first, first + found.visible_R[n]):
            assert found.user_R[k] == found.user_R[n]
            assert found.over_R[k] < found.time_R[n]
        unknown = range(first + found.visible_R[n], len(found))
        assert not any(found.user_R[k] == found.user_R[n] and found.over_R[k] < found.time_R[n] for k in unknown)
        assert found.split_R[n] >= max(columns["split"][rows_of[page_of[n]]]) or len(match) > 1


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 12), st.sets(st.integers(0, 2), min_size=1))
@settings(max_examples=150, deadline=None)
def test_stretches_ask_every_page_once(seed: int, count: int, most: int, splits: set[int]):
    pages = random_pages(seed, pages=count)
    pages.split_R[:] = np.random.default_rng(seed).integers(0, 3, count)
    found = stretches(pages, most, tuple(splits))
    asked = [row for a, b in zip(found.asked_B, found.stop_B, strict=True) for row in range(a, b)]
    assert sorted(asked) == np.flatnonzero(np.isin(pages.split_R, list(splits))).tolist()
    assert (found.stop_B - found.start_B <= most).all()
    assert (pages.user_R[found.start_B] == pages.user_R[found.stop_B - 1]).all()
    before = found.asked_B - pages.first_R[found.asked_B]
    assert (found.asked_B - found.start_B >= np.minimum(before, most - max(1, most // 2))).all()
