"""The shop's truth: stated probabilities are those that the simulator draws from, and the optimum is what brute force says it is."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from oxyray.config import MallConfig
from oxyray.data import mall
from oxyray.data.mall import belief, optimum, people, queries
from oxyray.data.mall.optimum import Optimum
from oxyray.data.mall.pieces import Shared
from oxyray.data.mall.simulate import PERSONA_LASTS, block_users, choose, live
from oxyray.data.mall.slates import KEPT, OUTSIDE
from oxyray.data.mall.utility import action_probability, item_utility, persona_utility, shelf_utility, type_utility
from oxyray.data.mall.world import PATHS, SEARCH
from oxyray.errors import DataError, RunError

DRAWS = 4000


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mall") / "shop"
    mall.write(MallConfig(size="tiny", seed=11, users=128), folder)
    return Optimum(folder)


def some_rows(truth: Optimum, count: int, seed: int = 0) -> np.ndarray:
    """Requests spread over scenarios, late in users' lives."""
    scenario_N, number_N = truth.table["scenario"].to_numpy(), truth.table["number"].to_numpy()
    rng = np.random.default_rng(seed)
    late = [rng.permutation(np.flatnonzero((scenario_N == code) & (number_N >= 6))) for code in range(7)]
    return np.array([rows[turn] for turn, rows in itertools.product(range(-(-count // 7)), late) if turn < len(rows)])[:count]


def one_situation(truth: Optimum, row: int, hidden: bool = True):
    ((users, situation, _),) = truth._situations(np.array([row]), hidden, 1)
    return users, situation


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [np.exp(value - top) if np.isfinite(value) else 0.0 for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_choice(truth: Optimum, row: int) -> np.ndarray:
    """The three-stage choice of one request with known persona and taste, item by item."""
    world, shop = truth.world, truth.world.catalogue
    users, situation = one_situation(truth, row)
    asked, memory, scenario = situation.asked, situation.memory, int(situation.asked.scenario_B[0])
    persona, taste = int(situation.persona_BZ.argmax()), int(situation.taste_BK.argmax())
    of_type = (type_utility(world, users, memory, asked) + persona_utility(world, asked, np.array([persona])))[0]
    share_F, share_I = softmax(of_type.tolist()), np.zeros(shop.items)
    for kind in range(len(shop.goods)):
        shelves = [shelf for shelf in range(len(shop.type_S)) if shop.type_S[shelf] == kind]
        free = [float(shelf_utility(world, users, memory, asked, np.array([[shelf]]))[0, 0]) for shelf in shelves]
        values = [value + float(world.shelf_CKS[scenario, taste, shelf]) for value, shelf in zip(free, shelves, strict=True)]
        if not np.isfinite(values).any():
            assert share_F[kind] == 0
            continue
        for shelf, share in zip(shelves, softmax(values), strict=True):
            items = [item for item in range(shop.items) if shop.shelf_I[item] == shelf]
            liked = [
                float(item_utility(world, users, memory, asked, np.array([[item]]))[0, 0] + world.taste_KI[taste, item]) for item in items
            ]
            if np.isfinite(liked).any():
                share_I[items] = np.array(softmax(liked)) * share * share_F[kind]
    if situation.form_B[0] >= 0:
        wanted = int(situation.wanted_B[0])
        share_I *= [queries.matches(shop, situation.form_B, np.array([wanted]), np.array([[item]]))[0, 0] for item in range(shop.items)]
    return (share_I / share_I.sum())[truth._public_I]


def test_probabilities_equal_the_slow_way(truth):
    rows = some_rows(truth, 7)
    chunks = list(truth.choice_probability(rows, hidden=True))
    found = np.concatenate([share for _, share in chunks])[np.argsort(np.concatenate([places for places, _ in chunks]))]
    assert np.allclose(found.sum(1), 1)
    for row, share_I in zip(rows.tolist(), found, strict=True):
        assert np.allclose(share_I, slow_choice(truth, row), atol=1e-6)


def test_draws_follow_the_stated_probabilities(truth):
    """Chi-square of many draws of one request against the stated probabilities, for each scenario."""
    rng = np.random.default_rng(5)
    for row in some_rows(truth, 7, seed=2).tolist():
        users, situation = one_situation(truth, row)
        many = situation[np.zeros(DRAWS, np.int64)]
        item_B, stated_B = choose(truth.world, users, many.memory, many.asked, many.persona_BZ.argmax(1), many.taste_BK.argmax(1), rng)
        situation.form_B[:] = -1
        share_I = optimum.choice_probability(truth.world, users, situation)[0]
        assert np.allclose(share_I[item_B], stated_B, rtol=1e-4)
        order = np.argsort(share_I)[::-1]
        frequent = order[share_I[order] * DRAWS >= 8]
        seen = np.append(np.bincount(item_B, minlength=len(share_I))[frequent], 0)
        expected = np.append(share_I[frequent] * DRAWS, 0)
        seen[-1], expected[-1] = DRAWS - seen.sum(), DRAWS - expected.sum()
        real = expected > 1e-6
        assert stats.chisquare(seen[real], expected[real] * seen[real].sum() / expected[real].sum()).pvalue > 1e-4


def test_belief_equals_enumeration(truth):
    """The filter against summing over every path that a persona can take from visit to visit."""
    world = truth.world
    users, requests, _ = truth._block(0)
    user = next(
        user
        for user in range(len(users))
        if len(set(requests.visit_N[requests.user_N == user])) >= 3 and (requests.user_N == user).sum() < 60
    )
    places = np.flatnonzero(requests.user_N == user)
    places = places[requests.visit_N[places] <= requests.visit_N[places][0] + 2]
    while requests.visit_N[places[-1]] == requests.visit_N[places[-2]]:
        places = places[:-1]  # stop at the first request of the third visit
    share_Z, next_ZZ = world.people.persona_share_GEZ[users.gender_U[user], users.age_U[user]], world.people.persona_next_ZZ
    likelihood: dict[int, np.ndarray] = {}
    for situation in belief.replay(world, users, requests, places, hidden=True):
        place = int(situation.place_B[0])
        kinds_ZF = belief.type_share(world, users, situation.memory, situation.asked)[0]
        likelihood[place] = kinds_ZF[:, world.catalogue.type_I[requests.item_N[place]]]
    visits = [places[requests.visit_N[places] == visit] for visit in np.unique(requests.visit_N[places])]
    starts = [int(users.joined_U[user])] + [int(requests.time_N[visit[0]]) for visit in visits]
    step = [np.exp(-(b - a) / 86_400 / PERSONA_LASTS) for a, b in itertools.pairwise(starts)]
    move = [stay * np.eye(len(share_Z)) + (1 - stay) * next_ZZ for stay in step]
    weight_Z = np.zeros(len(share_Z))
    for path in itertools.product(range(len(share_Z)), repeat=len(visits)):
        weight = (share_Z @ move[0])[path[0]]
        for turn, visit in enumerate(visits):
            if turn:
                weight *= move[turn][path[turn - 1], path[turn]]
            if turn < len(visits) - 1:
                weight *= np.prod([likelihood[int(place)][path[turn]] for place in visit])
        weight_Z[path[-1]] += weight
    (found,) = [s.persona_BZ[0] for s in belief.replay(world, users, requests, places[-1:], hidden=False)]
    assert np.allclose(found, weight_Z / weight_Z.sum(), atol=1e-9)


def test_belief_learns(truth):
    """What is inferred gives the true persona and taste more than the profile does, and is right as often as it says."""
    world = truth.world
    users, requests, _ = truth._block(0)
    for kind, share_GE in (("persona", world.people.persona_share_GEZ), ("taste", world.people.taste_share_GEK)):
        inferred, prior, claimed = [], [], []
        for situation in belief.replay(world, users, requests, np.arange(len(requests)), hidden=False):
            true = getattr(requests, f"{kind}_N")[situation.place_B]
            share = situation.persona_BZ if kind == "persona" else situation.taste_BK
            rows = situation.asked.user_B
            inferred.append(share[np.arange(len(true)), true])
            claimed.append((share**2).sum(1))
            prior.append(share_GE[users.gender_U[rows], users.age_U[rows], true])
        assert np.log(np.concatenate(inferred)).mean() > np.log(np.concatenate(prior)).mean() + 0.3
        assert abs(np.concatenate(inferred).mean() - np.concatenate(claimed).mean()) < 0.12


def test_best_hit_rate_equals_brute_force_and_is_reached(truth):
    rows = np.flatnonzero(truth.table["number"].to_numpy() >= 4)
    rows = np.random.default_rng(1).permutation(rows)[:400]
    target = truth.world.catalogue.public_I[truth.table["item"].to_numpy()[rows]]
    for hidden in (False, True):
        rates = truth.best_hit_rate(rows, (1, 10), hidden)
        mass, hits = np.zeros(len(rows)), np.zeros(len(rows))
        for places, share_RI in truth.choice_probability(rows, hidden):
            for place, share_I in zip(places, share_RI, strict=True):
                best = sorted(range(len(share_I)), key=lambda item: -share_I[item])[:10]
                mass[place] = sum(share_I[item] for item in best)
                hits[place] = target[place] in best
        assert rates["all"][10] == pytest.approx(mass.mean(), abs=1e-9)
        scenario = truth.table["scenario"].to_numpy()[rows]
        assert rates["search"][10] == pytest.approx(mass[scenario == SEARCH].mean(), abs=1e-9)
        spread = np.sqrt((mass * (1 - mass)).mean() / len(rows))
        assert abs(hits.mean() - mass.mean()) < 4.5 * spread
    blind = truth.best_hit_rate(rows, (10,), query=False)
    assert blind["search"][10] < truth.best_hit_rate(rows, (10,))["search"][10]


@pytest.mark.parametrize("hidden", [True, False])
def test_slate_value_equals_monte_carlo(truth, hidden):
    rng = np.random.default_rng(8)
    world, shop = truth.world, truth.world.catalogue
    rows = some_rows(truth, 7, seed=4)
    shares = np.zeros((len(rows), shop.items))
    for places, share_RI in truth.choice_probability(rows, hidden):
        shares[places] = share_RI
    slate_RL = np.stack(
        [np.concatenate([np.argsort(-share)[:3], rng.choice(np.argsort(-share)[3:], 3, replace=False)]) for share in shares]
    )
    slate_RL[0, 4:] = -1
    (value,) = truth.slate_values(rows, [slate_RL], hidden)
    draws = 6000
    for place, row in enumerate(rows.tolist()):
        users, situation = one_situation(truth, row, hidden)
        slate = truth._public_I[slate_RL[place][slate_RL[place] >= 0]]
        known = situation[np.zeros(1, np.int64)]
        seen = np.zeros((draws, 4))
        combos = rng.multinomial(draws, hidden_share(truth, users, situation).ravel())
        filled = 0
        for combo in np.flatnonzero(combos):
            count = combos[combo]
            persona, taste = divmod(int(combo), len(world.taste_KI))
            known.persona_BZ, known.taste_BK = np.eye(len(world.people.persona_names))[[persona]], np.eye(len(world.taste_KI))[[taste]]
            weight = np.append(optimum.choice_probability(world, users, known)[0][slate], OUTSIDE)
            picked = rng.choice(len(weight), count, p=weight / weight.sum())
            cart, buy = action_probability(world, users, known.memory, known.asked, slate[None], world.taste_KI[taste][slate][None])
            cart, buy, price = np.append(cart[0], 0), np.append(buy[0], 0), np.append(shop.price_I[slate], 0)
            eats = np.append(world.cycle_F[shop.type_I[slate]] > 0, False)
            carted = rng.random(count) < cart[picked]
            bought = carted & (rng.random(count) < buy[picked])
            pieces = 1 + rng.poisson(0.4, count) * eats[picked]
            part = np.stack([picked < len(slate), carted, bought, bought * pieces * price[picked]], axis=1)
            seen[filled : filled + count] = part
            filled += count
        expected = np.array([value.clicks[place], value.carts[place], value.purchases[place], value.turnover[place]])
        error = seen.std(0) / np.sqrt(draws) + 1e-3
        assert (np.abs(seen.mean(0) - expected) < 5 * error).all()


def hidden_share(truth: Optimum, users, situation) -> np.ndarray:
    """(Z, K): what persona and taste may be, once the query (if any) is read."""
    share_ZK = situation.persona_BZ[0][:, None] * situation.taste_BK[0][None]
    if situation.form_B[0] >= 0:
        blind = situation[np.zeros(1, np.int64)]
        every = np.arange(truth.world.catalogue.items)[None]
        match_I = queries.matches(truth.world.catalogue, situation.form_B, situation.wanted_B, every)[0]
        blind.form_B = np.array([-1])
        for persona, taste in itertools.product(range(share_ZK.shape[0]), range(share_ZK.shape[1])):
            blind.persona_BZ, blind.taste_BK = np.eye(share_ZK.shape[0])[[persona]], np.eye(share_ZK.shape[1])[[taste]]
            if share_ZK[persona, taste] > 1e-6:
                share_ZK[persona, taste] *= optimum.choice_probability(truth.world, users, blind)[0][match_I].sum()
    return share_ZK / share_ZK.sum()


def test_better_slates_are_worth_more(truth):
    rows = some_rows(truth, 70, seed=6)
    best, random = np.zeros((len(rows), 5), np.int64), np.zeros((len(rows), 5), np.int64)
    rng = np.random.default_rng(0)
    for places, share_RI in truth.choice_probability(rows, hidden=True):
        best[places] = np.argsort(-share_RI, axis=1)[:, :5]
        random[places] = np.argsort(rng.random(share_RI.shape), axis=1)[:, :5]
    good, poor = truth.slate_values(rows, [best, random])
    assert (good.clicks >= poor.clicks - 1e-9).all()
    assert good.turnover.sum() > 3 * poor.turnover.sum()
    assert ((good.purchases >= 0) & (good.purchases <= good.carts) & (good.carts <= good.clicks) & (good.clicks <= 1)).all()


def test_accessories_fit_what_was_put_in_the_cart(truth):
    shop = truth.world.catalogue
    made, fitted = shop.makes_F[shop.type_I], shop.fits_F[shop.type_I[truth._public_I]]
    trigger = truth.table["trigger"].to_numpy()
    rows = np.flatnonzero(np.isin(truth.table["scenario"].to_numpy(), PATHS) & (trigger >= 0) & (made[trigger] >= 0))
    assert len(rows) >= 10
    fits, accessories, by_chance = 0.0, 0.0, 0.0
    for places, share_RI in truth.choice_probability(rows):
        for place, share_I in zip(places, share_RI, strict=True):
            asked = trigger[rows[place]]
            accessory_I = fitted == made[asked]
            fit_I = accessory_I & (shop.fit_I[truth._public_I] == shop.fit_I[asked])
            if not fit_I.any():
                continue  # a small shop has no accessory for some models
            fits, accessories = fits + share_I[fit_I].sum(), accessories + share_I[accessory_I].sum()
            by_chance += share_I[accessory_I].sum() * fit_I.sum() / accessory_I.sum()
    assert accessories / len(rows) > 0.1, "they are asked for"
    assert fits / accessories > max(0.7, 2 * by_chance / accessories), "and chosen to fit"


def test_pages_agree_with_the_choice_model(truth):
    """Among clicked pages the click falls as p says; clicked and kept unclicked pages stand in the stated odds."""
    world = truth.world
    shown = pq.read_table(truth.folder / "exposures.parquet").to_pydict()
    numbers = {f"I{number:06d}": number for number in range(world.catalogue.items)}
    rows = truth.rows(shown["visit_request_id"])
    share_RI = np.zeros((len(rows), world.catalogue.items), np.float32)
    for places, chunk_RI in truth.choice_probability(rows, hidden=True):
        share_RI[places] = chunk_RI
    type_I = world.catalogue.type_I[truth._public_I]
    pool_CI = world.pool_CI[:, truth._public_I]
    wanted_type = type_I[world.catalogue.public_I[truth.table["item"].to_numpy()[rows]]]
    scenario_R = truth.table["scenario"].to_numpy()[rows]
    expected, clicked, gain, spread = [], [], 0.0, 0.0
    for place, (items, actions) in enumerate(zip(shown["item_ids"], shown["actions"], strict=True)):
        page = np.array([numbers[item] for item in items])
        share = share_RI[place, page].astype(np.float64)
        among = (type_I == wanted_type[place]) if scenario_R[place] == SEARCH else pool_CI[scenario_R[place]]
        outside = KEPT * among[page].sum() / among.sum()
        expected.append(share.sum() / (share.sum() + outside))
        clicked.append(any(actions))
        if any(actions):
            share /= share.sum()
            score = np.log(np.maximum(share, 1e-12))
            gain += score[np.argmax(actions)] - (share * score).sum()
            spread += (share * score**2).sum() - (share * score).sum() ** 2
    assert abs(gain) < 4.5 * np.sqrt(spread)
    expected_R = np.array(expected)
    assert abs(np.mean(clicked) - expected_R.mean()) < 4.5 * np.sqrt((expected_R * (1 - expected_R)).mean() / len(expected_R))


def test_pager_cuts_the_pool_into_pages(truth):
    """Whatever the cut, each item is on one page: a page called up by any of its items is the same set, with the same random draws."""
    for pager, pool_I in zip(Shared.make(truth.world).pagers, truth.world.pool_CI, strict=True):
        pool = np.flatnonzero(pool_I)
        pages: dict[frozenset[int], set[int]] = {}
        for item in pool.tolist():
            page_L = pager.page(np.array([item]), np.random.default_rng(1))[0]
            pages.setdefault(frozenset(page_L[page_L >= 0].tolist()), set()).add(item)
        assert all(page == called for page, called in pages.items())
        assert sum(map(len, pages)) == len(pool)
        assert set().union(*pages) == set(pool.tolist())


def test_requests_are_found_by_user_and_time(truth):
    rows = some_rows(truth, 20)
    events = pq.read_table(truth.folder / "events.parquet")
    users, times = events["user_id"].to_numpy()[rows].tolist(), events["event_time"].to_numpy()[rows]
    assert truth.rows_at(users, times).tolist() == rows.tolist()
    assert truth.rows(events["request_id"].to_numpy()[rows].tolist()).tolist() == rows.tolist()
    with pytest.raises(DataError, match="no such request"):
        truth.rows_at(["U000001"], np.array([12]))
    with pytest.raises(DataError, match="no such request"):
        truth.rows(["U000001-99999"])


def test_truth_of_another_simulator_is_refused(truth, tmp_path):
    with pytest.raises(RunError, match="missing"):
        Optimum(tmp_path)
    about = (truth.folder / "truth" / "shop.json").read_text()
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "shop.json").write_text(about.replace(truth.world.version(), "0" * 16))
    (tmp_path / "truth" / "requests.parquet").write_bytes((truth.folder / "truth" / "requests.parquet").read_bytes())
    with pytest.raises(DataError, match="another version"):
        Optimum(tmp_path)


def test_a_life_has_structure(truth):
    """What makes the shop learnable from sequences: a visit stays with its intent, consumables come back, durables do not."""
    _, requests = live(truth.world, 0)
    assert len(block_users(truth.world, 0)) == truth.world.size.block
    kind_N, same_user = truth.world.catalogue.type_I[requests.item_N], requests.user_N[1:] == requests.user_N[:-1]
    same_visit = same_user & (requests.visit_N[1:] == requests.visit_N[:-1])
    stays = (kind_N[1:] == kind_N[:-1])[same_visit].mean()
    chance = np.mean((np.bincount(kind_N) / len(kind_N)) ** 2) * len(truth.world.catalogue.goods)
    assert stays > 3 * chance
    assert people.draw_rows(np.array([[0.0, 1.0, 0.0]]), np.random.default_rng(0)).tolist() == [1]
