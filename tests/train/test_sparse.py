"""Sharded tables: first values, lookups, fused updates and exports against plain tensors; what is private API of TorchRec is pinned
here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oxyray.config import OptimConfig
from oxyray.errors import DataError, TrainingError
from oxyray.model.tables import BLOCK_ROWS, PlainTables, TableSpec, initial_rows
from oxyray.train.sparse import Leaves, ShardedTables
from tests.train.train_workers import run

SPECS = [
    TableSpec(name="item", rows=16 * BLOCK_ROWS + 5, dim=4, init_std=0.5),
    TableSpec(name="user", rows=7, dim=8, init_std=0.5),
    TableSpec(name="tiny", rows=2, dim=4, init_std=0.5),
]
LR = 0.1


def body(optimizer: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    tables = ShardedTables(SPECS, OptimConfig(table_optimizer=optimizer, table_lr=9.0), torch.device("cpu"), 3)
    first = tables.plain()
    found: dict[str, Any] = {"first": first.tables, "covered": [[s.table, s.first, len(s.weight)] for s in tables.shards()]}
    ids = {"item": torch.tensor([5, SPECS[0].rows - 1, -1, 5 + rank]), "other": torch.tensor([1])}
    rows = tables.lookup(ids)
    assert rows.keys() == {"item"}
    torch.testing.assert_close(rows["item"], first.lookup(ids)["item"], atol=0, rtol=0)
    for shard in tables.shards():  # a shard is a view: writing it writes the table
        if shard.first == 0:
            shard.weight[0] = 7.0
    assert (tables.lookup({"item": torch.tensor([0])})["item"] == 7.0).all()
    tables.set_lr(LR)
    for step in range(3):
        wanted = [{"item": torch.tensor([1, 2, 2, -1, 20000]), "user": torch.tensor([6])}, {"item": torch.tensor([2, 3 + rank + step])}]
        leaves = Leaves.look_up(tables, wanted if rank == 0 or world == 1 or step != 1 else [{}])
        loss = sum(((r - 1.0) ** 2).sum() for m in range(len(leaves.inverse)) for r in leaves.slice(m).values())
        if torch.is_tensor(loss):
            (loss * world).backward()
        leaves.backward()
    found["last"] = tables.plain().tables
    with tempfile.TemporaryDirectory() as folder:
        tables.export(Path(folder) / "tables.safetensors")
        if rank == 0:
            exported = PlainTables.load(Path(folder) / "tables.safetensors").tables
            assert exported.keys() == found["last"].keys()
            assert all(torch.equal(exported[name], found["last"][name]) for name in exported)
        else:
            assert not list(Path(folder).iterdir())
    try:
        tables.lookup({"user": torch.tensor([7])})
        found["beyond"] = ""
    except DataError as error:
        found["beyond"] = str(error)
    return found


def all_optimizers() -> dict[str, Any]:
    found = {name: body(name) for name in ("rowwise_adagrad", "adagrad", "sgd")}
    try:
        ShardedTables([TableSpec(name="one", rows=1, dim=4)], OptimConfig(), torch.device("cpu"), 0)
    except TrainingError as error:
        found["too_small"] = {"message": str(error)}
    return found


def reference(optimizer: str, world: int) -> dict[str, torch.Tensor]:
    tables = {name: table.clone() for name, table in PlainTables.fresh(SPECS, 3).tables.items()}
    for table in tables.values():
        table[0] = 7.0
    sums = {name: torch.zeros_like(table) for name, table in tables.items()}
    for step in range(3):
        live = {name: table.clone().requires_grad_() for name, table in tables.items()}
        for rank in range(world):
            if rank == 0 or step != 1:
                for table, ids in (("item", [1, 2, 2, 20000, 2, 3 + rank + step]), ("user", [6])):
                    ((live[table][torch.tensor(ids)] - 1.0) ** 2).sum().backward()
        for name, table in live.items():
            if table.grad is None:
                continue
            square = table.grad**2
            sums[name] += square.mean(1, keepdim=True) if optimizer == "rowwise_adagrad" else square
            scale = 1.0 if optimizer == "sgd" else 1 / (sums[name].sqrt() + 1e-8)
            tables[name] = tables[name] - LR * table.grad * scale
    return tables


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest) -> list[Any]:
    return run(request.param, all_optimizers)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_fused_updates_equal_plain_ones(results: list[Any], optimizer: str) -> None:
    want = reference(optimizer, len(results))
    for rank in results:
        for name, table in want.items():
            torch.testing.assert_close(rank[optimizer]["last"][name], table, atol=1e-6, rtol=0)


def test_first_values_do_not_depend_on_the_number_of_ranks(results: list[Any]) -> None:
    want = PlainTables.fresh(SPECS, 3).tables
    for rank in results:
        assert all(torch.equal(rank["sgd"]["first"][name], want[name]) for name in want)
    covered = sorted(tuple(piece) for rank in results for piece in rank["sgd"]["covered"])
    for spec in SPECS:
        pieces = [piece for piece in covered if piece[0] == spec.name]
        assert [piece[1] for piece in pieces] == [sum(p[2] for p in pieces[:k]) for k in range(len(pieces))]
        assert sum(piece[2] for piece in pieces) == spec.rows


def test_errors_are_typed(results: list[Any]) -> None:
    for rank in results:
        assert "has 7 rows, and row 7" in rank["sgd"]["beyond"]
    if len(results) == 2:
        assert "use fewer workers" in results[0]["too_small"]["message"]


def test_initial_rows_by_range() -> None:
    spec = TableSpec(name="item", rows=3 * BLOCK_ROWS, dim=4)
    full = initial_rows(spec, 1, 0, spec.rows)
    assert torch.equal(initial_rows(spec, 1, BLOCK_ROWS - 3, 2 * BLOCK_ROWS + 9), full[BLOCK_ROWS - 3 : 2 * BLOCK_ROWS + 9])
    assert initial_rows(spec, 1, 5, 5).shape == (0, 4)
    assert not torch.equal(initial_rows(spec, 2, 0, 4), full[:4])
    assert float(full.std()) == pytest.approx(spec.init_std, rel=0.02)
