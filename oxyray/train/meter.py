"""What a training run reports: losses, throughput over all ranks, and where the time went."""

from __future__ import annotations

import torch
import torch.distributed as dist

from oxyray.train.engine import PARTS, StepStats


class Meter:
    """Means since the last reading: losses, throughput over all ranks, and the shares of rank 0's time."""

    def __init__(self, device: torch.device, counted: str = "targets", peak: float | None = None) -> None:
        self.rate, self.peak = f"{counted}_per_second", peak
        self.device, self.last, self.latest = device, dict[str, float](), dict[str, float]()
        self._clear()

    def add(self, stats: StepStats, waited: float, examples: int, seconds: float, flops: float = 0.0) -> None:
        for name in PARTS:
            self.seconds[name] += stats.seconds[name] + (waited if name == "data" else 0.0)
        self.examples += examples
        self.flops += flops
        self.total_seconds += seconds
        self.weight += stats.weight
        for name, value in {"loss": stats.loss, **stats.parts}.items():
            self.losses[name] = self.losses.get(name, 0.0) + value * stats.weight
        self.latest = {"grad_norm": stats.grad_norm, "lr": stats.lr}

    def read(self) -> dict[str, float]:
        """Collective."""
        sums = torch.tensor([self.examples, self.flops], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        examples, flops = sums.tolist()
        found = {name: value / max(self.weight, 1e-12) for name, value in self.losses.items()} | self.latest
        found[self.rate] = examples / max(self.total_seconds, 1e-9)
        if flops:
            found["tflops_per_second"] = flops / max(self.total_seconds, 1e-9) / 1e12
            if self.peak:
                found["mfu"] = found["tflops_per_second"] * 1e12 / self.peak / dist.get_world_size()
        total = max(sum(self.seconds.values()), 1e-9)
        found |= {f"share_{name}": value / total for name, value in self.seconds.items()}
        self.last = {"loss": found["loss"], self.rate: found[self.rate]}
        self._clear()
        return found

    def _clear(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.examples, self.total_seconds, self.weight, self.flops = 0, 0.0, 0.0, 0.0
        self.losses: dict[str, float] = {}
