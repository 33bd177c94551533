"""Alignment: the objective, and the loop of generation and learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oxyray.config.plain import need
from oxyray.config.train import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How the policy learns from rewards.

    name: sa_gcpo, grpo, gspo, ecpo, gbpo or dapo; supervised learns the items really taken alone, as an experiment's control
    tau_positive: SA-GCPO's temperature of candidates at least as good as the user's real choice
    tau_negative: its temperature of the others; higher lets their gradients fade sooner
    clip: how far a ratio may leave 1 (grpo, gspo, ecpo, dapo)
    clip_high: how far it may rise (dapo)
    early: ECPO's delta, beyond clip
    epsilon: added to a group's standard deviation; a smaller deviation is none
    kl: weight of the divergence from the reference policy; 0 turns it off
    target_joins: the user's real choice is one more candidate of its group
    """

    name: Literal["sa_gcpo", "grpo", "gspo", "ecpo", "gbpo", "dapo", "supervised"] = "sa_gcpo"
    tau_positive: float = 1.0
    tau_negative: float = 1.0
    clip: float = 0.2
    clip_high: float = 0.28
    early: float = 0.1
    epsilon: float = 1e-6
    kl: float = 0.0
    target_joins: bool = True

    def __post_init__(self) -> None:
        for key in ("tau_positive", "tau_negative", "clip_high", "epsilon"):
            need(getattr(self, key) > 0, f".{key}", f"must be positive, got {getattr(self, key)}")
        need(0 < self.clip < 1, ".clip", f"must lie in (0, 1), got {self.clip}")
        for key in ("early", "kl"):
            need(getattr(self, key) >= 0, f".{key}", f"must be 0 or more, got {getattr(self, key)}")


@dataclass(kw_only=True)
class AlignConfig:
    """Post-training by rewards (paper 2.4): learners, rollout workers and a reward actor.

    steps: optimizer steps
    requests_per_step: requests in one step, over all pieces
    pieces: parts of a step; a rollout worker generates for one at a time, a learner takes its share of them as micro-batches
    group: candidates generated for each request
    candidates: distinct draws without replacement, sample with, beam takes the most probable
    temperature: of generation, and of the probabilities that are learned
    synthetic_share: share of the requests whose labels come from the ranker alone
    supervised_rate: weight of the supervised loss on logged targets beside the rewards
    supervised_targets: logged targets in one step, over all learners
    staleness: versions that candidates may be behind the policy that learns from them; 0 waits for every step, 1 generates while it learns
    learners: learning processes, one rank each
    rollouts: generating processes
    judges: processes that compute rewards
    dense: how dense weights reach rollout workers: store, one copy a node in Ray's object store; broadcast, one collective (NCCL on GPUs)
    layout: colocated puts learners and rollout workers on the same devices, split keeps them apart
    threads_per_process: CPU threads of each process; null: the cores divided by the processes
    gpu: auto uses GPUs where there are any
    shared_memory: folder in memory through which tables are handed over on a node
    eval_every_steps: steps between two validations
    eval_requests: validation requests at most
    save_every_steps: steps between two checkpoints
    max_restarts: deaths of a rollout worker or judge that a run survives, and of learners
    timeout_s: longest wait for any answer of another process, in seconds
    seed: of requests and draws
    """

    steps: int = 60
    requests_per_step: int = 64
    pieces: int = 2
    group: int = 16
    candidates: Literal["distinct", "sample", "beam"] = "distinct"
    temperature: float = 1.0
    synthetic_share: float = 0.17
    supervised_rate: float = 0.5
    supervised_targets: int = 1024
    staleness: int = 1
    learners: int = 1
    rollouts: int = 1
    judges: int = 1
    dense: Literal["store", "broadcast"] = "store"
    layout: Literal["colocated", "split"] = "colocated"
    threads_per_process: int | None = None
    gpu: Literal["auto", "never"] = "auto"
    shared_memory: str = "/dev/shm"
    eval_every_steps: int = 20
    eval_requests: int = 2000
    save_every_steps: int = 20
    max_restarts: int = 4
    timeout_s: float = 300.0
    seed: int = 7
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, table_lr=0.005))

    def __post_init__(self) -> None:
        counts = ("steps", "requests_per_step", "pieces", "learners", "rollouts", "judges", "supervised_targets")
        for name in (*counts, "eval_every_steps", "save_every_steps"):
            need(getattr(self, name) >= 1, f".{name}", f"must be at least 1, got {getattr(self, name)}")
        need(self.group >= 2, ".group", f"an advantage needs at least 2 candidates, got {self.group}")
        need(self.pieces % self.learners == 0, ".pieces", f"must be a multiple of the learners ({self.learners}), got {self.pieces}")
        need(self.temperature > 0, ".temperature", f"must be positive, got {self.temperature}")
        need(0 <= self.synthetic_share <= 1, ".synthetic_share", f"is a share in [0, 1], got {self.synthetic_share}")
        for name in ("supervised_rate", "staleness", "max_restarts", "eval_requests"):
            need(getattr(self, name) >= 0, f".{name}", f"must be 0 or more, got {getattr(self, name)}")
        threads = self.threads_per_process
        need(threads is None or threads > 0, ".threads_per_process", f"must be positive or null, got {threads}")
        least = self.pieces
        need(self.requests_per_step >= least, ".requests_per_step", f"must give every piece a request: at least {least}")
        need(self.timeout_s > 0, ".timeout_s", f"must be positive, got {self.timeout_s}")
