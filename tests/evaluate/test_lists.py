"""What the protocols leave out, against the same said with Python sets."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.data.requests import timeline
from oxyray.evaluate.baselines import Lists
from oxyray.evaluate.lists import kept, legal, seen, sids
from oxyray.evaluate.requests import Requests

ITEMS = 12


def random_requests(seed: int, events: int = 30) -> Requests:
    random = np.random.default_rng(seed)
    columns = {
        "user": np.sort(random.integers(0, 4, events)),
        "item": random.integers(0, ITEMS, events),
        "time": random.integers(0, 15, events),
        "action": np.zeros(events, int),
        "scenario": random.integers(0, 2, events),
        "request": random.integers(0, 12, events),
        "trigger": np.full(events, -1),
        "split": random.integers(0, 3, events),
    }
    time = timeline(columns)
    return Requests(0, time, np.flatnonzero(time.split_E == 2))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_protocols_and_sids_equal_sets(seed):
    random = np.random.default_rng(seed)
    requests = random_requests(seed)
    rows = len(requests)
    item_RD = np.argsort(random.random((rows, ITEMS)), axis=1)[:, :9]
    item_RD[random.random(item_RD.shape) < 0.2] = -1
    lists = Lists(item_RD, np.where(item_RD >= 0, -np.arange(9.0), -np.inf).astype(np.float32))
    pool_SI = random.random((2, ITEMS)) < 0.7
    leaf_I = random.integers(0, 5, ITEMS)
    keep_RD = legal(lists, requests, pool_SI) & ~seen(lists, requests, ITEMS)
    found, found_sids = kept(lists, keep_RD, 5), sids(lists.item_RK, leaf_I, 3)
    row_N, item_N = requests.history()
    for r in range(rows):
        history = set(item_N[row_N == r].tolist())
        time = requests.time
        start, visible = time.user_start_E[requests.row_R[r]], time.visible_E[requests.row_R[r]]
        assert history == set(time.item_E[start : start + visible].tolist())
        want = [i for i in item_RD[r].tolist() if i >= 0 and i not in history and pool_SI[requests.scenario_R[r], i]][:5]
        assert found.item_RK[r].tolist() == want + [-1] * (5 - len(want))
        assert np.isneginf(found.score_RK[r][len(want) :]).all()
        distinct = list(dict.fromkeys(leaf_I[i] for i in item_RD[r] if i >= 0))[:3]
        assert found_sids[r].tolist() == distinct + [-1] * (3 - len(distinct))
