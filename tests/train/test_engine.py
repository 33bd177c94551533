"""The step of several processes against a slow single-process reference, for every ZeRO stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oxyray.config import OptimConfig
from oxyray.errors import TrainingError
from oxyray.train.engine import TrainEngine, schedule
from tests.train.toy import SPECS, Reference, ToyBatch, ToyPolicy, global_steps
from tests.train.train_workers import run

OPTIM = OptimConfig(lr=0.02, table_lr=0.1, clip=0.7, weight_decay=0.01, warmup_share=0.2)
STEPS, MICRO = 10, 3
# Without this ZeRO-3 would keep parameters this small whole on every rank, and nothing would be tested.
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def train(stage: int, precision: str = "fp32") -> dict[str, Any]:
    optim = dataclasses.replace(OPTIM, zero_stage=stage, precision=precision)
    engine = TrainEngine(ToyPolicy(), SPECS, optim, total_steps=STEPS, micro_batches=MICRO, seed=5, deepspeed=SPLIT_ALL)
    data = global_steps(STEPS, dist.get_world_size(), MICRO)
    stats = [engine.step(step[dist.get_rank()]) for step in data]
    found = {
        "loss": [s.loss for s in stats],
        "norm": [s.grad_norm for s in stats],
        "seconds": stats[-1].seconds,
        "dense": engine.gather_dense(),
        "tables": engine.tables.plain().tables,
    }
    engine.close()
    return found


def all_stages() -> dict[str, Any]:
    found = {f"stage{stage}": train(stage) for stage in range(4)}
    found["bf16"] = train(2, "bf16")
    found["not_finite"] = [refuses(stage) for stage in range(4)]
    return found


def refuses(stage: int) -> str:
    """A NaN in one micro-batch of one rank stops every rank, before tables or weights change."""
    engine = TrainEngine(ToyPolicy(), SPECS, dataclasses.replace(OPTIM, zero_stage=stage), total_steps=STEPS, micro_batches=1, seed=5)
    before = (engine.gather_dense(), engine.tables.plain().tables)
    batch = ToyBatch.random(4, 1)
    if dist.get_rank() == 0:
        batch.target_n[0] = torch.nan
    message = ""
    try:
        engine.step([batch])
    except TrainingError as error:
        message = str(error)
    after = (engine.gather_dense(), engine.tables.plain().tables)
    engine.close()
    same = all(torch.equal(b[name], a[name]) for b, a in zip(before, after, strict=True) for name in b)
    return message if same else "changed"


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest) -> tuple[list[Any], dict[str, Any]]:
    world = request.param
    reference = Reference(OPTIM, STEPS, 5, ToyPolicy())
    data = global_steps(STEPS, world, MICRO)
    steps = [reference.step([batch for rank in step for batch in rank]) for step in data]
    expected = {
        "loss": [s[0] for s in steps],
        "norm": [s[1] for s in steps],
        "dense": dict(reference.policy.state_dict()),
        "tables": reference.tables,
    }
    return run(world, all_stages), expected


@pytest.mark.parametrize("stage", range(4))
def test_step_equals_single_process_reference(results: Any, stage: int) -> None:
    found, expected = results
    assert max(expected["norm"]) > OPTIM.clip  # else clipping would go untested
    for rank in found:
        got = rank[f"stage{stage}"]
        torch.testing.assert_close(got["loss"], expected["loss"], atol=1e-5, rtol=0)
        torch.testing.assert_close(got["norm"], expected["norm"], atol=1e-5, rtol=1e-5)
        for name, table in expected["tables"].items():
            torch.testing.assert_close(got["tables"][name], table.detach(), atol=1e-6, rtol=0)
    dense = found[0][f"stage{stage}"]["dense"]
    assert dense.keys() == expected["dense"].keys()
    for name, value in expected["dense"].items():
        torch.testing.assert_close(dense[name], value, atol=1e-6, rtol=0)


def test_bf16_follows_fp32(results: Any) -> None:
    found, expected = results
    torch.testing.assert_close(found[0]["bf16"]["loss"], expected["loss"], atol=0.05, rtol=0.05)


def test_not_finite_loss_stops_before_any_change(results: Any) -> None:
    found, _ = results
    for rank in found:
        for message in rank["not_finite"]:
            assert "step 1" in message
            assert "not finite" in message
            assert "squared" in message


def test_time_shares_are_measured(results: Any) -> None:
    found, _ = results
    seconds = found[0]["stage1"]["seconds"]
    assert set(seconds) == {"data", "sparse", "forward", "backward", "optimizer"}
    assert all(value > 0 for value in seconds.values())


def test_schedule() -> None:
    optim = OptimConfig(warmup_share=0.1)
    assert schedule(optim, 0.0) == pytest.approx(0.01)
    assert schedule(optim, 0.05) == pytest.approx(0.5)
    assert schedule(optim, 0.1) == pytest.approx(1.0)
    assert schedule(optim, 0.55) == pytest.approx(0.5)
    assert schedule(optim, 1.0) == pytest.approx(0.0)
    assert schedule(OptimConfig(warmup_share=0.0, schedule="constant"), 0.9) == 1.0
