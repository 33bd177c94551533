"""Learners and a rollout without Ray, on one and two ranks: they agree on every probability, they learn, and a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oxyray.align.learner import Judged, Learner
from oxyray.align.rollout import Rolled, Rollout
from oxyray.config import AlignConfig, Config, OptimConfig, from_dict, to_dict
from oxyray.errors import GenerationError, TrainingError
from oxyray.model.inputs import Inputs
from oxyray.model.saved import read_model
from oxyray.run import Run
from tests.evaluate.shop import whole_run
from tests.train.train_workers import run as spawn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made, _ = whole_run(tmp_path_factory.mktemp("shop"))
    align = AlignConfig(
        steps=STEPS, requests_per_step=24, pieces=2, group=4, supervised_targets=30, synthetic_share=0.3,
        optim=OptimConfig(lr=0.03, table_lr=0.02, warmup_share=0.0, schedule="constant"),
    )  # fmt: skip
    return {"run": to_dict(made), "align": to_dict(align)}


def judged(rolled: Rolled, rollout: Rollout) -> Judged:
    """A reward that can be reached: 1 for SIDs whose first code is even. Synthetic requests have no target reward."""
    codes = rollout.inputs.catalog.index.codes_of(rolled.leaf_BG.clip(min=0).flatten())[:, 0].reshape(rolled.leaf_BG.shape)
    batch = rollout.requests.at(rolled.step)[rolled.piece]
    target = rollout.inputs.catalog.codes_IL[batch.items.ids_U[batch.target_Q].numpy(), 0]
    known = rollout.requests.taken(rolled.step, rolled.piece).numpy() >= 0
    return Judged(
        reward_BG=((codes % 2 == 0) & (rolled.leaf_BG >= 0)).astype(np.float32),
        target_reward_B=np.where(known, target % 2 == 0, np.nan).astype(np.float32),
    )


def aligned(settings: dict[str, Any], folder: str, until: int, world: int = 1) -> dict[str, Any]:
    """The loop written out: publish, generate, judge, learn. Rank 0 has the rollout; the others get what it made."""
    config, align = from_dict(Config, settings["run"]), from_dict(AlignConfig, settings["align"] | {"learners": world})
    torch.manual_seed(0)
    learner = Learner(config, align, Path(folder) / "tables", Path(folder) / "checkpoints", dist.get_rank(), world)
    rollout = Rollout(config, align)
    told: dict[str, Any] = {"drift": [], "reward": [], "loss": [], "published": []}
    while learner.step < until:
        step = learner.step
        weights = [learner.publish(step)]
        dist.broadcast_object_list(weights, 0)
        assert rollout.load(step, weights[0], Path(folder) / "tables") == step
        pieces = [rollout.generate(step, piece) for piece in range(align.pieces)]
        scored = [(rolled, judged(rolled, rollout)) for rolled in pieces]
        stats = learner.learn(scored[dist.get_rank() :: world])
        told["drift"].append(stats["drift"])
        told["loss"].append(stats["loss"])
        told["reward"].append(float(np.mean([score.reward_BG.mean() for _, score in scored])))
    learner.save({"version": learner.step})
    learner.export(Path(folder) / "model")
    learner.close()
    return told


def test_trainer_and_rollout_agree_and_rewards_rise(settings: dict[str, Any], tmp_path: Path) -> None:
    [told] = spawn(1, aligned, settings | {"align": settings["align"] | {"steps": 25}}, str(tmp_path), 25)
    assert max(told["drift"]) < 1e-4
    assert np.mean(told["reward"][-5:]) > told["reward"][0] + 0.15
    assert not list((tmp_path / "tables").glob("*")), "published tables are taken away"
    inputs = Inputs.load(Run(settings["run"]["run_dir"]))
    policy, _ = read_model(tmp_path / "model", inputs)
    before, _ = read_model(Path(settings["run"]["run_dir"]) / "pretrain" / "model", inputs)
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True))


def test_nothing_moves_at_learning_rate_zero(settings: dict[str, Any], tmp_path: Path) -> None:
    still = settings["align"]["optim"] | {"lr": 0.0, "table_lr": 0.0}
    [told] = spawn(1, aligned, settings | {"align": settings["align"] | {"optim": still}}, str(tmp_path), STEPS)
    assert max(told["drift"]) < 1e-4
    inputs = Inputs.load(Run(settings["run"]["run_dir"]))
    (after, rows), (before, first_rows) = (
        read_model(folder, inputs) for folder in (tmp_path / "model", Path(settings["run"]["run_dir"]) / "pretrain" / "model")
    )
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(rows.tables[name], first_rows.tables[name]) for name in rows.tables)


def test_two_learners_learn_what_one_does_and_a_stopped_run_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    [one] = spawn(1, aligned, settings, str(tmp_path / "one"), STEPS)
    two = spawn(2, aligned, settings, str(tmp_path / "two"), STEPS, 2)
    assert two[0]["loss"] == pytest.approx(one["loss"], rel=2e-4)
    assert two[0]["loss"] == two[1]["loss"]
    [first] = spawn(1, aligned, settings, str(tmp_path / "stopped"), STEPS // 2)
    [second] = spawn(1, aligned, settings, str(tmp_path / "stopped"), STEPS)
    assert first["loss"] + second["loss"] == pytest.approx(one["loss"], rel=1e-5)


def refusals(settings: dict[str, Any], folder: str) -> list[str]:
    config, align = from_dict(Config, settings["run"]), from_dict(AlignConfig, settings["align"])
    learner = Learner(config, align, Path(folder) / "tables", Path(folder) / "checkpoints", 0, 1)
    rollout = Rollout(config, align)
    rollout.load(0, learner.publish(0), Path(folder) / "tables")
    pieces = [rollout.generate(3, piece) for piece in range(2)]
    said = []
    try:
        learner.learn([(rolled, judged(rolled, rollout)) for rolled in pieces])
    except TrainingError as error:
        said.append(str(error))
    weights = learner.publish(1)
    try:
        rollout.generate(0, 0)
    except GenerationError as error:
        said.append(str(error))
    rollout.release()
    rollout.load(1, weights, Path(folder) / "tables")
    assert rollout.generate(0, 0).version == 1
    learner.close()
    return said


def test_what_does_not_belong_together_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    [said] = spawn(1, refusals, settings, str(tmp_path))
    assert said == [
        "candidates of step 3 came to step 0: the loop is out of order",
        "table user is of version 1, the weights are of 0: publish both before generating",
    ]
