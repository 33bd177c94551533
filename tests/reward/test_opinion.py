"""The ranker's say in the order of generated items: against the ranker asked request by request, and through evaluation and serving."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from oxyray import Recommender
from oxyray.config import Config, RewardConfig
from oxyray.data.requests import request_segments, timeline
from oxyray.errors import RunError
from oxyray.evaluate.runner import evaluate
from oxyray.evaluate.table import entry
from oxyray.model.inputs import Inputs
from oxyray.pipeline import STAGES
from oxyray.reward.opinion import RankerSays, opinions
from oxyray.reward.service import Asked, RewardService
from oxyray.run import Run
from tests.align.shop import ready_run

WEIGHT = 1.5


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Run]:
    made = ready_run(tmp_path_factory.mktemp("shop"))
    config = replace(made, generate=replace(made.generate, ranker=WEIGHT), evaluate=replace(made.evaluate, baselines=()))
    return config, Run(config.run_dir)


def asked(config: Config, run: Run):
    inputs = Inputs.load(run)
    time = timeline(inputs.prepared.events(0))
    rows = np.flatnonzero(time.split_E == 2)
    return inputs, inputs.collator(config.model)(time, request_segments(time, rows, config.model.history), targets=False)


def test_the_bonus_is_the_rankers_chance_of_each_item_asked_alone(shop: tuple[Config, Run]) -> None:
    config, run = shop
    inputs, batch = asked(config, run)
    says = RankerSays(config, run, inputs)
    rng = np.random.default_rng(3)
    item_QR = rng.integers(-1, 30, (batch.queries, 7))
    bonus_QR = says(batch, item_QR)
    ids_U = batch.items.ids_U.numpy()
    for q in range(0, batch.queries, 4):
        for r in range(7):
            if item_QR[q, r] < 0:
                continue
            trigger = int(batch.trigger_Q[q])
            alone = Asked(
                user_B=batch.user_B[q : q + 1].numpy(), time_B=batch.time_Q[q : q + 1].numpy(),
                scenario_B=batch.scenario_Q[q : q + 1].numpy(), trigger_B=np.array([ids_U[trigger] if trigger >= 0 else -1]),
                last_B=np.array([-1]), target_B=np.array([-1]),
            )  # fmt: skip
            pages = says.service.log.pages(0)
            chance = says.service._chances(pages, alone, item_QR[q : q + 1, r : r + 1], None)[0, 0, 0]
            assert bonus_QR[q, r] == pytest.approx(WEIGHT * np.log(float(chance)), abs=1e-5)


def test_newcomers_are_left_as_the_beams_have_them(shop: tuple[Config, Run]) -> None:
    config, run = shop
    inputs, batch = asked(config, run)
    item_QR = np.tile(np.arange(5), (batch.queries, 1))
    says = RankerSays(config, run, inputs)
    known_QR = says(batch, item_QR)
    some = replace(batch, user_B=batch.user_B.clone())
    some.user_B[::2] = -1
    bonus_QR = says(some, item_QR)
    assert (bonus_QR[::2] == 0).all()
    np.testing.assert_array_equal(bonus_QR[1::2], known_QR[1::2])
    some.user_B[:] = -1
    assert (says(some, item_QR) == 0).all()


def test_items_that_came_after_the_ranker_stand_where_the_beams_have_them_among_the_others(shop: tuple[Config, Run]) -> None:
    config, run = shop
    inputs, batch = asked(config, run)
    says, items = RankerSays(config, run, inputs), inputs.prepared.meta.items
    item_QR = np.tile(np.array([3, items, 1, items + 40, -1]), (batch.queries, 1))
    bonus_QR = says(batch, item_QR)
    np.testing.assert_array_equal(bonus_QR[:, [0, 2]], says(batch, item_QR[:, [0, 2]]))
    for new in (1, 3):
        np.testing.assert_allclose(bonus_QR[:, new], bonus_QR[:, [0, 2]].mean(1))
    assert (says(batch, np.full((batch.queries, 2), items)) == 0).all()


def test_where_the_policy_reads_no_text_the_log_is_not_asked_in_its_place(shop: tuple[Config, Run], monkeypatch) -> None:
    config, run = shop
    inputs, batch = asked(config, run)
    says = RankerSays(config, run, inputs)
    assert says.silent_F is None, "this shop has no texts at all"
    says.silent_F = np.full(3, np.nan, dtype=np.float32)
    heard: list[np.ndarray] = []
    judge = says.service.judge
    monkeypatch.setattr(says.service, "judge", lambda asked, items: (heard.append(asked.query_BF), judge(asked, items))[1])
    says(batch, np.zeros((batch.queries, 2), np.int64))
    assert heard[0].shape == (batch.queries, 3)
    assert np.isnan(heard[0]).all()


def test_the_query_of_a_request_counts_though_the_ranker_reads_none(shop: tuple[Config, Run]) -> None:
    config, run = shop
    inputs, batch = asked(config, run)
    text_IF = np.random.default_rng(2).normal(size=(inputs.prepared.meta.items, 4)).astype(np.float32)
    relative = replace(config, reward=RewardConfig(components={"relative": "relative"}, weights={"default": {"relative": 1.0}}))
    service = RewardService(relative, run, replace(inputs, text_IF=text_IF))
    told = Asked.of(batch, np.full(batch.queries, -1))
    typed = replace(told, query_BF=np.tile(text_IF[5], (batch.queries, 1)))
    reward_BG = service.judge(typed, np.tile(np.array([5, 6]), (batch.queries, 1))).reward_BG
    cosine = text_IF[5] @ text_IF[6] / np.linalg.norm(text_IF[5]) / np.linalg.norm(text_IF[6])
    np.testing.assert_allclose(reward_BG, np.tile([1.0, cosine], (batch.queries, 1)), atol=1e-5)


def test_what_was_typed_is_what_the_ranker_reads(shop: tuple[Config, Run]) -> None:
    config, run = shop
    _, batch = asked(config, run)
    assert Asked.of(batch, batch.user_B.numpy()).query_BF is None
    vector_WF = torch.arange(6.0).view(2, 3)
    text_Q = torch.tensor([1, -1, 0]).repeat(batch.queries)[: batch.queries]
    told = Asked.of(replace(batch, vector_WF=vector_WF, text_Q=text_Q), batch.user_B.numpy())
    assert told.query_BF is not None
    assert told.query_BF[0].tolist() == [3.0, 4.0, 5.0]
    assert np.isnan(told.query_BF[1]).all()
    assert told.query_BF[2].tolist() == [0.0, 1.0, 2.0]
    assert len(told.only(told.user_B == told.user_B[0]).query_BF) == (told.user_B == told.user_B[0]).sum()


def test_evaluation_asks_it_and_shows_the_beams_alone(shop: tuple[Config, Run]) -> None:
    config, run = shop
    evaluate(config, run)
    found = json.loads(run.path("evaluate", "metrics.json").read_text())
    evaluate(replace(config, generate=replace(config.generate, ranker=0.0)), run)
    plain = json.loads(run.path("evaluate", "metrics.json").read_text())
    assert (found["models"], plain["models"]) == (["policy", "beams"], ["policy"])
    assert entry(found, "beams", "all")["metrics"] == entry(plain, "policy", "all")["metrics"]
    assert entry(found, "policy", "all")["metrics"] != entry(plain, "policy", "all")["metrics"]


def test_serving_orders_as_evaluation_does(shop: tuple[Config, Run]) -> None:
    config, run = shop
    run.write_config(config)
    with_it = Recommender.load(run.folder).recommend("u03", "home", k=40)
    run.write_config(replace(config, generate=replace(config.generate, ranker=0.0)))
    without = Recommender.load(run.folder).recommend("u03", "home", k=40)
    before, after = ({shown.item_id: shown.score for shown in found.items} for found in (without, with_it))
    assert set(before) == set(after)
    bonus = np.array([after[item] - before[item] for item in before])
    assert (bonus < 0).all()  # logarithms of chances
    assert [shown.item_id for shown in with_it.items] != [shown.item_id for shown in without.items]
    assert [shown.score for shown in with_it.items] == sorted(after.values(), reverse=True)


def test_without_a_ranker_it_says_which_stage_is_missing(tmp_path: Path, shop: tuple[Config, Run]) -> None:
    config, run = shop
    bare = Run(tmp_path)
    for name in ("data", "sid", "pretrain"):
        bare.path(name).symlink_to(run.path(name))
    with pytest.raises(RunError, match="run `oxyray rank`"):
        opinions(replace(config, run_dir=str(tmp_path)), bare, Inputs.load(bare))


def test_who_has_a_say_in_the_order_does_not_make_alignment_anew() -> None:
    [align] = [stage for stage in STAGES if stage.name == "align"]
    assert {"generate.followers", "generate.ranker"} <= set(align.speed)
