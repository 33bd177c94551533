"""The embedded shop's optimum beside the results, on a shop made for the test."""

import pytest

from oxyray.config import Config, from_dict
from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.evaluate.baselines.popularity import Popularity
from oxyray.evaluate.optimum import best_possible
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


def test_other_data_has_no_optimum(tmp_path):
    _, run = prepared_run(tmp_path)
    prepared = Prepared.load(run.path("data"))
    assert best_possible(run, prepared, list(asked(prepared, TEST)), [1]) is None
