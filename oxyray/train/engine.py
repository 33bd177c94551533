"""The one place that joins the dense policy (DeepSpeed ZeRO 0 to 3) and the sharded tables (TorchRec) into optimizer steps.

A step is the leaf cut. The distinct ids of all micro-batches are looked up once, the rows are cut off as leaves, the micro-batches run
forward and backward on slices of them (DeepSpeed accumulates the dense gradient), the dense optimizer steps, and one backward of the rows
with the leaves' gradients updates the tables. So fused table updates happen once a step, in one short window, after everything that could
fail.

Choices.
- The loss is a global weighted mean: `policy.loss` gives sums, and they are divided by the sum of weights over all ranks and
  micro-batches. DeepSpeed and TorchRec both divide gradients by the number of ranks, so each local loss is multiplied by it: unequal
  counts per rank come out right, zero included.
- Clipping: the global norm covers the dense gradient alone (the tables' gradient is never whole on any rank, and the adaptive table
  optimizers are insensitive to its scale). `gradient_clipping` is always set, because DeepSpeed clips at 1.0 unless told otherwise.
- bf16 is autocast over fp32 weights, in every ZeRO stage alike: no second copy of the weights and no other optimizer to checkpoint.
- AdamW is torch's own: the same on CPU and GPU, with no kernel compiled at the first step.
- Random numbers of a step depend on seed, step and rank alone, so a resumed run draws what the lost one would have drawn.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from oxyray.config import OptimConfig
from oxyray.errors import TrainingError
from oxyray.model.moe import after_step
from oxyray.model.tables import TableSpec
from oxyray.train.dense import Moments, fill_moments, read_dense
from oxyray.train.sparse import Leaves, ShardedTables

Tensor = torch.Tensor
PARTS = ("data", "sparse", "forward", "backward", "optimizer")


class TrainBatch(Protocol):
    """What the engine asks of a batch; `oxyray.data.batch.Batch` is one."""

    def lookups(self) -> dict[str, Tensor]: ...

    def to(self, device: torch.device) -> TrainBatch: ...

    def weight(self) -> float: ...


@dataclass(frozen=True)
class StepStats:
    """One optimizer step. `loss` and `parts` are means over the global `weight`; `seconds` say where this rank's time went, by `PARTS`."""

    step: int
    loss: float
    parts: dict[str, float]
    weight: float
    grad_norm: float
    lr: float
    seconds: dict[str, float]


class TrainEngine:
    """`policy.loss(batch, rows)` must give an object with `total`, the sum of weighted losses, and `parts`, a dict of sums. All ranks
    make the same calls.

    Weights are taken from `policy` (rank 0's are sent to the others), moments from `moments` when a run goes on.
    """

    def __init__(
        self,
        policy: nn.Module,
        tables: Sequence[TableSpec],
        optim: OptimConfig,
        *,
        total_steps: int,
        device: torch.device | str = "cpu",
        micro_batches: int = 1,
        seed: int = 0,
        moments: Moments | None = None,
        deepspeed: Mapping[str, Any] | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise TrainingError(
                "TrainEngine needs an initialised process group, also for one process: call torch.distributed.init_process_group first"
            )
        self.optim, self.total_steps, self.micro_batches, self.seed = optim, max(1, total_steps), micro_batches, seed
        self.device, self.rank, self.world = torch.device(device), dist.get_rank(), dist.get_world_size()
        self.step_count = moments.step if moments else 0
        self.policy = policy
        self.tables = ShardedTables(tables, optim, self.device, seed)
        self._dense = self._initialise(_LossModule(policy, optim.precision, self.device.type), dict(deepspeed or {}))
        fill_moments(self._dense, policy, moments)
        self._clock = _Clock(self.device)

    def step(self, micro_batches: Sequence[TrainBatch], progress: float | None = None) -> StepStats:
        """One optimizer step on this rank's micro-batches (exactly `micro_batches` of them; weight 0 is allowed). `progress` in [0, 1]
        places the step on the learning-rate schedule; by default the share of `total_steps` done. Raises TrainingError on a loss or
        gradient that is not finite, before anything is changed."""
        if len(micro_batches) != self.micro_batches:
            raise TrainingError(f"a step takes {self.micro_batches} micro-batches, got {len(micro_batches)}")
        self._clock.start()
        self.policy.train()
        torch.manual_seed(hash((self.seed, self.step_count, self.rank)) % 2**63)
        scale = schedule(self.optim, self.step_count / self.total_steps if progress is None else progress)
        self._set_lr(scale)
        batches = [batch.to(self.device) for batch in micro_batches]
        weight = self._sum_over_ranks([sum(batch.weight() for batch in batches)])[0]
        self._clock.lap("data")
        leaves = Leaves.look_up(self.tables, [batch.lookups() for batch in batches])
        self._clock.lap("sparse")
        losses = self._accumulate(batches, leaves, max(weight, 1e-12))
        grad_norm = self._step_dense(leaves, losses)
        self._clock.lap("optimizer")
        leaves.backward()
        self._clock.lap("sparse")
        self.step_count += 1
        means = {name: value / max(weight, 1e-12) for name, value in losses.items()} | after_step(self.policy)
        return StepStats(self.step_count, means.pop("total"), means, weight, grad_norm, self.optim.lr * scale, self._clock.taken())

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows for evaluation. Collective: each rank may ask for other ids, or none."""
        with torch.no_grad():
            return self.tables.lookup(ids)

    def dense(self, moments: bool = True) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter whole, in fp32, on the CPU of every rank, one at a time: name and {weight, exp_avg, exp_avg_sq}. Collective."""
        return read_dense(self._dense, self.policy, moments)

    def whole(self) -> dict[str, Tensor]:
        """The policy's state dict with each parameter whole, in fp32, on the CPU of every rank: parameters, and what else is saved with
        them. Collective; right for every ZeRO stage."""
        weights = {name: values["weight"] for name, values in self.dense(moments=False)}
        saved = {name: value for name, value in self.policy.state_dict().items() if name not in weights}
        return weights | {name: value.detach().cpu().clone() for name, value in saved.items()}

    def gather_dense(self) -> dict[str, Tensor]:
        """`whole` on rank 0, empty elsewhere. Collective."""
        weights = self.whole()
        return {} if self.rank else weights

    def close(self) -> None:
        """Give back DeepSpeed's buffers and hooks."""
        self._dense.destroy()

    def _initialise(self, module: _LossModule, overrides: dict[str, Any]) -> Any:
        os.environ["DS_ACCELERATOR"] = self.device.type
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        # Else DeepSpeed compiles a shared-memory collective at the first start: minutes, and a compiler that users may lack. gloo does
        # without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _import_muon()
        module.to(self.device)
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)
        matrices = [p for p in module.parameters() if p.ndim > 1]
        vectors = [p for p in module.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.optim.lr, betas=self.optim.betas, fused=True)
        numel = sum(p.numel() for p in module.parameters())
        zero = {
            "stage": self.optim.zero_stage,
            "reduce_bucket_size": min(numel + 1024, 200_000_000),
            "overlap_comm": self.device.type == "cuda",
        }
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.optim.clip,
            "zero_optimization": zero | overrides.pop("zero_optimization", {}),
            "steps_per_print": 10**9,
        } | overrides
        return deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=False)[0]

    def _set_lr(self, scale: float) -> None:
        for group in self._dense.optimizer.param_groups:
            group["lr"] = self.optim.lr * scale
        self.tables.set_lr(self.optim.table_lr * scale)

    def _accumulate(self, batches: Sequence[TrainBatch], leaves: Leaves, weight: float) -> dict[str, float]:
        """Forward and backward of every micro-batch; loss sums over all ranks."""
        sums: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            total, parts = self._dense(batch, leaves.slice(micro))
            self._clock.lap("forward")
            self._dense.backward(total * (self.world / weight), scale_wrt_gas=False)
            if micro + 1 < len(batches):
                self._dense.step()  # no boundary yet: counts the micro-batch
            self._clock.lap("backward")
            for name, value in {"total": total.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        values = self._sum_over_ranks([float(value) for value in sums.values()])
        return dict(zip(sums, values, strict=True))

    def _step_dense(self, leaves: Leaves, losses: dict[str, float]) -> float:
        """Check all, then step. Returns the norm of the dense gradient before clipping.

        ZeRO 1 to 3 take the norm over all ranks' parts themselves and leave weights and moments alone where it is not finite, so there it
        can be read afterwards; stage 0 would step.
        """
        whole = self._sum_over_ranks([float(not leaves.finite())])[0] == 0 and math.isfinite(sum(losses.values()))
        norm = None
        if whole and self.optim.zero_stage == 0:
            norm = float(nn.utils.get_total_norm([p.grad for p in self._dense.module.parameters() if p.grad is not None]))
            whole = math.isfinite(norm)
        if whole:
            self._dense.step()
            norm = float(self._dense.get_global_grad_norm()) if norm is None else norm
        if not whole or norm is None or not math.isfinite(norm):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            raise TrainingError(
                f"step {self.step_count + 1}: the loss or its gradient is not finite (sums: {shown}): lower optim.lr or "
                "optim.table_lr, or look for bad values in the data; the last checkpoint is whole"
            )
        return norm

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()


def _import_muon() -> None:
    """DeepSpeed imports its Muon whatever the optimizer is, and that loads torch's compiler, which takes half as long as torch itself.
    Nobody uses Muon here, so it is imported beforehand, uncompiled. Private names of DeepSpeed 0.19."""
    from deepspeed.runtime import compiler

    compiles, compiler.compile = compiler.compile, lambda *args, **kwargs: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiles


def schedule(optim: OptimConfig, progress: float) -> float:
    """Share of the highest learning rate at `progress` of the run: a linear warm-up, then constant or a cosine down to 0."""
    if progress < optim.warmup_share:
        return max(progress / optim.warmup_share, 0.01)
    if optim.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - optim.warmup_share) / (1 - optim.warmup_share))))


class _LossModule(nn.Module):
    """`policy.loss` as a forward pass with a plain tuple, which is what DeepSpeed's hooks understand."""

    def __init__(self, policy: nn.Module, precision: str, kind: str) -> None:
        super().__init__()
        self.policy, self.precision, self.kind = policy, precision, kind

    def forward(self, batch: Any, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.kind, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            out: Any = self.policy.loss(batch, rows)  # type: ignore[operator]
        return out.total.float(), {name: value.detach() for name, value in out.parts.items()}


class _Clock:
    """Where a step's time goes. On a GPU each lap waits for the kernels, so that the shares are true."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self.last
        self.last = now

    def taken(self) -> dict[str, float]:
        return dict(self.seconds)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
