"""Order, splits and the k-core against slow, obvious references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.config import DataConfig
from oxyray.data import order
from oxyray.errors import ConfigError, DataError
from tests.data import toy

_sorted_rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=40).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@given(_sorted_rows)
def test_leave_one_out_takes_the_last_two_requests_of_users_with_three(rows: list[tuple[int, int]]) -> None:
    user_N, request_N = (np.array([row[k] for row in rows], np.int64) for k in range(2))
    request_N = request_N + 10 * user_N
    split = order.leave_one_out(user_N, request_N).tolist()
    for user in set(user_N.tolist()):
        mine = [(r, s) for u, r, s in zip(user_N.tolist(), request_N.tolist(), split, strict=True) if u == user]
        by_end = list(dict.fromkeys(r for r, _ in reversed(mine)))[::-1]
        want = dict.fromkeys(by_end, 0) | (dict(zip(by_end[-2:], (1, 2), strict=True)) if len(by_end) >= 3 else {})
        assert [s for _, s in mine] == [want[r] for r, _ in mine]
    alone = order.leave_one_out(user_N, np.arange(len(user_N))).tolist()
    for user in set(user_N.tolist()):
        count = int((user_N == user).sum())
        assert [s for u, s in zip(user_N.tolist(), alone, strict=True) if u == user] == (
            [0] * (count - 2) + [1, 2] if count >= 3 else [0] * count
        )


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=60), st.data())
def test_nth_time_is_the_sorted_list_s(times: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(times) - 1))
    pieces = np.array_split(np.array(times), 3)
    assert order.nth_time(lambda: pieces, rank, min(times), max(times)) == sorted(times)[rank]


_rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2), st.integers(-1, 2), st.integers(0, 2)), max_size=40)


@given(_rows)
def test_requests_and_the_strongest_action(rows: list[tuple[int, int, int, int, int]]) -> None:
    user_N, time_N, item_N, named_N, action_N = (np.array([row[k] for row in rows], np.int64) for k in range(5))
    request_N = order.number_requests(user_N, time_N, item_N, named_N)
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, (user, time, item, named, _) in enumerate(rows):
        groups.setdefault((user, named) if named >= 0 else (user, -1, time, item), []).append(n)
    ordered = sorted(groups.values(), key=lambda g: (rows[g[0]][0], *min((rows[n][1], n) for n in g)))
    assert [request_N[group].tolist() for group in ordered] == [[number] * len(group) for number, group in enumerate(ordered)]
    keep_N = order.strongest(request_N, item_N, action_N)
    for group in ordered:
        for item in {rows[n][2] for n in group}:
            same = [n for n in group if rows[n][2] == item]
            best = max(same, key=lambda n: (rows[n][4], -n))
            assert [n for n in same if keep_N[n]] == [best]


_events = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5), st.integers(0, 60)), min_size=12, max_size=60)


def _prepared(events: list[tuple[int, int, int]], **data: object) -> list[dict[str, object]]:
    with toy.folder() as folder:
        rows = [toy.event(f"u{user}", f"i{item}", time) for user, item, time in events]
        try:
            return toy.rows_of(toy.run(toy.write(Path(folder) / "tables", rows), Path(folder) / "run", **data))
        except DataError:
            return []


@settings(max_examples=15, deadline=None)
@given(_events, st.sampled_from([1, 3]))
def test_no_training_event_is_later_than_what_is_tested(events: list[tuple[int, int, int]], shards: int) -> None:
    # Leave-one-out holds it for each user, the time split for all users at once.
    for row in (alone := _prepared(events, split="leave_one_out", shards=shards)):
        assert all(row["time"] <= later["time"] for later in alone if later["user"] == row["user"] and later["split"] > row["split"])
    by_time = _prepared(events, split="time", valid_share=0.2, test_share=0.2, shards=shards)
    times = [[row["time"] for row in by_time if row["split"] == split] for split in range(3)]
    if by_time:
        assert max(times[0]) < min(times[1])
        assert max(times[1]) < min(times[2])


@settings(max_examples=15, deadline=None)
@given(_events, st.floats(0.1, 0.4), st.floats(0.1, 0.4))
def test_time_split_shares(events: list[tuple[int, int, int]], valid_share: float, test_share: float) -> None:
    rows = _prepared(events, split="time", valid_share=valid_share, test_share=test_share)
    times = sorted(row["time"] for row in rows)
    if rows:
        starts = [times[min(len(times) - 1, round(len(times) * (1 - share)))] for share in (valid_share + test_share, test_share)]
        assert all(row["split"] == sum(row["time"] >= start for start in starts) for row in rows)


@settings(max_examples=15, deadline=None)
@given(_events, st.integers(2, 4), st.sampled_from([1, 3]))
def test_core(events: list[tuple[int, int, int]], core: int, shards: int) -> None:
    left = set(events)  # repeats of one user, item and time count once
    while True:
        users = {u for u, _, _ in left if sum(x == u for x, _, _ in left) >= core}
        kept = {e for e in left if e[0] in users}
        items = {i for _, i, _ in kept if sum(x == i for _, x, _ in kept) >= core}
        kept = {e for e in kept if e[1] in items}
        if kept == left:
            break
        left = kept
    rows = _prepared(events, split="leave_one_out", core=core, shards=shards)
    if rows or len({u for u, _, _ in left}) >= 2:  # fewer users are an error, as is a core without three events of a user
        found = {(int(str(r["user"])[1:]), int(str(r["item"])[1:]), r["time"]) for r in rows}
        assert found == left or (not rows and core < 3)
        assert len(rows) == len(found)


def test_positions_have_no_common_time_to_cut_at() -> None:
    with pytest.raises(ConfigError, match="leave_one_out"):
        DataConfig(name="x", source="tables", path="x", time_unit="position", split="time")
