"""Requests whose item really taken can teach nothing, items that share a SID, and what a checkpoint was begun with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oxyray.align.crew import _about, _means
from oxyray.align.judge import Judge
from oxyray.align.learner import Learner
from oxyray.align.requests import Requests
from oxyray.align.rollout import Rollout
from oxyray.config import Config, from_dict, to_dict
from oxyray.model.inputs import Inputs
from oxyray.run import Run
from oxyray.train import checkpoint
from oxyray.train.course import begun_with
from oxyray.train.driver import threads_of
from oxyray.train.rank import RankTask, Validation
from tests.align.shop import ready_run
from tests.train.train_workers import run as spawn


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The shop after most items have left the pool of its second scenario; several items share a SID."""
    made = ready_run(tmp_path_factory.mktemp("shop"), steps=2, synthetic_share=0.2)
    path = Run(made.run_dir).path("data", "pools.npz")
    with np.load(path) as file:
        pool_SI = file["pool_SI"]
    pool_SI[Inputs.load(Run(made.run_dir)).prepared.meta.scenarios.index("cart"), ::3] = False
    np.savez(path, pool_SI=pool_SI)
    return made


def one_step(told: dict[str, Any], folder: str) -> dict[str, Any]:
    config = from_dict(Config, told)
    inputs = Inputs.load(Run(config.run_dir))
    learner = Learner(config, config.align, Path(folder) / "tables", Path(folder) / "checkpoints", 0, 1)
    rollout, judge = Rollout(config, config.align), Judge(config, config.align)
    rollout.load(0, learner.publish(0), Path(folder) / "tables")
    rolled = [rollout.generate(0, piece) for piece in range(config.align.pieces)]
    candidates = rollout._candidates
    rollout._candidates = lambda steps, legal: candidates(steps, legal)[:, :2]  # as of a piece whose pools are all small
    rolled[1] = rollout.generate(0, 1)
    assert rolled[1].leaf_BG.shape[1] == config.align.group
    assert (rolled[1].leaf_BG[:, 2:] == -1).all()
    assert _about(rolled)["filled"] < 1
    judged = [judge.judge(piece)[0] for piece in rolled]
    lost = 0
    for piece, verdict in zip(rolled, judged, strict=True):
        batch = rollout.requests.at(0)[piece.piece]
        known_B = rollout.requests.taken(0, piece.piece).numpy() >= 0
        for b, (scenario, item) in enumerate(zip(batch.scenario_Q.tolist(), batch.items.ids_U[batch.target_Q].tolist(), strict=True)):
            shown = bool(inputs.prepared.pools[inputs.prepared.meta.scenarios[scenario]][item])
            lost += not shown
            assert not (known_B[b] and not shown)
        assert (np.isnan(verdict.target_reward_B) == ~known_B).all()
        assert (piece.target_behaviour_BL[~known_B] == 0).all()
    stats = learner.learn(list(zip(rolled, judged, strict=True)))
    learner.close()
    return {"lost": lost, "loss": stats["loss"], "drift": stats["drift"]}


@pytest.mark.slow
def test_an_item_that_left_its_pool_since_it_was_taken_is_no_target_and_no_error(config: Config, tmp_path: Path) -> None:
    [found] = spawn(1, one_step, to_dict(config), str(tmp_path))
    assert found["lost"] > 0
    assert np.isfinite(found["loss"])
    assert found["drift"] < 1e-4


def test_a_shared_sid_is_judged_by_the_item_taken_else_by_the_one_that_is_shown(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, inputs = Judge(config, config.align), Inputs.load(Run(config.run_dir))
    index, pools, scenarios = inputs.catalog.index, inputs.prepared.pools, inputs.prepared.meta.scenarios
    rolled = Rollout(config, config.align)
    batch, known_B = rolled.requests.at(0)[0], rolled.requests.taken(0, 0).numpy() >= 0
    counts_I = inputs.prepared.train_counts_I()
    leaf_BG = np.tile(np.arange(index.leaves), (batch.queries, 1)).astype(np.int32)
    asked: list[np.ndarray] = []
    told = judge.service.judge
    monkeypatch.setattr(judge.service, "judge", lambda about, item_BG: [asked.append(item_BG), told(about, item_BG)][1])
    judge.judge(dataclasses.replace(_rolled(leaf_BG)))
    shared = 0
    for b, (scenario, taken) in enumerate(zip(batch.scenario_Q.tolist(), batch.items.ids_U[batch.target_Q].tolist(), strict=True)):
        for leaf in range(index.leaves):
            items = index.items_of(leaf).tolist()
            shown = [item for item in items if pools[scenarios[scenario]][item]] or items
            want = taken if known_B[b] and taken in items else max(shown, key=lambda item: (counts_I[item], -item))
            assert asked[0][b, leaf] == want
            shared += len(items) > 1
    assert shared


def _rolled(leaf_BG: np.ndarray) -> Any:
    from oxyray.align.rollout import Rolled

    nothing = np.zeros((*leaf_BG.shape, 3), dtype=np.float32)
    return Rolled(step=0, piece=0, version=0, leaf_BG=leaf_BG, behaviour_BGL=nothing, target_behaviour_BL=nothing[:, 0], seconds=0.0)


def test_every_piece_of_a_step_knows_the_same_of_it(config: Config) -> None:
    inputs = Inputs.load(Run(config.run_dir))
    mine, yours = (Requests(inputs, config, config.align) for _ in range(2))
    assert torch.equal(mine.taken(1, 1), yours.taken(1, 1))
    assert 0 < int(sum((mine.taken(0, piece) >= 0).sum() for piece in range(2))) < 24


def test_means_over_pieces_weigh_candidates_alike() -> None:
    assert _means([{"home/click": (0.9, 1)}, {"home/click": (0.1, 30), "all/click": (0.5, 2)}]) == {
        "reward/home/click": pytest.approx((0.9 + 30 * 0.1) / 31),
        "reward/all/click": 0.5,
    }


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"reward": {"weights": {"default": {"click": 1.0}}}}, "reward.weights.cart.click was 2.0 and is now None"),
        (
            {"reward": {"weights": {"default": {"click": 1.0}, "cart": {"click": 2.0}, "home": {"click": 3.0}}}},
            "reward.weights.home.click was None",
        ),
        ({"reward": {"weights": {"default": {"click": 1.0}, "cart": {"click": 2.0}}}}, None),
    ],
    ids=["a weight that is gone", "a weight that is new", "the same"],
)
def test_what_was_set_then_and_is_not_now_begins_anew(tmp_path: Path, now: dict[str, Any], said: str | None) -> None:
    then = {"reward": {"weights": {"default": {"click": 1.0}, "cart": {"click": 2.0}}}}
    why = begun_with(checkpoint.Checkpoint(tmp_path, {"step": 3, "course": {"minutes": 1.0}, "identity": then}), {"identity": now})
    assert (why is None) if said is None else (why is not None and said in why)


@pytest.mark.parametrize(
    ("nodes", "processes", "threads"),
    [
        ([{"CPU": 2}], 3, 1),
        ([{"CPU": 96, "GPU": 8}] * 16, 128, 12),
        ([{"CPU": 96}] * 16, 3, 32),  # Ray puts all three on one node
        ([{"CPU": 4}, {"CPU": 96, "GPU": 8}], 8, 12),
        ([{"CPU": 16, "GPU": 1}], 4, 4),
    ],
)
def test_threads_are_those_of_a_node_and_not_of_the_cluster(nodes: list[dict[str, float]], processes: int, threads: int) -> None:
    assert threads_of(nodes, processes) == threads


@pytest.mark.parametrize("wanted", [1, 5, 10_000])
def test_the_rankers_validation_is_never_empty_where_there_is_something_to_ask(config: Config, wanted: int) -> None:
    few = dataclasses.replace(config, rank=dataclasses.replace(config.rank, eval_requests=wanted))
    found = Validation(RankTask(few, Run(config.run_dir)), 0, 1)
    everything = Validation(
        RankTask(dataclasses.replace(config, rank=dataclasses.replace(config.rank, eval_requests=10**6)), Run(config.run_dir)), 0, 1
    )
    assert min(wanted, everything.requests) <= found.requests <= everything.requests
    none = dataclasses.replace(config, rank=dataclasses.replace(config.rank, eval_requests=0))
    assert Validation(RankTask(none, Run(config.run_dir)), 0, 1).requests == 0
