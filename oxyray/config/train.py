"""How models learn: one optimizer step, a run of them, and what the policy and the ranker add to that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from oxyray.config.model import ACTIONS
from oxyray.config.plain import need


@dataclass(kw_only=True)
class OptimConfig:
    """One optimizer step: AdamW on the dense part (DeepSpeed), a fused optimizer on the tables (TorchRec).

    lr: highest learning rate of the dense part
    betas: AdamW's two decay rates
    weight_decay: AdamW's weight decay
    clip: largest norm of the dense gradient
    zero_stage: DeepSpeed ZeRO stage, 0 to 3: what the workers share out
    schedule: of the learning rate after the warm-up
    warmup_share: share of the run over which the learning rate rises
    table_lr: learning rate of the tables
    table_optimizer: fused optimizer of the tables
    precision: of the dense part; CPUs without bf16 units are faster in fp32
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    zero_stage: int = 1
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_share: float = 0.03
    table_lr: float = 0.05
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("lr", "table_lr", "weight_decay"):
            value = getattr(self, name)
            need(0 <= value < math.inf, f".{name}", f"must be 0 or more and finite, got {value}")
        need(all(0 <= beta < 1 for beta in self.betas), ".betas", f"must lie in [0, 1), got {list(self.betas)}")
        need(self.zero_stage in (0, 1, 2, 3), ".zero_stage", f"must be 0, 1, 2 or 3, got {self.zero_stage}")
        need(self.clip > 0, ".clip", f"must be positive (1e9 for no clipping), got {self.clip}")
        need(0 <= self.warmup_share < 1, ".warmup_share", f"is a share of the run in [0, 1), got {self.warmup_share}")


@dataclass(kw_only=True)
class CourseConfig:
    """A training run on Ray Train: how long, on how many workers, what it saves, when it stops.

    epochs: passes over the training data
    max_minutes: stop training after this time, with the schedule fitted to it; null: no limit
    max_steps: stop after this many optimizer steps; null: no limit
    micro_batches: parts in which a worker runs its share of a step, to save memory
    workers: training processes
    threads_per_worker: CPU threads of a worker; null: the cores divided by the workers
    gpu: auto trains on GPUs where there are any
    eval_every_epochs: epochs between two validations
    eval_requests: validation requests at most
    patience: validations without a gain before training stops
    save_every_minutes: minutes between two checkpoints
    keep_checkpoints: checkpoints kept
    max_restarts: deaths of a worker that a run survives
    timeout_s: longest wait for another worker, in seconds
    profile_steps: steps recorded by the torch profiler, into the stage's folder under profile/; 0: off
    seed: of initialisation, order and dropout
    """

    epochs: float = 10
    max_minutes: float | None = None
    max_steps: int | None = None
    micro_batches: int = 1
    workers: int = 1
    threads_per_worker: int | None = None
    gpu: Literal["auto", "never"] = "auto"
    eval_every_epochs: float = 1.0
    eval_requests: int = 2000
    patience: int = 10
    save_every_minutes: float = 5.0
    keep_checkpoints: int = 2
    max_restarts: int = 2
    timeout_s: float = 600.0
    profile_steps: int = 0
    seed: int = 7
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        positive = ("epochs", "micro_batches", "workers", "eval_every_epochs", "patience", "keep_checkpoints")
        for name in (*positive, "timeout_s", "save_every_minutes"):
            need(getattr(self, name) > 0, f".{name}", f"must be positive, got {getattr(self, name)}")
        for name in ("max_minutes", "max_steps", "threads_per_worker"):
            value = getattr(self, name)
            need(value is None or value > 0, f".{name}", f"must be positive or null, got {value}")
        for name in ("profile_steps", "eval_requests", "max_restarts"):
            need(getattr(self, name) >= 0, f".{name}", f"must be 0 or more, got {getattr(self, name)}")


@dataclass(kw_only=True)
class TrainConfig(CourseConfig):
    """Pre-training of the policy. Sizes are named by what they count; `targets_per_step` is the whole optimizer step over all workers.

    targets_per_step: training targets in one optimizer step, over all workers and micro-batches
    action_weights: weight of a target by its action
    scenario_weights: weight of a target by its scenario, times its action's: the rates at which scenarios are mixed; default stands for
        those not named (1 where it is not given). Scenarios of weight 0 are read as history alone, and not validated on
    hold_back: newest share of the training events that is left to alignment, which then asks for these alone; 0: both learn from all
    overfit_batches: train on the first this many steps' batches again and again, to see whether the model can learn; 0: off
    """

    targets_per_step: int = 1024
    action_weights: dict[str, float] = field(default_factory=lambda: {"click": 1.0, "cart": 2.0, "purchase": 4.0})
    scenario_weights: dict[str, float] = field(default_factory=dict)
    hold_back: float = 0.0
    overfit_batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.targets_per_step > 0, ".targets_per_step", f"must be positive, got {self.targets_per_step}")
        need(0 <= self.hold_back < 1, ".hold_back", f"is a share in [0, 1), got {self.hold_back}")
        need(self.overfit_batches >= 0, ".overfit_batches", f"must be 0 or more, got {self.overfit_batches}")
        for action in (*ACTIONS, *self.action_weights):
            need(action in ACTIONS, f".action_weights.{action}", f"no such action; known are {', '.join(ACTIONS)}")
            need(action in self.action_weights, f".action_weights.{action}", "missing; every action needs its weight")
            weight = self.action_weights[action]
            need(0 <= weight < math.inf, f".action_weights.{action}", f"must be 0 or more and finite, got {weight}")
        for scenario, weight in self.scenario_weights.items():
            need(0 <= weight < math.inf, f".scenario_weights.{scenario}", f"must be 0 or more and finite, got {weight}")
        least = self.workers * self.micro_batches
        need(self.targets_per_step >= least, ".targets_per_step", f"must give every worker and micro-batch a target: at least {least}")


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """The unified ranker (paper 2.4.2).

    width: size of a token's vector
    heads: attention heads; must divide width
    layers: transformer layers
    hidden: inner size of the feed-forward part and of the fusion
    dropout: share of activations dropped in training
    history: latest pages of a user in one sample; at least 2
    row_dim: size of a row in the item and user tables; a multiple of 4
    user_table: give every user a learned row
    text_input: give the ranker the items' text vectors
    """

    width: int = 64
    heads: int = 4
    layers: int = 2
    hidden: int = 128
    dropout: float = 0.1
    history: int = 50
    row_dim: int = 32
    user_table: bool = True
    text_input: bool = True

    def __post_init__(self) -> None:
        for name, least in {"width": 1, "heads": 1, "layers": 1, "hidden": 1, "history": 2, "row_dim": 1}.items():
            need(getattr(self, name) >= least, f".{name}", f"must be at least {least}, got {getattr(self, name)}")
        paired = self.width % (2 * self.heads) == 0
        need(paired, ".heads", f"twice the heads must divide the width of {self.width}, got {self.heads} heads")
        need(self.row_dim % 4 == 0, ".row_dim", f"must be a multiple of 4 (an embedding kernel's rule), got {self.row_dim}")
        need(0 <= self.dropout < 1, ".dropout", f"must lie in [0, 1), got {self.dropout}")


@dataclass(kw_only=True)
class RankConfig(CourseConfig):
    """Training of the unified ranker, which judges what the policy generates.

    items_per_step: judged items in one optimizer step, over all workers and micro-batches
    negatives: items drawn for each page where the log does not say what was shown
    eval_items: shown items of the test split that the final table rests on, at most; null: all
    baselines: what stands beside it in the table: pointwise, boosted (LightGBM)
    """

    epochs: float = 4
    max_minutes: float | None = None
    patience: int = 2
    items_per_step: int = 4096
    negatives: int = 20
    eval_items: int | None = 500_000
    baselines: tuple[Literal["pointwise", "boosted"], ...] = ("pointwise", "boosted")
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-3, table_lr=0.05))
    model: RankerConfig = field(default_factory=RankerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("items_per_step", "negatives"):
            need(getattr(self, name) > 0, f".{name}", f"must be positive, got {getattr(self, name)}")
        need(self.eval_items is None or self.eval_items > 0, ".eval_items", f"must be positive or null, got {self.eval_items}")
