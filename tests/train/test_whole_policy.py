"""The real policy with all that couples the requests of a batch or takes part in some batches only: two processes learn what one learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oxyray.config import MoEConfig, OptimConfig, RetrievalConfig
from oxyray.train.engine import TrainEngine
from tests.model.toys import Toy
from tests.train.test_engine import REAL_SPECS, SPLIT_ALL
from tests.train.train_workers import run

STEPS = 4
ADDED: dict[str, dict[str, Any]] = {
    "experts": {"moe": MoEConfig(experts=4, active=1, balance=0.01)},
    "igr": {"retrieval": RetrievalConfig(q2i=0.5, top=3, history=9), "history": 2},
}


def shop(kind: str) -> Toy:
    toy = Toy("tied", **ADDED[kind])
    toy.policy = toy.policy.float()
    features, retrieval = toy.features, toy.config.retrieval
    assert features.text_IF is not None
    older = retrieval.history if retrieval.top else 0
    toy.collate = dataclasses.replace(toy.collate, features=dataclasses.replace(features, text_IF=features.text_IF.float()), older=older)
    return toy


def share(toy: Toy, step: int, rank: int, world: int) -> np.ndarray:
    """This rank's events of a step. In the last the second rank gets those alone that have nothing behind their history."""
    events = np.arange(step, len(toy.timeline), STEPS)
    owner = np.arange(len(events)) % world
    if step == STEPS - 1:
        owner = np.minimum((toy.timeline.visible_E[events] <= 2).astype(int), world - 1)
    return events[owner == rank]


def train(kind: str, stage: int) -> dict[str, torch.Tensor]:
    toy = shop(kind)
    optim = OptimConfig(lr=0.002, table_lr=0.02, zero_stage=stage)  # type: ignore[arg-type]
    engine = TrainEngine(toy.policy, REAL_SPECS, optim, total_steps=STEPS, seed=5, deepspeed=SPLIT_ALL)
    batches = [toy.request_batch(share(toy, step, dist.get_rank(), dist.get_world_size())) for step in range(STEPS)]
    stats = [engine.step([batch]) for batch in batches]
    found = {name: torch.tensor([s.parts[name] for s in stats]) for name in stats[0].parts} | {
        "loss": torch.tensor([s.loss for s in stats])
    }
    found |= {f"buffer/{name}": value.clone() for name, value in toy.policy.named_buffers() if name.endswith("bias_E")}
    whole = engine.whole()  # on every rank
    shop(kind).policy.load_state_dict(whole)  # nothing misses that decides what the policy says, experts' bias included
    assert all(torch.equal(whole[name], value) for name, value in toy.policy.named_buffers() if name.endswith("bias_E"))
    found |= {f"weight/{name}": value for name, value in whole.items() if value.is_floating_point()}
    found["older"] = torch.tensor([len(batch.older_item_O) for batch in batches])
    engine.close()
    return found


TRIALS = [("experts", 2), ("experts", 3), ("igr", 3)]


def everything() -> dict[str, dict[str, torch.Tensor]]:
    return {f"{kind}{stage}": train(kind, stage) for kind, stage in TRIALS}


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, dict[str, torch.Tensor]]]]:
    return [run(world, everything) for world in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), TRIALS)
def test_two_processes_learn_what_one_learns(found: list[list[dict[str, dict[str, torch.Tensor]]]], kind: str, stage: int) -> None:
    (alone,), ranks = ([dict(rank[f"{kind}{stage}"]) for rank in ranks] for ranks in found)
    older = torch.stack([rank.pop("older") for rank in ranks])
    alone.pop("older")
    for name, value in alone.items():
        assert torch.allclose(ranks[0][name].float(), value.float(), atol=2e-5), name
    for name, value in ranks[1].items():
        assert torch.equal(value, ranks[0][name]), name
    if kind == "igr":
        assert older[0, -1] > 0
        assert older[1, -1] == 0, "a step in which one process alone has older events"
    else:
        assert alone["expert_peak"].min() > 1.0
        assert any(value.abs().sum() > 0 for name, value in alone.items() if name.startswith("buffer/"))
