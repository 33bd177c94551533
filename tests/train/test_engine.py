"""The step of several processes against a slow single-process reference, for every ZeRO stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oxyray.config import OptimConfig
from oxyray.data.requests import training_segments
from oxyray.errors import TrainingError
from oxyray.model.tables import TableSpec
from oxyray.train.engine import TrainEngine, schedule
from tests.model.toys import Toy
from tests.train.toy import SPECS, Loss, Reference, ToyBatch, ToyPolicy, global_steps
from tests.train.train_workers import run

pytestmark = pytest.mark.slow
OPTIM = OptimConfig(lr=0.02, table_lr=0.1, clip=0.7, weight_decay=0.01, warmup_share=0.2)
# The real policy is rougher ground: with large steps rounding alone would pass 1e-6 in the tables.
REAL_OPTIM = dataclasses.replace(OPTIM, lr=0.002, table_lr=0.02)
STEPS, MICRO = 10, 3
HEADS = ("tied", "codes")
REAL_SPECS = [TableSpec(name="item", rows=40, dim=8, init_std=0.5), TableSpec(name="user", rows=6, dim=8, init_std=0.5)]
# Without this ZeRO-3 would keep parameters this small whole on every rank, and nothing would be tested.
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def train(stage: int, precision: str = "fp32", head: str | None = None) -> dict[str, Any]:
    optim = dataclasses.replace(OPTIM if head is None else REAL_OPTIM, zero_stage=stage, precision=precision)
    policy, specs = (ToyPolicy(), SPECS) if head is None else (real_shop(head).policy, REAL_SPECS)
    engine = TrainEngine(policy, specs, optim, total_steps=STEPS, micro_batches=MICRO, seed=5, deepspeed=SPLIT_ALL)
    world = dist.get_world_size()
    data = global_steps(STEPS, world, MICRO) if head is None else real_steps(head, world)
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


def real_shop(head: str) -> Toy:
    """The real policy in float32 on a random shop; nothing in it is random from step to step."""
    toy = Toy(head)
    toy.policy = toy.policy.float()
    features = toy.features
    assert features.text_IF is not None
    toy.collate = dataclasses.replace(toy.collate, features=dataclasses.replace(features, text_IF=features.text_IF.float()))
    return toy


def real_steps(head: str, world: int) -> list[Any]:
    """All segments in every step, dealt out anew to ranks and micro-batches of unequal sizes; in one step the last rank counts for
    nothing."""
    toy, steps = real_shop(head), []
    segments = training_segments(toy.timeline, toy.config.history)
    for step in range(STEPS):
        owner = np.random.default_rng(step).integers(0, world * MICRO, len(segments))
        owner[: world * MICRO] = np.arange(world * MICRO)
        pieces = [toy.collate(toy.timeline, segments.take(np.flatnonzero(owner == k))) for k in range(world * MICRO)]
        ranks = [pieces[rank::world] for rank in range(world)]
        if step == 4 and world > 1:
            ranks[-1] = [dataclasses.replace(batch, weight_Q=torch.zeros_like(batch.weight_Q)) for batch in ranks[-1]]
        steps.append(ranks)
    return steps


def trials(world: int) -> list[tuple[str, int]]:
    """What is trained: the toy policy or a head of the real one, and the ZeRO stage. With one rank the stages differ little."""
    return [("toy", 0), ("toy", 3)] if world == 1 else [*(("toy", stage) for stage in range(4)), ("tied", 1), ("tied", 3), ("codes", 2)]


def everything() -> dict[str, Any]:
    world = dist.get_world_size()
    found = {f"{kind}{stage}": train(stage, head=None if kind == "toy" else kind) for kind, stage in trials(world)}
    found["bf16"] = train(2, "bf16")
    found["not_finite"] = [refuses(stage, ToyPolicy(), bad_target=True) for stage in range(world - 1, 4)]
    found["infinite"] = [refuses(stage, SteepPolicy(), bad_target=False) for stage in range(4)]
    return found


class SteepPolicy(ToyPolicy):
    """Once `steep`, the loss of rank 0 has a root at 0: finite, as are the rows' gradients, and infinitely steep in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.rooted = torch.nn.Parameter(torch.ones(2))
        self.steep = False

    def loss(self, batch: ToyBatch, rows: dict[str, torch.Tensor]) -> Loss:
        found = super().loss(batch, rows)
        taken = torch.tensor([1.0 if self.steep and dist.get_rank() == 0 else 0.0, 0.0])
        return Loss(found.total + (self.rooted - self.rooted.detach() * taken).sqrt().sum(), found.parts)


def refuses(stage: int, policy: ToyPolicy, bad_target: bool) -> str:
    """After a good step, a NaN target or an infinite gradient on one rank stops every rank, before tables, weights or moments change."""
    engine = TrainEngine(
        policy, SPECS, dataclasses.replace(OPTIM, zero_stage=stage), total_steps=STEPS, micro_batches=1, seed=5, deepspeed=SPLIT_ALL
    )
    engine.step([ToyBatch.random(4, 1)])
    before = state(engine)
    batch = ToyBatch.random(4, 2)
    if bad_target and dist.get_rank() == 0:
        batch.target_n[0] = torch.nan
    policy.steep = not bad_target
    message = ""
    try:
        engine.step([batch])
    except TrainingError as error:
        message = str(error)
    after = state(engine)
    engine.close()
    return message if all(torch.equal(value, after[name]) for name, value in before.items()) else f"changed: {message}"


def state(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """All that a step changes: weights and moments of the dense part, tables and their optimizer's state."""
    found = {f"{name}.{kind}": value.clone() for name, values in engine.dense() for kind, value in values.items()}
    for shard in engine.tables.shards():
        found |= {f"{shard.table}.{kind}": value.clone() for kind, value in {"weight": shard.weight, **shard.state}.items()}
    return found


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest) -> tuple[list[Any], dict[str, Any]]:
    world = request.param
    expected = {"toy": expect(Reference(OPTIM, STEPS, 5, ToyPolicy()), global_steps(STEPS, world, MICRO))}
    for head in HEADS if world == 2 else ():
        expected[head] = expect(Reference(REAL_OPTIM, STEPS, 5, real_shop(head).policy.train(), REAL_SPECS), real_steps(head, world))
    return run(world, everything), expected


def expect(reference: Reference, data: list[Any]) -> dict[str, Any]:
    steps = [reference.step([batch for rank in step for batch in rank]) for step in data]
    return {
        "loss": [s[0] for s in steps],
        "norm": [s[1] for s in steps],
        "dense": dict(reference.policy.state_dict()),
        "tables": reference.tables,
    }


def test_step_equals_single_process_reference(results: Any) -> None:
    found, every = results
    for kind, stage in trials(len(found)):
        expected = every[kind]
        assert max(expected["norm"]) > OPTIM.clip  # else clipping would go untested
        for rank in found:
            got = rank[f"{kind}{stage}"]
            torch.testing.assert_close(got["loss"], expected["loss"], atol=1e-5, rtol=0)
            torch.testing.assert_close(got["norm"], expected["norm"], atol=1e-5, rtol=1e-4)
            for name, table in expected["tables"].items():
                torch.testing.assert_close(got["tables"][name], table.detach(), atol=1e-6, rtol=0)
        dense = found[0][f"{kind}{stage}"]["dense"]
        assert dense.keys() == expected["dense"].keys()
        for name, value in expected["dense"].items():
            torch.testing.assert_close(dense[name], value, atol=1e-6 if kind == "toy" else 2e-5, rtol=0)


def test_bf16_follows_fp32(results: Any) -> None:
    found, expected = results
    torch.testing.assert_close(found[0]["bf16"]["loss"], expected["toy"]["loss"], atol=0.05, rtol=0.05)


def test_not_finite_loss_stops_before_any_change(results: Any) -> None:
    found, _ = results
    for rank in found:
        for message in rank["not_finite"]:
            assert message.startswith("step 2")
            assert "not finite" in message
            assert "squared nan" in message


def test_infinite_gradient_of_a_finite_loss_stops_before_any_change(results: Any) -> None:
    """For every ZeRO stage, on every rank."""
    found, _ = results
    for rank in found:
        assert len(rank["infinite"]) == 4
        for message in rank["infinite"]:
            assert message.startswith("step 2: the loss or its gradient is not finite")
            assert "nan" not in message
            assert "inf" not in message.replace("not finite", "")


def test_time_shares_are_measured(results: Any) -> None:
    found, _ = results
    seconds = found[0]["toy3"]["seconds"]
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
