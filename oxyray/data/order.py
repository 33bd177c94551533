"""The order of events and the split: pure functions on arrays.

A request's number rises with its user and the time of its first event. An event without a request id is its own request. Within one request
the same item counts once, with its strongest action. Legend: N events.
"""

from __future__ import annotations

import numpy as np

TRAIN, VALID, TEST = 0, 1, 2


def number_requests(user_N: np.ndarray, time_N: np.ndarray, named_N: np.ndarray) -> np.ndarray:
    """int64 request numbers from 0, by (user, time of the request's first event, input order).

    `named_N` holds a code of the request id, -1 where there is none; the same code at two users means two requests.
    """
    place_N = np.arange(len(user_N))
    span = int(named_N.max(initial=-1)) + 1
    alone_N = named_N < 0
    key_N = np.where(alone_N, -1 - place_N, user_N.astype(np.int64) * max(span, 1) + named_N)
    order_N = np.lexsort((place_N, time_N, key_N))
    starts_N = np.append(True, np.diff(key_N[order_N]) != 0)[: len(order_N)]
    first_R = order_N[starts_N]
    rank_R = np.empty(len(first_R), np.int64)
    rank_R[np.lexsort((first_R, time_N[first_R], user_N[first_R]))] = np.arange(len(first_R))
    request_N = np.empty(len(user_N), np.int64)
    request_N[order_N] = rank_R[np.cumsum(starts_N) - 1]
    return request_N


def strongest(request_N: np.ndarray, item_N: np.ndarray, action_N: np.ndarray) -> np.ndarray:
    """bool: the rows to keep, one for each (request, item): the strongest action, of equals the first row."""
    order_N = np.lexsort((np.arange(len(item_N)), -action_N.astype(np.int64), item_N, request_N))
    first_N = np.append(True, (np.diff(request_N[order_N]) != 0) | (np.diff(item_N[order_N]) != 0))[: len(order_N)]
    keep_N = np.zeros(len(item_N), bool)
    keep_N[order_N[first_N]] = True
    return keep_N


def leave_one_out(user_N: np.ndarray) -> np.ndarray:
    """int8 split of rows sorted by user and time: each user's last event is test, the last but one valid; below 3 events all is train."""
    split_N = np.full(len(user_N), TRAIN, np.int8)
    if not len(user_N):
        return split_N
    last_U = np.append(np.flatnonzero(np.diff(user_N)), len(user_N) - 1)
    long_U = last_U[np.diff(last_U, prepend=-1) >= 3]
    split_N[long_U], split_N[long_U - 1] = TEST, VALID
    return split_N


def by_time(time_N: np.ndarray, valid_start: int, test_start: int) -> np.ndarray:
    """int8 split: test from `test_start` on, valid from `valid_start` on, train before."""
    return ((time_N >= valid_start).astype(np.int8) + (time_N >= test_start)).astype(np.int8)
