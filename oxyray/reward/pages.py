"""The ranker's lists: logs to pages, pages to stretches (label packing, paper 2.4.2). One sample is a stretch of one user's requests in
time order, each with the page of items that it showed and what was done with them.

Pages come from a log of exposures where there is one (`exposed_pages`), else from events with seeded, uniformly drawn negatives
(`sampled_pages`): uniform, because drawing by popularity would have to be corrected for in every probability. A drawn item was not seen by
anybody, so later requests learn nothing of it.

The one rule about time: a page knows those pages of its user that were over before it began. So pages of one time do not know each
other: a log writes the pages of one visit together, and their order there may tell which of them was clicked.

Legend: R pages (requests), C items on all pages, E events, B stretches, A asked pages, I items of the catalogue, W distinct queries, F
width of a text vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.data.order import by_time, run_starts
from oxyray.data.prepared import Prepared
from oxyray.data.requests import last_known, timeline
from oxyray.data.tables import Ids, distinct
from oxyray.errors import DataError

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Pages by (user, `over_R`): when they were asked for, and when they were over. `first_R` is the row of the user's first page,
    `visible_R` how many of the user's pages from there on it knows. `done_C` is what was done with an item: 0 nothing, else 1 + the number
    of its strongest action. `seen_C` is False for drawn negatives. `query_R` (-1: none) points into the distinct `queries`; their vectors
    in the shared text space, `query_WF`, are set by whoever has an encoder. `left_out` counts items of the log that the catalogue does not
    know."""

    user_R: Array
    time_R: Array
    over_R: Array
    scenario_R: Array
    trigger_R: Array
    split_R: Array
    first_R: Array
    visible_R: Array
    offset_R1: Array
    item_C: Array
    done_C: Array
    seen_C: Array
    query_R: Array
    queries: tuple[str, ...] = ()
    query_WF: Array | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.user_R)


def exposed_pages(prepared: Prepared, file: Path) -> Pages:
    """Read a log of exposures (`item_ids` and `actions` a page). Raises DataError where it cannot be used."""
    starts = prepared.meta.valid_start, prepared.meta.test_start
    if starts[0] is None or starts[1] is None:
        raise DataError(f"{file}: exposures are split by time; set data.split=time")
    columns = ["user_id", "event_time", "scenario", "trigger_item_id", "item_ids", "actions"]
    try:
        table = pq.read_table(file).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable log of exposures ({str(error).splitlines()[0][:200]})") from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise DataError(f"{file}: a log of exposures needs {', '.join(columns)}; missing: {', '.join(missing)}")
    items = Ids(prepared.items["item_id"].to_pylist())
    size_R = pc.list_value_length(table["item_ids"]).fill_null(0).to_numpy().astype(np.int64)
    if not np.array_equal(size_R, pc.list_value_length(table["actions"]).fill_null(0).to_numpy()):
        raise DataError(f"{file}: a page has another number of actions than of items; every item needs one (0 for nothing)")
    item_C = items.find(pc.list_flatten(table["item_ids"])).astype(np.int64)
    done_C = pc.list_flatten(table["actions"]).fill_null(-1).to_numpy().astype(np.int64)
    if len(done_C) and not 0 <= done_C.min() <= done_C.max() <= len(prepared.meta.actions):
        raise DataError(f"{file}: actions lie in 0..{len(prepared.meta.actions)}, got {done_C.min()}..{done_C.max()}")
    user_R = Ids(prepared.users["user_id"].to_pylist()).find(table["user_id"]).astype(np.int64)
    scenario_R = Ids(prepared.meta.scenarios).find(table["scenario"]).astype(np.int64)
    keep_C = (item_C >= 0) & np.repeat((user_R >= 0) & (scenario_R >= 0), size_R)
    size_R = np.bincount(np.repeat(np.arange(len(size_R)), size_R)[keep_C], minlength=len(size_R))
    time_R = table["event_time"].to_numpy()
    if not size_R.any():
        raise DataError(f"{file}: no page shows a known item to a known user in a known scenario")
    over_R = _over(prepared, user_R, time_R, size_R, item_C[keep_C], done_C[keep_C])
    order_R = np.lexsort((time_R, over_R, user_R))
    order_R = order_R[size_R[order_R] > 0]
    start_R = (np.cumsum(size_R) - size_R)[order_R]
    place_C = np.flatnonzero(keep_C)[ranges(start_R, size_R[order_R])]
    user_R, time_R, over_R = user_R[order_R], time_R[order_R], over_R[order_R]
    first_R = _run_start(run_starts(user_R))
    queries, query_R = _numbered(table["query"] if "query" in table.column_names else pa.nulls(len(size_R), pa.string()))
    return Pages(
        user_R=user_R,
        time_R=time_R,
        over_R=over_R,
        scenario_R=scenario_R[order_R],
        trigger_R=items.find(table["trigger_item_id"]).astype(np.int64)[order_R],
        split_R=by_time(over_R, starts[0], starts[1]),  # what was done after a border is not known before it
        first_R=first_R,
        visible_R=last_known(user_R, over_R, time_R - 1) - first_R,
        offset_R1=np.append(0, np.cumsum(size_R[order_R])),
        item_C=item_C[place_C],
        done_C=done_C[place_C],
        seen_C=np.ones(len(place_C), bool),
        query_R=query_R[order_R],
        queries=queries,
        left_out=int((~keep_C).sum()),
    )


def sampled_pages(events: dict[str, Array], pool_SI: Array, *, negatives: int, seed: int, splits: tuple[int, ...] = (0, 1, 2)) -> Pages:
    """A page a request of a part's events: what was taken, and up to `negatives` items drawn from its scenario's pool (bool per scenario
    and item)."""
    time = timeline(events, splits)
    start_R = np.flatnonzero(run_starts(time.user_E, time.request_E))
    page_E = np.cumsum(run_starts(time.user_E, time.request_E)) - 1
    scenario_R, user_R, items = time.scenario_E[start_R].astype(np.int64), time.user_E[start_R].astype(np.int64), pool_SI.shape[1]
    first_R = _run_start(run_starts(user_R))
    random = np.random.default_rng(seed)
    drawn_RN = np.full((len(start_R), negatives), -1, np.int64)
    for scenario, pool_I in enumerate(pool_SI):
        here, pool = np.flatnonzero(scenario_R == scenario), np.flatnonzero(pool_I)
        if len(pool):
            drawn_RN[here] = pool[random.integers(0, len(pool), (len(here), negatives))]
    taken_C = page_E * items + time.item_E
    drawn_C = (np.arange(len(start_R))[:, None] * items + drawn_RN)[drawn_RN >= 0]
    drawn_C = np.setdiff1d(drawn_C, taken_C)
    page_C, item_C = np.divmod(np.concatenate([taken_C, drawn_C]), items)
    order_C = np.argsort(page_C, kind="stable")
    over_R, event_R = _requests(events, user_R, time.request_E[start_R])
    time_R = time.asked_E[start_R]
    queries, query_R = _numbered(pa.array(events["query"][event_R] if "query" in events else [None] * len(start_R), pa.string()))
    return Pages(
        user_R=user_R,
        time_R=time_R,
        over_R=over_R,
        scenario_R=scenario_R,
        trigger_R=time.trigger_E[start_R].astype(np.int64),
        split_R=np.maximum.reduceat(time.split_E, start_R),  # a request that holds a test event is a test request
        first_R=first_R,
        visible_R=last_known(user_R, over_R, time_R - 1) - first_R,
        offset_R1=np.append(0, np.cumsum(np.bincount(page_C, minlength=len(start_R)))),
        item_C=item_C[order_C],
        done_C=np.append(1 + time.action_E.astype(np.int64), np.zeros(len(drawn_C), np.int64))[order_C],
        seen_C=np.append(np.ones(len(taken_C), bool), np.zeros(len(drawn_C), bool))[order_C],
        query_R=query_R,
        queries=queries,
    )


@dataclass(frozen=True)
class Stretches:
    """Pages `start_B : stop_B` of one user each; those from `asked_B` on are asked, the others are what happened before."""

    start_B: Array
    asked_B: Array
    stop_B: Array

    def __len__(self) -> int:
        return len(self.start_B)

    def take(self, rows: Array) -> Stretches:
        return Stretches(self.start_B[rows], self.asked_B[rows], self.stop_B[rows])


def stretches(pages: Pages, most: int, splits: tuple[int, ...] = (0,)) -> Stretches:
    """Stretches of at most `most` pages that ask every page of `splits` once. A user whose pages are not too many has one; else each asks
    half of `most`, so that a page knows at least the other half where there are as many."""
    row_A = np.flatnonzero(np.isin(pages.split_R, splits))
    first_A = pages.first_R[row_A]
    # Runs of asked pages without a gap, each of one user.
    begin_A = _run_start(run_starts(first_A, row_A - np.arange(len(row_A))))
    begin_U = np.unique(begin_A)
    count_U = np.diff(np.append(begin_U, len(row_A)))
    size_U = np.where(row_A[begin_U] + count_U - first_A[begin_U] <= most, count_U, max(1, most // 2))
    opens = np.flatnonzero((np.arange(len(row_A)) - begin_A) % np.repeat(size_U, count_U) == 0)
    stop_B = row_A[opens] + np.diff(np.append(opens, len(row_A)))
    return Stretches(np.maximum(first_A[opens], stop_B - most), row_A[opens], stop_B)


def _over(prepared: Prepared, user_R: Array, time_R: Array, size_R: Array, item_C: Array, done_C: Array) -> Array:
    """When each page was over: when the events have the last of what it says was done with its items, which may be long after it was shown;
    its own time where they do not tell. Of one user, item and action every event is of one page: the page that has waited longest."""
    names = ["user", "item", "action", "time"]
    logged = [prepared.events(part, names) for part in range(prepared.parts)]
    event = {name: np.concatenate([events[name] for events in logged]).astype(np.int64) for name in names}
    page_A = np.repeat(np.arange(len(size_R)), size_R)[done_C > 0]
    asked = {"user": user_R[page_A], "item": item_C[done_C > 0], "action": done_C[done_C > 0] - 1, "time": time_R[page_A]}
    column = {name: np.concatenate([asked[name], event[name]]) for name in names}
    # By user, item and action, then by time, pages in front of the events of their time.
    is_event = np.arange(len(column["time"])) >= len(page_A)
    order = np.lexsort((is_event, column["time"], column["action"], column["item"], column["user"]))
    is_event, new = is_event[order], run_starts(*(column[name][order] for name in names[:3]))
    key, first = np.cumsum(new) - 1, np.flatnonzero(new)
    before: Array = np.stack([np.cumsum(~is_event) - ~is_event, np.cumsum(is_event) - is_event])
    nth_page, nth_event = before - before[:, first][:, key]
    # A queue: of the pages that wait, each event serves one. So many are served when the event is over:
    span = 1 + len(order)
    at_E = np.flatnonzero(is_event)
    served_E = np.minimum.accumulate((nth_page - nth_event)[at_E] - span * key[at_E]) + span * key[at_E] + nth_event[at_E]
    served_E = np.minimum(served_E, nth_event[at_E] + 1)
    at_A = np.flatnonzero(~is_event)
    place_A = np.searchsorted(key[at_E] * span + served_E, key[at_A] * span + nth_page[at_A] + 1)
    found_A = place_A < len(at_E)
    found_A[found_A] = key[at_E[place_A[found_A]]] == key[at_A[found_A]]
    over_R = time_R.copy()
    np.maximum.at(over_R, page_A[order[at_A[found_A]]], column["time"][order[at_E[place_A[found_A]]]])
    # Of an item's actions in a request the data keep the strongest: a click may stand in the events as a purchase.
    lost_A = order[at_A[~found_A]]
    for action in np.unique(asked["action"][lost_A]):
        these_A, stronger = lost_A[asked["action"][lost_A] == action], event["action"] > action
        served = _next({name: asked[name][these_A] for name in names}, {name: event[name][stronger] for name in names})
        np.maximum.at(over_R, page_A[these_A], served)
    return over_R


def _next(asked: dict[str, Array], event: dict[str, Array]) -> Array:
    """The time of the user's next event on the item; the asked time itself where there is none."""
    user, item, time = (np.concatenate([asked[name], event[name]]) for name in ("user", "item", "time"))
    is_event = np.arange(len(time)) >= len(asked["time"])
    order = np.lexsort((is_event, time, item, user))
    group = np.cumsum(run_starts(user[order], item[order]))
    place = np.where(is_event[order], np.arange(len(order)), len(order))
    next_place = np.minimum.accumulate(place[::-1])[::-1]
    at_A = np.flatnonzero(~is_event[order])
    found_A = next_place[at_A].clip(max=len(order) - 1)
    known_A = (next_place[at_A] < len(order)) & (group[found_A] == group[at_A])
    time_A = asked["time"].copy()
    time_A[order[at_A[known_A]]] = time[order[found_A[known_A]]]
    return time_A


def _requests(events: dict[str, Array], user_R: Array, request_R: Array) -> tuple[Array, Array]:
    """When each request was over, which is the time of its last event; and the row of an event of it."""
    span = 1 + int(events["request"].max(initial=0))
    key_K, row_K, of_E = np.unique(events["user"].astype(np.int64) * span + events["request"], return_index=True, return_inverse=True)
    over_K = np.zeros(len(key_K), np.int64)
    np.maximum.at(over_K, of_E, events["time"])
    at_R = np.searchsorted(key_K, user_R * span + request_R)
    return over_K[at_R], row_K[at_R]


def _numbered(query: pa.ChunkedArray | pa.Array) -> tuple[tuple[str, ...], Array]:
    """The distinct queries, and for each row which one it has (-1: none, as is an empty one)."""
    queries, query_R = distinct(pc.if_else(pc.equal(query, ""), None, query))
    return tuple(queries), np.where(query_R < len(queries), query_R, -1)


def ranges(start_B: Array, length_B: Array) -> Array:
    """Concatenated ranges start : start + length."""
    ends = np.cumsum(length_B)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start_B - (ends - length_B), length_B)


def _run_start(new_R: Array) -> Array:
    """The row at which each row's run began."""
    return np.maximum.accumulate(np.where(new_R, np.arange(len(new_R)), 0))
