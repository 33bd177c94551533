"""Events of one part to requests: who asked, what could be known then, what was taken.

The one rule about time lives here. A request becomes history when it is over (its last event's time); a request may see those requests of
its user that were over when it began, and never itself. On data without request ids each event is a request of its own, and equal times
keep their stored order.

Legend: E events of a part, B segments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Timeline:
    """A part's events ordered by (user, end of request, request). `visible_E` counts the user's events that the event's request may see:
    always the first ones from `user_start_E`. `query_E` says which of the known query texts an event has (-1: none)."""

    user_E: Array
    item_E: Array
    action_E: Array
    scenario_E: Array
    request_E: Array
    trigger_E: Array
    asked_E: Array
    split_E: Array
    user_start_E: Array
    visible_E: Array
    query_E: Array

    def __len__(self) -> int:
        return len(self.user_E)

    def of_rows(self, row_R: Array) -> tuple[Timeline, Array]:
        """All events of the users that these rows belong to, and the rows' places there: few requests need not keep a whole part."""
        keep_E = np.isin(self.user_E, self.user_E[row_R])
        before_E: Array = np.cumsum(keep_E) - keep_E
        kept = {field.name: getattr(self, field.name)[keep_E] for field in fields(self)}
        return Timeline(**kept | {"user_start_E": before_E[kept["user_start_E"]]}), before_E[row_R]


@dataclass(frozen=True)
class Segments:
    """History events `start_B : start_B + length_B` and queries `query_start_B : query_start_B + query_length_B`, both ranges of one
    Timeline."""

    start_B: Array
    length_B: Array
    query_start_B: Array
    query_length_B: Array

    def __len__(self) -> int:
        return len(self.start_B)

    def take(self, rows: Array) -> Segments:
        return Segments(self.start_B[rows], self.length_B[rows], self.query_start_B[rows], self.query_length_B[rows])


def timeline(events: dict[str, Array], splits: tuple[int, ...] = (0, 1, 2)) -> Timeline:
    """Order a part's events (`Prepared.events(part)`) and find what each may see. Events of other splits than `splits` are left out
    altogether."""
    keep = np.isin(events["split"], splits)
    names = ("user", "item", "time", "action", "scenario", "request", "trigger", "split")
    column = {name: events[name][keep] for name in names}
    column["query"] = events["query_row"][keep] if "query_row" in events else np.full(int(keep.sum()), -1)
    begin_E, end_E = _request_times(column["user"], column["request"], column["time"])
    if "asked" in events:  # a request's first event may have been dropped for a stronger action on the same item, or be of another split
        begin_E = events["asked"][keep]
    order = np.lexsort((column["request"], end_E, column["user"]))
    column = {name: values[order] for name, values in column.items()}
    begin_E, end_E = begin_E[order], end_E[order]
    user_E = column["user"]
    user_start_E = _run_start(np.diff(user_E, prepend=-1) != 0)
    new_request = (np.diff(column["request"], prepend=-1) != 0) | (np.diff(user_E, prepend=-1) != 0)
    visible_E = np.minimum(_run_start(new_request), last_known(user_E, end_E, begin_E)) - user_start_E
    return Timeline(
        user_E,
        column["item"],
        column["action"],
        column["scenario"],
        column["request"],
        column["trigger"],
        begin_E,
        column["split"],
        user_start_E,
        visible_E,
        column["query"],
    )


def training_segments(time: Timeline, history: int, one_query: bool = False, most: int | None = None) -> Segments:
    """Segments that ask every event of the timeline once, each seeing up to `history` and, where the user has them, at least half as many
    events. None has more than `most` queries.

    With `one_query` each query has a segment of its own (needed by an encoder that is not causal).
    """
    if one_query:
        return request_segments(time, np.arange(len(time)), history)
    chunk = max(1, history // 2)
    whole, part = (history + 1, chunk) if most is None else (min(history + 1, most), min(chunk, most))
    first = np.flatnonzero(np.diff(time.user_E, prepend=-1) != 0)
    count = np.diff(np.append(first, len(time)))
    size_U = np.where(count <= whole, count, part)
    place_E = np.arange(len(time)) - np.repeat(first, count)
    opens_E = place_E % np.repeat(size_U, count) == 0
    # A request that went on for long knows less than those around it, and one of many events makes the next know much more: what would be
    # too far back for a chunk begins another.
    long_E = np.repeat(count > whole, count)
    opens_E |= (place_E > 0) & long_E & (np.diff(time.visible_E, prepend=0) < 0)
    while True:
        far_E = long_E & (time.visible_E - time.visible_E[_run_start(opens_E)] > chunk)
        if not far_E.any():
            break
        opens_E |= far_E & ~np.concatenate([[False], far_E[:-1]])
    query_start = np.flatnonzero(opens_E)
    query_end = np.append(query_start[1:], len(time))
    first_seen = time.user_start_E[query_start]
    last_seen = first_seen + np.maximum.reduceat(time.visible_E, query_start) if len(query_start) else query_start
    start = np.maximum(first_seen, last_seen - history)
    return Segments(start, last_seen - start, query_start, query_end - query_start)


def request_segments(time: Timeline, events: Array, history: int) -> Segments:
    """One segment and one query for each of `events` (rows of the timeline), with the latest `history` visible events."""
    seen = time.visible_E[events]
    length = np.minimum(seen, history)
    return Segments(time.user_start_E[events] + seen - length, length, np.asarray(events), np.ones(len(events), dtype=np.int64))


def _run_start(new_E: Array) -> Array:
    return np.maximum.accumulate(np.where(new_E, np.arange(len(new_E)), 0))


def _request_times(user_E: Array, request_E: Array, time_E: Array) -> tuple[Array, Array]:
    """Begin and end of each event's request."""
    order = np.lexsort((time_E, request_E, user_E))
    new = (np.diff(request_E[order], prepend=-1) != 0) | (np.diff(user_E[order], prepend=-1) != 0)
    run = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(order)) - 1
    begin_E, end_E = np.empty_like(time_E), np.empty_like(time_E)
    begin_E[order] = time_E[order][first][run] if len(order) else time_E
    end_E[order] = time_E[order][last][run] if len(order) else time_E
    return begin_E, end_E


def last_known(user_E: Array, end_E: Array, begin_E: Array) -> Array:
    """For each event, the row after the last event of its user whose request ended no later than this event's request began."""
    at = np.lexsort(
        (np.concatenate([np.zeros(len(end_E)), np.ones(len(end_E))]), np.concatenate([end_E, begin_E]), np.concatenate([user_E, user_E]))
    )
    is_end = at < len(end_E)
    ended_so_far = np.cumsum(is_end)
    known = np.empty(len(end_E), dtype=np.int64)
    known[at[~is_end] - len(end_E)] = ended_so_far[~is_end]
    return known
