"""What other users took after the same items, against plain loops; and what the policy learns of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from oxyray.config import Config, DataConfig, ModelConfig
from oxyray.data.covisits import CoVisits, co_visits
from oxyray.data.requests import timeline, training_segments
from oxyray.errors import ConfigError, TrainingError
from oxyray.model.followers import DECAY, LATEST, Followers
from oxyray.model.losses import item_nll
from tests.model.toys import Toy


class Shop:
    """One part of users with the given items, each event a request of its own."""

    parts = 1

    def __init__(self, taken: list[list[int]]) -> None:
        user = np.repeat(np.arange(len(taken)), [len(items) for items in taken])
        count = len(user)
        zeros = np.zeros(count, dtype=np.int64)
        self.columns = {"user": user, "item": np.concatenate(taken), "time": np.arange(count), "action": zeros, "scenario": zeros,
                        "request": np.arange(count), "trigger": zeros - 1, "query_row": zeros - 1, "split": zeros}  # fmt: skip

    def events(self, part: int) -> dict[str, Any]:
        return self.columns


def made(taken: list[list[int]]) -> tuple[CoVisits, Any]:
    toy, shop = Toy(history=14), Shop(taken)
    time = timeline(shop.columns, splits=(0,))
    return co_visits(shop, 40, neighbours=50), toy.collate(time, training_segments(time, 14))


def test_followers_are_what_the_plain_sum_says() -> None:
    random = np.random.default_rng(2)
    taken = [random.integers(0, 40, random.integers(2, 15)).tolist() for _ in range(6)]
    visits, batch = made(taken)
    found_QI = Followers(visits)(batch).numpy()
    similar_II, query = visits.similar_II.toarray().astype(np.float64), 0
    for items in taken:
        for at, target in enumerate(items):
            latest = items[:at][::-1][:LATEST]
            score_I = sum((DECAY**age * similar_II[item] for age, item in enumerate(latest)), np.zeros(40))
            own = sum(DECAY**age / (age + 1) / (visits.from_I[item] * visits.to_I[target]) for age, item in enumerate(latest))
            score_I[target] = max(score_I[target] - own, 0)
            score_I[latest] = 0
            want_I = score_I / score_I.sum() if score_I.sum() > 1e-9 else np.eye(40)[target]
            np.testing.assert_allclose(found_QI[query], want_I, atol=1e-5)
            query += 1
    assert query == len(found_QI)


def test_a_step_that_nobody_else_made_is_no_follower() -> None:
    visits, batch = made([[1, 2, 3], [1, 4], [5, 6]])
    found_QI = Followers(visits)(batch)
    after_one = found_QI[1]  # the first user's second event: 2 after 1, which is the user's own step; 4 is what another took
    assert after_one[2] == pytest.approx(0, abs=1e-6)
    assert after_one[4] > 0
    assert found_QI[6, 6] == 1  # 6 after 5: nobody else took 5, so the item taken alone is right


def test_the_item_softmax_and_what_is_distilled_of_it_learn_their_share() -> None:
    torch.manual_seed(1)
    query, item, target = torch.randn(5, 4, dtype=torch.double), torch.randn(9, 4, dtype=torch.double), torch.arange(5)
    right = torch.softmax(torch.randn(5, 9, dtype=torch.double), -1)
    loss, prob = item_nll(query, item, target, None, 9, None, (0.3, right))
    logprob = torch.log_softmax(query @ item.T, -1)
    soft = 0.7 * torch.nn.functional.one_hot(target, 9) + 0.3 * right
    torch.testing.assert_close(loss, -(soft * logprob).sum(-1))
    assert prob is not None
    torch.testing.assert_close(prob, 0.7 * logprob.exp() + 0.3 * right)


def test_the_policy_learns_from_followers_in_training_alone() -> None:
    visits, batch = made([[1, 2, 3], [1, 4, 2], [5, 6]])
    taught = Toy(history=14, followers=0.4, distill=1.0)
    rows = taught.lookup(batch.lookups())
    plain = taught.policy.loss(batch, rows).parts
    with pytest.raises(TrainingError, match="the policy knows none"):
        taught.policy.train().loss(batch, rows)
    names = set(taught.policy.state_dict())
    taught.policy.followers = Followers(visits)
    assert set(taught.policy.state_dict()) == names == set(Toy(history=14, distill=1.0).policy.state_dict())
    learned = taught.policy.loss(batch, rows).parts
    assert learned["item"] != pytest.approx(plain["item"])
    assert learned["distill"] != pytest.approx(plain["distill"])
    assert learned["ntp"] == pytest.approx(plain["ntp"])
    assert taught.policy.eval().loss(batch, rows).parts["item"] == pytest.approx(plain["item"])


def test_followers_need_the_whole_softmax() -> None:
    with pytest.raises(ConfigError, match=r"model\.followers: teaches the whole item softmax"):
        Config(data=DataConfig(name="x", source="mall"), model=ModelConfig(followers=0.2, item_negatives=100))
