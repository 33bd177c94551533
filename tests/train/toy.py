"""A small policy that keeps the contract `policy.loss(batch, rows)`, its batches, and a slow plain-torch trainer to hold the engine
against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from oxyray.config import OptimConfig
from oxyray.model.tables import PlainTables, TableSpec
from oxyray.train.engine import schedule

Tensor = torch.Tensor
SPECS = [TableSpec(name="item", rows=13, dim=8, init_std=0.5), TableSpec(name="user", rows=7, dim=8, init_std=0.5)]


@dataclass
class ToyBatch:
    item_n: Tensor
    user_n: Tensor
    target_n: Tensor
    weight_n: Tensor

    def lookups(self) -> dict[str, Tensor]:
        return {"item": self.item_n, "user": self.user_n}

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(*(x.to(device) for x in (self.item_n, self.user_n, self.target_n, self.weight_n)))

    def weight(self) -> float:
        return float(self.weight_n.sum())

    @classmethod
    def random(cls, size: int, seed: int, weighted: bool = True) -> ToyBatch:
        g = torch.Generator().manual_seed(seed)
        weight_n = torch.rand(size, generator=g) + 0.5 if weighted else torch.zeros(size)
        item_n = torch.randint(-1, SPECS[0].rows, (size,), generator=g)
        return cls(item_n, torch.randint(0, SPECS[1].rows, (size,), generator=g), torch.randn(size, generator=g), weight_n)


@dataclass
class Loss:
    total: Tensor
    parts: dict[str, Tensor]


class ToyPolicy(nn.Module):
    """Sizes are odd on purpose: nothing divides by the number of ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(16, 5), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(3))

    def loss(self, batch: ToyBatch, rows: dict[str, Tensor]) -> Loss:
        x = torch.cat([rows["item"], rows["user"]], dim=1)
        out = self.second(torch.tanh(self.first(x)))[:, 0] * self.scale.sum()
        squared_n = (out - batch.target_n) ** 2
        return Loss((squared_n * batch.weight_n).sum(), {"squared": (squared_n * batch.weight_n).sum().detach()})


def global_steps(steps: int, world: int, micro_batches: int) -> list[list[list[ToyBatch]]]:
    """Batches by step, rank, micro-batch, of unequal sizes; in one step the last rank has nothing that counts."""
    sizes = [[[3 + (5 * s + 7 * r + 3 * m) % 11 for m in range(micro_batches)] for r in range(world)] for s in range(steps)]
    return [
        [
            [ToyBatch.random(n, 1000 * s + 100 * r + m, weighted=not (s == 4 and r == 1)) for m, n in enumerate(sizes[s][r])]
            for r in range(world)
        ]
        for s in range(steps)
    ]


class Reference:
    """One process, plain torch: the whole global batch at once, tables as full tensors, row-wise Adagrad written out."""

    def __init__(self, optim: OptimConfig, total_steps: int, seed: int, policy: nn.Module, specs: list[TableSpec] = SPECS) -> None:
        self.optim, self.total_steps, self.step_count, self.policy = optim, total_steps, 0, policy
        self.tables = {k: v.clone().requires_grad_() for k, v in PlainTables.fresh(specs, seed).tables.items()}
        self.sums = {k: torch.zeros(len(v)) for k, v in self.tables.items()}
        matrices = [p for p in policy.parameters() if p.ndim > 1]
        vectors = [p for p in policy.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)

    def step(self, batches: list) -> tuple[float, float]:  # type: ignore[type-arg]
        scale = schedule(self.optim, self.step_count / self.total_steps)
        self.adam.zero_grad()
        weight = sum(b.weight() for b in batches)
        total = 0.0
        for batch in batches:
            rows = {
                k: torch.where((i >= 0)[:, None], self.tables[k][i.clamp(min=0)], 0.0)
                for k, i in batch.lookups().items()
                if k in self.tables
            }
            total = total + self.policy.loss(batch, rows).total
        loss = total / weight
        for table in self.tables.values():
            table.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.optim.clip)
        for group in self.adam.param_groups:
            group["lr"] = self.optim.lr * scale
        self.adam.step()
        with torch.no_grad():
            for name, table in self.tables.items():
                self.sums[name] += (table.grad**2).mean(1)
                table -= self.optim.table_lr * scale * table.grad / (self.sums[name].sqrt() + 1e-8)[:, None]
        self.step_count += 1
        return float(loss), float(norm)
