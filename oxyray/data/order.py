"""The order of events and the split: pure functions on arrays.

A request's number rises with its user and the time of its first event. An event without a request id is a request of its own, except that
repeats of one (user, item, time), as double logging makes them, are one. Within a request the same item counts once, with its strongest
action.
Legend: N events, U users, R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")
_BINS = 1 << 16


def number_requests(user_N: np.ndarray, time_N: np.ndarray, item_N: np.ndarray, named_N: np.ndarray) -> np.ndarray:
    """int64 request numbers from 0, by (user, time of the request's first event, input order).

    `named_N` holds a code of the request id, -1 where there is none; the same code at two users means two requests.
    """
    place_N = np.arange(len(user_N))
    # Nameless events are told apart by time and item, named ones by name alone.
    time_key_N, item_key_N = np.where(named_N < 0, time_N, 0), np.where(named_N < 0, item_N, 0)
    order_N = np.lexsort((place_N, time_N, item_key_N, time_key_N, named_N, user_N))
    starts_N = run_starts(user_N[order_N], named_N[order_N], time_key_N[order_N], item_key_N[order_N])
    first_R = order_N[starts_N]
    rank_R = np.empty(len(first_R), np.int64)
    rank_R[np.lexsort((first_R, time_N[first_R], user_N[first_R]))] = np.arange(len(first_R))
    request_N = np.empty(len(user_N), np.int64)
    request_N[order_N] = rank_R[np.cumsum(starts_N) - 1]
    return request_N


def asked(request_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
    """The time of each row's request: that of its first event, whichever of its events are kept."""
    first_R = np.full(int(request_N.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_R, request_N, time_N)
    return first_R[request_N]


def strongest(request_N: np.ndarray, item_N: np.ndarray, action_N: np.ndarray) -> np.ndarray:
    """bool: the rows to keep, one for each (request, item): the strongest action, of equals the first row."""
    order_N = np.lexsort((np.arange(len(item_N)), -action_N.astype(np.int64), item_N, request_N))
    keep_N = np.zeros(len(item_N), bool)
    keep_N[order_N[run_starts(request_N[order_N], item_N[order_N])]] = True
    return keep_N


def run_starts(*keys: np.ndarray) -> np.ndarray:
    """bool: where the combination of keys differs from the row before; the first row is a start."""
    starts_N = np.zeros(len(keys[0]), bool)
    starts_N[:1] = True
    for key_N in keys:
        starts_N[1:] |= key_N[1:] != key_N[:-1]
    return starts_N


def leave_one_out(user_N: np.ndarray, request_N: np.ndarray) -> np.ndarray:
    """int8 split of rows sorted by user and time: each user's last request (by its last event) is test, the last but one valid; below 3
    requests all is train. Numbers of requests are distinct over users."""
    # Requests by their last rows: so they stand by user, and within a user in the order in which they ended.
    last_R, row_R = np.unique(request_N[::-1], return_index=True)
    order_R = np.argsort(-row_R, kind="stable")
    user_R = user_N[len(user_N) - 1 - row_R[order_R]]
    split_R = np.full(len(user_R), TRAIN, np.int8)
    last_U = np.append(np.flatnonzero(run_starts(user_R))[1:], len(user_R)) - 1
    long_U = last_U[np.diff(last_U, prepend=-1) >= 3]
    split_R[long_U], split_R[long_U - 1] = TEST, VALID
    split_of = np.empty(len(last_R), np.int8)
    split_of[order_R] = split_R
    return split_of[np.searchsorted(last_R, request_N)]


def by_time(time_N: np.ndarray, valid_start: int, test_start: int) -> np.ndarray:
    """int8 split: test from `test_start` on, valid from `valid_start` on, train before."""
    return ((time_N >= valid_start).astype(np.int8) + (time_N >= test_start)).astype(np.int8)


def nth_time(times: Callable[[], Iterable[np.ndarray]], rank: int, low: int, high: int) -> int:
    """The time with 0-based `rank` in time order, all times lying in low..high. Counts in passes over `times()`: no sort, little memory."""
    while low < high:
        width = (high - low) // _BINS + 1
        count_B = np.zeros(_BINS, np.int64)
        below = 0
        for time_N in times():
            below += int((time_N < low).sum())
            inside_N = time_N[(time_N >= low) & (time_N <= high)]
            count_B += np.bincount((inside_N - low) // width, minlength=_BINS)
        bin_ = int(np.searchsorted(np.cumsum(count_B) + below, rank, side="right"))
        low, high = low + bin_ * width, min(high, low + (bin_ + 1) * width - 1)
    return low
