"""The embedded shop's optimum beside the results, on a shop made for the test."""

import numpy as np
import pytest

from oxyray.config import Config, from_dict
from oxyray.data.mall.optimum import Optimum
from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.evaluate.baselines import Lists
from oxyray.evaluate.baselines.popularity import Popularity
from oxyray.evaluate.optimum import best_possible, slate_values
from oxyray.evaluate.predictions import Writer
from oxyray.evaluate.requests import TEST, asked
from oxyray.evaluate.runner import pools
from oxyray.run import Run
from tests.evaluate.shop import prepared_run


@pytest.fixture(scope="module")
def mall(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mall")
    shop = {"size": "tiny", "users": 60, "days": 40}
    config = from_dict(Config, {"run_dir": str(folder), "data": {"name": "mall", "source": "mall", "mall": shop}})
    run = Run(folder)
    prepare(config, run)
    return run, Prepared.load(run.path("data"))


def test_nobody_beats_the_optimum_and_knowing_more_helps(mall):
    run, prepared = mall
    requests = list(asked(prepared, TEST, 150, seed=1))
    found = best_possible(run, prepared, requests, [1, 10])
    assert found is not None
    assert found["requests"] == sum(map(len, requests))
    log, shopper = ({row["scenario"]: row["metrics"] for row in found[name]} for name in ("public", "hidden"))
    assert set(log) <= {None, *prepared.meta.scenarios}
    assert 0 < log[None]["HR@1"] < log[None]["HR@10"] <= 1
    assert shopper[None]["HR@10"] > log[None]["HR@10"] - 0.02, "an expectation: more knowledge can only lose by chance"
    popularity = Popularity(prepared, pools(prepared))
    hits = sum(int((popularity.recommend(part, 10).item_RK == part.target_R[:, None]).sum()) for part in requests)
    assert hits / found["requests"] < log[None]["HR@10"]


def test_the_value_of_slates_is_that_of_the_shop_and_likely_items_are_worth_more(mall, tmp_path):
    run, prepared = mall
    requests = list(asked(prepared, TEST, 150, seed=1))
    random, popularity = np.random.default_rng(0), Popularity(prepared, pools(prepared))
    path = tmp_path / "predictions.parquet"
    best = {}
    with Writer(path, prepared) as writer:
        for model in ("popularity", "any"):
            best[model] = []
            for part in requests:
                lists = popularity.recommend(part, 10)
                if model == "any":
                    item_RK = np.stack([random.permutation(prepared.meta.items)[:10] for _ in range(len(part))])
                    lists = Lists(item_RK, np.zeros(item_RK.shape, np.float32))
                writer.add(model, "all", part, lists, lists.item_RK)
                best[model].append(lists.item_RK[:, :5])
    found = slate_values(run, prepared, requests, path, k=5)
    assert (found["k"], found["requests"]) == (5, sum(map(len, requests)))
    overall = {row["model"]: row["metrics"] for row in found["table"] if row["scenario"] is None}
    assert overall["popularity"]["clicks"] > overall["any"]["clicks"] > 0
    optimum = Optimum(run.path("source"))
    users = prepared.user_ids.to_pylist()
    rows = optimum.rows_at(
        [users[user] for part in requests for user in part.user_R], np.concatenate([part.time.asked_E[part.row_R] for part in requests])
    )
    for model, lists in best.items():
        (value,) = optimum.slate_values(rows, [np.concatenate(lists)])
        assert overall[model] == {kind: pytest.approx(value_R.mean()) for kind, value_R in vars(value).items()}
        shares = [row for row in found["table"] if row["model"] == model and row["scenario"] is not None]
        total = sum(row["metrics"]["turnover"] * row["requests"] for row in shares)
        assert total / found["requests"] == pytest.approx(overall[model]["turnover"])


def test_other_data_has_no_optimum(tmp_path):
    _, run = prepared_run(tmp_path)
    prepared = Prepared.load(run.path("data"))
    assert best_possible(run, prepared, list(asked(prepared, TEST)), [1]) is None
    assert slate_values(run, prepared, list(asked(prepared, TEST)), tmp_path / "predictions.parquet", 10) is None
