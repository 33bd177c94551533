"""The baselines: against slow versions of themselves, and against patterns that they must find."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from oxyray.config import SasrecConfig
from oxyray.data.covisits import co_visits
from oxyray.data.requests import timeline
from oxyray.evaluate.baselines import best
from oxyray.evaluate.baselines.knn import Knn
from oxyray.evaluate.baselines.popularity import Popularity
from oxyray.evaluate.baselines.sasrec import FullCrossEntropy, SasrecNet, train, windows
from oxyray.evaluate.requests import TEST, asked


class Shop:
    """Random events in two parts of whole users."""

    parts = 2

    def __init__(self, seed: int, items: int = 15, users: int = 8, events: int = 120, item=None) -> None:
        random = np.random.default_rng(seed)
        user = np.sort(random.integers(0, users, events))
        self.items, self.columns = (
            items,
            {
                "user": user,
                "item": random.integers(0, items, events) if item is None else item,
                "time": np.arange(events),
                "action": np.zeros(events, int),
                "scenario": random.integers(0, 2, events),
                "request": np.arange(events) // 2 * 1000 + user,
                "trigger": np.full(events, -1),
            },
        )
        last = np.append(np.diff(user) != 0, True)
        self.columns["split"] = np.where(last, 2, np.where(np.append(last[1:], False), 1, 0))
        self.middle = int(np.searchsorted(user, users // 2))

    def events(self, part: int) -> dict[str, np.ndarray]:
        rows = slice(0, self.middle) if part == 0 else slice(self.middle, None)
        return {name: values[rows] for name, values in self.columns.items()}

    @property
    def pool_SI(self) -> np.ndarray:
        pool = np.ones((2, self.items), bool)
        pool[1, ::3] = False
        return pool


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_best_is_a_stable_sort(seed, depth):
    random = np.random.default_rng(seed)
    score_RI = random.integers(0, 4, (5, 9)).astype(float)
    score_RI[random.random(score_RI.shape) < 0.3] = -np.inf
    found = best(score_RI, depth)
    for r in range(5):
        want = sorted((i for i in range(9) if np.isfinite(score_RI[r, i])), key=lambda i: (-score_RI[r, i], i))[:depth]
        assert [i for i in found.item_RK[r].tolist() if i >= 0] == want


def test_popularity_counts_the_scenario_then_the_shop():
    shop = Shop(0)
    model = Popularity(shop, shop.pool_SI)
    train_rows = shop.columns["split"] == 0
    pairs = Counter(zip(shop.columns["scenario"][train_rows].tolist(), shop.columns["item"][train_rows].tolist(), strict=True))
    alone = Counter(shop.columns["item"][train_rows].tolist())
    for requests in asked(shop, TEST):
        found = model.recommend(requests, 20)
        for r, scenario in enumerate(requests.scenario_R.tolist()):
            pool = np.flatnonzero(shop.pool_SI[scenario]).tolist()
            want = sorted(pool, key=lambda i: (-pairs[scenario, i], -alone[i], i))
            assert found.item_RK[r].tolist() == want + [-1] * (20 - len(want))


def slow_similarity(shop: Shop, reach: int, backward: float, from_power: float, to_power: float) -> np.ndarray:
    total, count = np.zeros((shop.items, shop.items)), Counter()
    taken = defaultdict(list)
    for part in range(2):
        time = timeline(shop.events(part), splits=(0,))
        for user, item in zip(time.user_E.tolist(), time.item_E.tolist(), strict=True):
            taken[user].append(item)
            count[item] += 1
    for items in taken.values():
        for a, first in enumerate(items):
            for gap, second in enumerate(items[a + 1 : a + 1 + reach], 1):
                total[first, second] += 1 / gap
                total[second, first] += backward / gap
    for i in range(shop.items):
        for j in range(shop.items):
            total[i, j] /= max(count[i], 1) ** from_power * max(count[j], 1) ** to_power
    np.fill_diagonal(total, 0)
    return total


def test_knn_similarity_equals_its_definition():
    shop = Shop(3)
    found = co_visits(shop, shop.items, reach=4, backward=0.3, from_power=0.4, to_power=0.2, neighbours=100).similar_II
    want = slow_similarity(shop, 4, 0.3, 0.4, 0.2)
    np.testing.assert_allclose(found.toarray(), want, rtol=1e-5)
    few = co_visits(shop, shop.items, reach=4, backward=0.3, from_power=0.4, to_power=0.2, neighbours=3).similar_II.toarray()
    for i in range(shop.items):
        assert set(np.flatnonzero(few[i])) == set(np.argsort(-want[i], kind="stable")[:3][np.sort(want[i])[::-1][:3] > 0])


def test_pairs_are_thinned_out_between_parts_where_there_are_too_many():
    shop, powers = Shop(3), {"reach": 4, "backward": 0.3, "from_power": 0.4, "to_power": 0.2}
    want = slow_similarity(shop, *powers.values())
    np.testing.assert_allclose(co_visits(shop, shop.items, **powers, neighbours=100, most=0).similar_II.toarray(), want, rtol=1e-5)
    thin = co_visits(shop, shop.items, **powers, neighbours=1, most=0).similar_II.toarray()
    assert ((thin > 0).sum(axis=1) <= 1).all()
    assert (thin <= want * (1 + 1e-5)).all()
    assert (thin.max(axis=1) >= 0.5 * want.max(axis=1)).mean() > 0.9


def test_knn_scores_by_age_and_fills_up_with_popular_items():
    shop = Shop(4, items=30)
    popularity = Popularity(shop, shop.pool_SI)
    model = Knn(shop, popularity, decay=0.5, history=3)
    for requests in asked(shop, TEST):
        found = model.recommend(requests, 30)
        row_N, item_N = requests.history(3)
        for r in range(len(requests)):
            latest_first = item_N[row_N == r][::-1]
            score = sum(0.5**age * model.similar_II[item].toarray()[0] for age, item in enumerate(latest_first))
            pool = shop.pool_SI[requests.scenario_R[r]]
            near = sorted((i for i in range(30) if pool[i] and score[i] > 0), key=lambda i: (-np.float32(score[i]), i))
            fill = [i for i in popularity.order_S[requests.scenario_R[r]] if i not in near]
            assert found.item_RK[r].tolist() == near + fill + [-1] * (30 - len(near) - len(fill))


def test_full_cross_entropy_equals_torch():
    torch.manual_seed(0)
    h, table, target = torch.randn(300, 6, dtype=torch.double), torch.randn(40, 6, dtype=torch.double), torch.randint(0, 40, (300,))
    leaves = [x.clone().requires_grad_() for x in (h, table, h, table)]
    ours = FullCrossEntropy.apply(leaves[0], leaves[1], target)
    theirs = F.cross_entropy(leaves[2] @ leaves[3].T, target, reduction="sum")
    (3 * ours).backward()
    (3 * theirs).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(leaves[0].grad, leaves[2].grad)
    torch.testing.assert_close(leaves[1].grad, leaves[3].grad)


def test_a_state_never_depends_on_a_later_item():
    net = SasrecNet(20, SasrecConfig(width=8, heads=2, history=7)).eval()
    items = torch.randint(0, 20, (3, 7))
    changed = items.clone()
    changed[:, 4:] = torch.randint(0, 20, (3, 3))
    torch.testing.assert_close(net(items)[:, :4], net(changed)[:, :4])


@pytest.mark.parametrize("history", [4, 50])
def test_windows_ask_every_training_event_once_and_only_from_its_past(history):
    shop = Shop(5)
    wins = windows(shop, history)
    assert wins.length_B.max() <= history
    found = Counter()
    for b in range(len(wins.start_B)):
        window = wins.item_N[wins.start_B[b] : wins.start_B[b] + wins.length_B[b]].tolist()
        for t in range(wins.first_B[b], wins.first_B[b + 1]):
            found[tuple(window[: wins.at_T[t] + 1])[-2:], int(wins.target_T[t])] += 1
    want = Counter()
    for part in range(2):
        time = timeline(shop.events(part), splits=(0,))
        for e in range(len(time)):
            past = time.item_E[time.user_start_E[e] : time.user_start_E[e] + time.visible_E[e]].tolist()
            if past:
                want[tuple(past[-2:]), int(time.item_E[e])] += 1
    assert sum(found.values()) == sum(want.values())
    assert found == want


def test_sasrec_learns_a_rule():
    """Each item is followed by the next one of a ring: what was seen last decides."""
    shop = Shop(6, items=60, users=40, events=1200)
    user = shop.columns["user"]
    step = np.arange(len(user)) - np.searchsorted(user, user)
    shop.columns["item"] = (user * 7 + step) % 60
    shop.columns["request"] = np.arange(len(user))
    config = SasrecConfig(width=16, layers=1, heads=1, dropout=0.1, history=8, lr=1e-2, epochs=12, patience=12, targets_per_step=120)
    popularity = Popularity(shop, shop.pool_SI)
    lines = []
    model = train(shop, shop.pool_SI, config, popularity, seed=1, log=lines.append)
    requests = list(asked(shop, TEST))
    assert model.recall(requests, 10) > 0.95
    assert lines[-1]["loss"] < lines[0]["loss"]
    found = model.recommend(requests[0], 5)
    assert shop.pool_SI[requests[0].scenario_R[:, None], found.item_RK].all()


def test_the_same_seed_trains_the_same_sasrec():
    shop, config = Shop(8), SasrecConfig(width=8, epochs=2, history=4, targets_per_step=30)
    popularity = Popularity(shop, shop.pool_SI)
    ours, theirs = (train(shop, shop.pool_SI, config, popularity, seed=1).net.parameters() for _ in range(2))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_a_newcomer_gets_popular_items():
    shop = Shop(7, users=4, events=30)
    first = np.flatnonzero(np.diff(shop.columns["user"], prepend=-1) != 0)
    shop.columns["split"][first] = 2
    popularity = Popularity(shop, shop.pool_SI)
    model = train(shop, shop.pool_SI, SasrecConfig(width=8, epochs=1, history=4), popularity, seed=0)
    cold = 0
    for requests in asked(shop, TEST):
        found, popular = model.recommend(requests, 5), popularity.recommend(requests, 5)
        for r in np.flatnonzero(requests.stop_R == requests.start_R):
            assert found.item_RK[r].tolist() == popular.item_RK[r].tolist()
            cold += 1
    assert cold == 4
