"""The ranker's baselines: nothing leaks through time, counts against loops written out, trees that learn what is planted."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

from oxyray.data.stream import ItemFeatures
from oxyray.errors import ConfigError
from oxyray.reward.baselines.boosted import Boosted, newest
from oxyray.reward.baselines.columns import Columns, Facts
from oxyray.reward.baselines.pointwise import PointWise
from oxyray.reward.pages import Pages, stretches
from oxyray.reward.quality import auc, gauc
from tests.reward.test_ranker import known_pages
from tests.reward.toys import ROUNDING, Toy, random_pages

SEEDS = range(4)
ITEMS, USERS = 12, 4


def point_wise(toy: Toy) -> PointWise:
    torch.manual_seed(toy.log.user_R.sum())
    model = PointWise(toy.config, toy.ranker.vocab).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("most", [100, 5])
def test_a_pointwise_score_rests_on_its_item_and_on_what_was_taken_before(seed: int, most: int):
    toy = Toy(seed)
    model, taken = point_wise(toy), stretches(toy.log, most)
    batch = toy.packer.pack(toy.log, taken)
    known, page_C, rows = known_pages(toy, taken), batch.page_C(), toy.rows(batch)
    rows["item"].requires_grad_()
    assert batch.query_RF is not None
    batch.query_RF.requires_grad_()
    logit_QH = model(batch, rows)
    asked = torch.nonzero(batch.asked_R[page_C])[:, 0].tolist()
    assert len(asked) == len(logit_QH)
    for q, c in enumerate(asked):
        r = int(page_C[c])
        slope_U, slope_R = torch.autograd.grad(logit_QH[q].sum(), (rows["item"], batch.query_RF), retain_graph=True)
        past_C = torch.isin(page_C, torch.tensor(known[r], dtype=torch.long)) & (batch.done_C > 0)
        items = {int(batch.item_C[c]), *batch.item_C[past_C].tolist(), *([int(batch.trigger_R[r])] if batch.trigger_R[r] >= 0 else [])}
        assert set(torch.nonzero(slope_U.abs().sum(1))[:, 0].tolist()) == items
        assert torch.nonzero(slope_R.abs().sum(1))[:, 0].tolist() == [r]


@pytest.mark.parametrize("seed", SEEDS)
def test_changing_own_labels_and_all_that_is_later_changes_no_pointwise_score(seed: int):
    toy = Toy(seed)
    model, taken = point_wise(toy), stretches(toy.log, 100)
    batch = toy.packer.pack(toy.log, taken)
    assert batch.query_RF is not None
    want, page_C = model.chances(batch, toy.rows(batch)), batch.page_C()
    assert (torch.diff(want, dim=1) <= 0).all()
    for r, known in enumerate(known_pages(toy, taken)):
        hidden_C = ~torch.isin(page_C, torch.tensor(known, dtype=torch.long))
        hidden_R = torch.ones(len(batch.asked_R), dtype=torch.bool)
        hidden_R[[*known, r]] = False
        changed = dataclasses.replace(
            batch,
            done_C=torch.where(hidden_C, (batch.done_C + 1) % 4, batch.done_C),
            seen_C=batch.seen_C ^ hidden_C,
            item_C=torch.where(hidden_C & (page_C != r), 0, batch.item_C),
            scenario_R=torch.where(hidden_R, (batch.scenario_R + 1) % 3, batch.scenario_R),
            time_R=torch.where(hidden_R, batch.time_R + 10**6, batch.time_R),
            query_RF=torch.where(hidden_R[:, None], 1.0, batch.query_RF),
        )
        found = model.chances(changed, toy.rows(changed))
        torch.testing.assert_close(found[page_C == r], want[page_C == r], atol=ROUNDING, rtol=0)
    assert (found - want).abs().max() > 1e6 * ROUNDING


def test_the_pointwise_loss_is_the_likelihood_of_the_strongest_action():
    toy = Toy(3)
    model, batch = point_wise(toy), toy.packer.pack(toy.log, stretches(toy.log, 5))
    loss, chance = model.loss(batch, toy.rows(batch)), model.chances(batch, toy.rows(batch))
    reached = torch.cat([torch.ones(len(chance), 1), chance, torch.zeros(len(chance), 1)], dim=1)
    done = batch.done_C[batch.asked_R[batch.page_C()]][:, None]
    want = -torch.log(reached.gather(1, done) - reached.gather(1, done + 1)).sum()
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-9)


def test_a_pointwise_model_without_text_clock_or_users():
    toy = Toy(1, clock=False, user_table=False, text_input=False)
    batch = toy.packer.pack(toy.log, stretches(toy.log, 100))
    loss = point_wise(toy).loss(batch, {"item": toy.rows(batch)["item"]})
    assert torch.isfinite(loss.total)


def shop(seed: int, pages: int = 40, splits: int = 1) -> tuple[Pages, Facts]:
    """Pages of few items, so that they come again and again. Splits are drawn, so users' pages of all splits are mixed."""
    random = np.random.default_rng(seed)
    log = random_pages(seed, users=USERS, pages=pages)
    count = len(log.item_C)
    log = dataclasses.replace(
        log,
        item_C=random.integers(0, ITEMS, count),
        trigger_R=random.integers(-1, ITEMS, pages),
        split_R=random.integers(0, splits, pages).astype(np.int8),
        done_C=np.where(log.seen_C, log.done_C, 0),
    )
    return log, facts(seed)


@dataclasses.dataclass
class Pieces:
    """A log in pieces, users in turn."""

    log: Pages
    parts: int = 1

    def rows(self, part: int) -> np.ndarray:
        return np.flatnonzero(self.log.user_R % self.parts == part)

    def pages(self, part: int) -> Pages:
        log, row_R = self.log, self.rows(part)
        size_R = np.diff(log.offset_R1)
        shown_C = np.isin(np.repeat(np.arange(len(log)), size_R), row_R)
        named = vars(log) | {name: value[row_R] for name, value in vars(log).items() if name.endswith("_R")}
        named |= {name: value[shown_C] for name, value in vars(log).items() if name.endswith("_C")}
        first_R = np.searchsorted(row_R, log.first_R[row_R])
        return Pages(**named | {"first_R": first_R, "offset_R1": np.append(0, np.cumsum(size_R[row_R]))})


def facts(seed: int, items: int = ITEMS, users: int = USERS) -> Facts:
    random = np.random.default_rng(seed)
    features = ItemFeatures(
        torch.from_numpy(random.integers(0, 3, (items, 2))),
        torch.from_numpy(random.integers(0, 5, (items, 2))),
        torch.from_numpy(random.normal(size=(items, 3))),
    )
    return Facts(
        features=features,
        profile_UP=random.integers(0, 5, (users, 2)),
        category_I=random.integers(0, 4, items),
        price_I=random.random(items),
        time_unit_seconds=True,
    )


def shown(log: Pages) -> list[tuple[int, int, int, bool]]:
    """Page, item, what was done and whether it was seen, of every shown item."""
    page_C = np.repeat(np.arange(len(log)), np.diff(log.offset_R1))
    return list(zip(page_C.tolist(), log.item_C.tolist(), log.done_C.tolist(), log.seen_C.tolist(), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_rates_count_training_pages_that_had_ended(seed: int):
    log, known = shop(seed, splits=3)
    found = Columns(known, Pieces(log)).of(log, np.arange(len(log)))
    rows = shown(log)
    for q, (r, item, _, _) in enumerate(rows):
        past = [row for row in rows if log.split_R[row[0]] == 0 and (log.split_R[r] != 0 or log.over_R[row[0]] < log.time_R[r])]
        assert not any(row[0] == r for row in past)
        own = [row for row in past if row[1] == item]
        assert found["item_shown"][q] == sum(seen for *_, seen in own)
        for stage, head in enumerate(("click", "cart", "purchase")):
            came, went = (sum(done >= least for _, _, done, _ in own) for least in (stage, stage + 1))
            all_came, all_went = (sum(done >= least for _, _, done, _ in past) for least in (stage, stage + 1))
            want = (went + 20 * (all_went + 1) / (all_came + 2)) / (came + 20)
            assert found[f"item_{head}_rate"][q] == pytest.approx(want)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_user_did_before_against_a_loop(seed: int):
    log, known = shop(seed)
    assert known.category_I is not None
    code_I, text_IF = known.features.codes_IL[:, 0].numpy(), torch.nn.functional.normalize(known.features.text_IF, dim=1).numpy()
    assert log.query_WF is not None
    # Pages in another order than the log's, and not all of them.
    row_A = np.random.default_rng(seed).permutation(len(log))[:-3]
    found, q = Columns(known, Pieces(log)).of(log, row_A), 0
    rows = shown(log)
    for r in row_A:
        past = [row for row in rows if log.user_R[row[0]] == log.user_R[r] and log.time_R[row[0]] < log.time_R[r]]
        taken = [row for row in past if row[2] > 0]
        for item in log.item_C[log.offset_R1[r] : log.offset_R1[r + 1]]:
            for name, group_I in {"item": np.arange(ITEMS), "category": known.category_I, "code": code_I}.items():
                assert found[f"{name}_taken_before"][q] == sum(group_I[i] == group_I[item] for _, i, _, _ in taken)
                assert found[f"{name}_shown_before"][q] == sum(group_I[i] == group_I[item] for _, i, _, seen in past if seen)
            assert (found["user_taken"][q], found["user_shown"][q]) == (len(taken), sum(seen for *_, seen in past))
            assert found["known_pages"][q] == np.sum((log.user_R == log.user_R[r]) & (log.time_R < log.time_R[r]))
            trigger, query = int(log.trigger_R[r]), log.query_WF[log.query_R[r]]
            same = float(known.category_I[trigger] == known.category_I[item]) if trigger >= 0 else np.nan
            near = {
                "trigger_same_category": same,
                "near_trigger": text_IF[item] @ text_IF[trigger] if trigger >= 0 else np.nan,
                "near_last": text_IF[item] @ text_IF[taken[-1][1]] if taken else np.nan,
                "near_query": text_IF[item] @ query / np.linalg.norm(query) if log.query_R[r] >= 0 else np.nan,
                "price": known.price_I[item] if known.price_I is not None else np.nan,
                "hour": log.time_R[r] // 3600 % 24,
                "since_last": log.time_R[r] - log.time_R[past[-1][0]] if past else np.nan,
            }
            for name, want in near.items():
                assert found[name][q] == pytest.approx(want, abs=1e-6, nan_ok=True), name
            q += 1
    assert all(len(column_Q) == q for column_Q in found.values())


@pytest.mark.parametrize(("seed", "splits"), [(0, 1), (1, 1), (2, 3), (3, 3)])
def test_no_column_depends_on_labels_of_its_own_page_or_of_later_ones(seed: int, splits: int):
    log, known = shop(seed, splits=splits)
    everyone = np.arange(len(log))
    page_C = np.repeat(everyone, np.diff(log.offset_R1))
    want, changes = Columns(known, Pieces(log)).of(log, everyone), 0
    for r in everyone:
        theirs_R = (log.user_R == log.user_R[r]) & (log.time_R < log.time_R[r])
        told_R = theirs_R | ((log.split_R == 0) & ((log.time_R < log.time_R[r]) | (log.split_R[r] != 0)))
        hidden_C = ~told_R[page_C]
        assert hidden_C[page_C == r].all()
        other = dataclasses.replace(log, done_C=np.where(hidden_C, (log.done_C + 1) % 4, log.done_C), seen_C=log.seen_C ^ hidden_C)
        found = Columns(known, Pieces(other)).of(other, everyone)
        for name, column_Q in found.items():
            np.testing.assert_array_equal(column_Q[page_C == r], want[name][page_C == r], err_msg=name)
            changes += not np.array_equal(column_Q, want[name], equal_nan=True)
    assert changes


def test_columns_of_a_shop_that_knows_little():
    log, known = shop(0)
    full = set(Columns(known, Pieces(log)).of(log, np.arange(4)))
    bare = dataclasses.replace(known, features=dataclasses.replace(known.features, text_IF=None), category_I=None, price_I=None)
    found = Columns(dataclasses.replace(bare, time_unit_seconds=False), Pieces(log)).of(log, np.arange(4))
    missing = {"price", "hour", "weekday", "since_last", "near_trigger", "near_last", "near_query"}
    assert full - set(found) == {*missing, "trigger_same_category", "category_shown_before", "category_taken_before"}
    wordless = Columns(known, Pieces(log)).of(dataclasses.replace(log, query_WF=None), np.arange(4))
    assert np.isnan(wordless["near_query"]).all()


def test_a_rate_says_nothing_of_a_label_that_is_noise():
    """To leave out no more than a row's own part would: of one item's rows, those that took it then all have the lower rate."""
    random = np.random.default_rng(0)
    log = random_pages(0, users=50, pages=4000)
    log = dataclasses.replace(
        log,
        item_C=random.integers(0, 5, len(log.item_C)),
        done_C=(random.random(len(log.item_C)) < 0.3).astype(np.int64),
        trigger_R=np.full(len(log), -1),
        time_R=log.time_R + random.integers(0, 100_000, len(log)),
    )
    log = dataclasses.replace(log, over_R=log.time_R)
    known = facts(0, 5, 50)
    rate_Q = Columns(known, Pieces(log)).of(log, np.arange(len(log)))["item_click_rate"]
    assert gauc(rate_Q, log.done_C > 0, log.item_C) == pytest.approx(0.5, abs=0.03)
    count_I, took_I = np.bincount(log.item_C), np.bincount(log.item_C, weights=log.done_C)
    left_out_Q = (took_I[log.item_C] - log.done_C + 6) / (count_I[log.item_C] - 1 + 20)
    assert gauc(left_out_Q, log.done_C > 0, log.item_C) == 0


def test_only_the_newest_training_pages_that_fit():
    log, _ = shop(0, splits=2)
    size_R = np.diff(log.offset_R1)
    for most in (0, 1, 7, 20, 10**6):
        (row_A,) = newest(Pieces(log), most)
        assert (log.split_R[row_A] == 0).all()
        assert (np.diff(row_A) > 0).all()
        assert len(row_A) == 1 or size_R[row_A].sum() <= most
        rest = np.setdiff1d(np.flatnonzero(log.split_R == 0), row_A)
        assert log.time_R[rest].max(initial=-1) <= log.time_R[row_A].min()
        pieces = Pieces(log, 3)
        parted = np.concatenate([pieces.rows(part)[row_A] for part, row_A in enumerate(newest(pieces, most))])
        assert sorted(log.time_R[parted]) == sorted(log.time_R[row_A]) or most < 10**6
        assert len(parted) == 1 or size_R[parted].sum() <= most
        assert log.time_R[np.setdiff1d(np.flatnonzero(log.split_R == 0), parted)].max(initial=-1) <= log.time_R[parted].min()
    assert len(row_A) == (log.split_R == 0).sum()


def test_a_log_in_pieces_gives_the_same_columns():
    log, known = shop(1, splits=3)
    whole, pieces = Columns(known, Pieces(log)), Pieces(log, 3)
    parted = Columns(known, pieces)
    for part in range(3):
        want, found = whole.of(log, pieces.rows(part)), parted.of(pieces.pages(part), np.arange(len(pieces.rows(part))))
        for name, column_Q in want.items():
            np.testing.assert_array_equal(found[name], column_Q, err_msg=name)


def test_without_lightgbm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match="pip install lightgbm"):
        Boosted.fit(Pieces(shop(0)[0]), facts(0))


def planted(seed: int) -> tuple[Pages, Facts]:
    """Users take what is of their category, and some items more than others; the last quarter of the time is the test."""
    random, items, users = np.random.default_rng(seed), 60, 100
    log, known = random_pages(seed, users=users, pages=3000, most=6), facts(seed, items, users)
    assert known.category_I is not None
    item_C = random.integers(0, items, len(log.item_C))
    user_C = np.repeat(log.user_R, np.diff(log.offset_R1))
    liked_U, charm_I = random.integers(0, 4, users), random.normal(size=items)
    level_C = 2.5 * (known.category_I[item_C] == liked_U[user_C]) + charm_I[item_C] - 2
    done_C = sum((random.random(len(item_C)) < 1 / (1 + np.exp(-level_C))).astype(np.int64) for _ in range(2))
    log = dataclasses.replace(
        log, item_C=item_C, done_C=done_C, seen_C=np.ones(len(item_C), bool), trigger_R=random.integers(-1, items, len(log))
    )
    return dataclasses.replace(log, split_R=np.where(log.time_R >= 600_000, 2, 0).astype(np.int8)), known


def test_trees_find_what_is_planted_and_are_the_same_again():
    pytest.importorskip("lightgbm")
    log, known = planted(0)
    row_A = np.flatnonzero(log.split_R == 2)
    done_Q = log.done_C[(log.split_R == 2).repeat(np.diff(log.offset_R1))]
    model = Boosted.fit(Pieces(log), known, trees=80, num_threads=1)
    chance_QH = model.chances(log, row_A)
    assert (chance_QH.dtype, chance_QH.shape) == (np.float32, (len(done_Q), 3))
    assert (np.diff(chance_QH, axis=1) <= 0).all()
    assert auc(chance_QH[:, 0], done_Q > 0) > 0.7
    assert auc(chance_QH[:, 1], done_Q > 1) > 0.7
    assert chance_QH[:, 0].mean() == pytest.approx((done_Q > 0).mean(), abs=0.05)
    np.testing.assert_array_equal(Boosted.fit(Pieces(log), known, trees=80, num_threads=1).chances(log, row_A), chance_QH)
    turned = model.chances(log, row_A[::-1])
    sizes = np.diff(log.offset_R1)[row_A]
    np.testing.assert_array_equal(turned[: sizes[-1]], chance_QH[-sizes[-1] :])


def test_a_head_that_has_one_label_is_a_constant():
    pytest.importorskip("lightgbm")
    log, known = planted(1)
    log = dataclasses.replace(log, done_C=np.minimum(log.done_C, 1))
    clicks = int((log.done_C > 0)[(log.split_R == 0).repeat(np.diff(log.offset_R1))].sum())
    chance_QH = Boosted.fit(Pieces(log), known, trees=5, num_threads=1).chances(log, np.arange(len(log)))
    assert chance_QH[:, 1] / chance_QH[:, 0] == pytest.approx(1 / (clicks + 2), rel=1e-5)
    assert chance_QH[:, 2] / chance_QH[:, 1] == pytest.approx(0.5)


def test_labels_of_pages_that_are_not_trained_on_change_no_chance_of_theirs():
    pytest.importorskip("lightgbm")
    log, known = planted(2)
    last_R = log.time_R == log.time_R.max()
    last_C = last_R.repeat(np.diff(log.offset_R1))
    assert (log.split_R[last_R] == 2).all()
    want = Boosted.fit(Pieces(log), known, trees=20, num_threads=1).chances(log, np.flatnonzero(last_R))
    other = dataclasses.replace(log, done_C=np.where(last_C, 3, log.done_C))
    np.testing.assert_array_equal(Boosted.fit(Pieces(other), known, trees=20, num_threads=1).chances(other, np.flatnonzero(last_R)), want)


def test_a_few_rows_will_do():
    pytest.importorskip("lightgbm")
    log, known = shop(0)
    chance_QH = Boosted.fit(Pieces(log), known, most_rows=5, num_threads=1).chances(log, np.arange(len(log)))
    assert ((chance_QH > 0) & (chance_QH < 1)).all()
