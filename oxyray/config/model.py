"""The policy, how it learns, how it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from oxyray.config.plain import need

ACTIONS = ("click", "cart", "purchase")
"""From weakest to strongest; an action's index is its strength."""


@dataclass(kw_only=True)
class ModelConfig:
    """The policy (paper 2.3.3): encoder over history and profile, decoder over `BOS, instruction, s1..sL`.

    `head` is what scores a code: `tied` scores a prefix's children with vectors tied to the items below them (needs every item's vector in
    each step: catalogues to some 200k items), `codes` has one output vector per level and code (any catalogue).

    width: size of a token's vector
    heads: attention heads; must divide width
    encoder_layers: layers over history and profile
    decoder_layers: layers over the generated codes
    hidden: inner size of the feed-forward part
    dropout: share of activations dropped in training
    history: latest events of a user that the encoder sees
    row_dim: size of a row in the item and user tables; a multiple of 4
    user_table: give every user a learned row
    causal_encoder: encode a user's history once for all its training positions
    head: what scores a code: tied or codes
    text_input: give the encoder the items' text vectors
    item_loss: weight of the auxiliary item-level loss; 0 turns it off
    item_negatives: items drawn from the catalogue as negatives of the item-level loss; 0: all of them (tied head)
    distill: weight of the codes' cross-entropy to the item-level softmax (tied head, item_negatives=0); 0 turns it off
    """

    width: int = 64
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    hidden: int = 128
    dropout: float = 0.1
    history: int = 50
    row_dim: int = 64
    user_table: bool = True
    causal_encoder: bool = True
    head: Literal["tied", "codes"] = "tied"
    text_input: bool = True
    item_loss: float = 0.5
    item_negatives: int = 2048
    distill: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "heads", "encoder_layers", "decoder_layers", "hidden", "history", "row_dim"):
            need(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        pair = 2 * self.heads  # a head's size is even, for rotary positions
        mend = f"set model.width={max(1, round(self.width / pair)) * pair}"
        need(self.width % self.heads == 0, "model.heads", f"{self.heads} heads do not divide model.width={self.width}: {mend}")
        need(self.width % pair == 0, "model.heads", f"model.width={self.width} / {self.heads} heads is odd, and must be even: {mend}")
        need(self.row_dim % 4 == 0, "model.row_dim", f"must be a multiple of 4 (an embedding kernel's rule), got {self.row_dim}")
        need(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), got {self.dropout}")
        need(self.item_loss >= 0, "model.item_loss", f"must be 0 or more, got {self.item_loss}")
        drawn = self.head == "tied" or self.item_loss == 0 or self.item_negatives > 0
        need(drawn, "model.item_negatives", "0 compares with the whole catalogue, which model.head=codes does not hold: set it to 2048")
        need(self.distill >= 0, "model.distill", f"must be 0 or more, got {self.distill}")
        possible = self.head == "tied" and self.item_loss > 0 and self.item_negatives == 0
        need(
            self.distill == 0 or possible,
            "model.distill",
            "learns from the whole item softmax: set model.head=tied, model.item_loss above 0 and model.item_negatives=0",
        )


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
            need(0 <= value < math.inf, f"train.optim.{name}", f"must be 0 or more and finite, got {value}")
        need(all(0 <= beta < 1 for beta in self.betas), "train.optim.betas", f"must lie in [0, 1), got {list(self.betas)}")
        need(self.zero_stage in (0, 1, 2, 3), "train.optim.zero_stage", f"must be 0, 1, 2 or 3, got {self.zero_stage}")
        need(self.clip > 0, "train.optim.clip", f"must be positive (1e9 for no clipping), got {self.clip}")
        need(0 <= self.warmup_share < 1, "train.optim.warmup_share", f"is a share of the run in [0, 1), got {self.warmup_share}")


@dataclass(kw_only=True)
class TrainConfig:
    """Pre-training. Sizes are named by what they count; `targets_per_step` is the whole optimizer step over all workers.

    epochs: passes over the training events
    max_minutes: stop training after this time, with the schedule fitted to it; null: no limit
    max_steps: stop after this many optimizer steps; null: no limit
    targets_per_step: training targets in one optimizer step, over all workers and micro-batches
    micro_batches: parts in which a worker runs its share of a step, to save memory
    workers: training processes
    threads_per_worker: CPU threads of a worker; null: the cores divided by the workers
    gpu: auto trains on GPUs where there are any
    action_weights: weight of a target by its action
    eval_every_epochs: epochs between two validations
    eval_requests: validation requests at most
    patience: validations without a gain before training stops
    save_every_minutes: minutes between two checkpoints
    keep_checkpoints: checkpoints kept
    max_restarts: deaths of a worker that a run survives
    timeout_s: longest wait for another worker, in seconds
    overfit_batches: train on the first this many steps' batches again and again, to see whether the model can learn; 0: off
    profile_steps: steps recorded by the torch profiler, into pretrain/profile/; 0: off
    seed: of initialisation, order and dropout
    """

    epochs: float = 10
    max_minutes: float | None = None
    max_steps: int | None = None
    targets_per_step: int = 3500
    micro_batches: int = 1
    workers: int = 1
    threads_per_worker: int | None = None
    gpu: Literal["auto", "never"] = "auto"
    action_weights: dict[str, float] = field(default_factory=lambda: {"click": 1.0, "cart": 2.0, "purchase": 4.0})
    eval_every_epochs: float = 1.0
    eval_requests: int = 2000
    patience: int = 10
    save_every_minutes: float = 5.0
    keep_checkpoints: int = 2
    max_restarts: int = 2
    timeout_s: float = 600.0
    overfit_batches: int = 0
    profile_steps: int = 0
    seed: int = 7
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        positive = ("epochs", "targets_per_step", "micro_batches", "workers", "eval_every_epochs", "patience", "keep_checkpoints")
        for name in (*positive, "timeout_s", "save_every_minutes"):
            need(getattr(self, name) > 0, f"train.{name}", f"must be positive, got {getattr(self, name)}")
        for name in ("max_minutes", "max_steps", "threads_per_worker"):
            need(
                getattr(self, name) is None or getattr(self, name) > 0,
                f"train.{name}",
                f"must be positive or null, got {getattr(self, name)}",
            )
        for name in ("overfit_batches", "profile_steps", "eval_requests", "max_restarts"):
            need(getattr(self, name) >= 0, f"train.{name}", f"must be 0 or more, got {getattr(self, name)}")
        for action in (*ACTIONS, *self.action_weights):
            need(action in ACTIONS, f"train.action_weights.{action}", f"no such action; known are {', '.join(ACTIONS)}")
            need(action in self.action_weights, f"train.action_weights.{action}", "missing; every action needs its weight")
            weight = self.action_weights[action]
            need(0 <= weight < math.inf, f"train.action_weights.{action}", f"must be 0 or more and finite, got {weight}")
        need(
            self.targets_per_step >= self.workers * self.micro_batches,
            "train.targets_per_step",
            f"must give every worker and micro-batch a target: at least {self.workers * self.micro_batches}",
        )


@dataclass(kw_only=True)
class GenerateConfig:
    """Beam search over the prefix index. `normalise` says over what a code's probability sums to one.

    beams: candidates kept a level; the most items that a request can get
    normalise: children: over the codes that lead to an item; vocabulary: over all codes of the level
    requests_per_batch: requests generated together
    """

    beams: int = 50
    normalise: Literal["children", "vocabulary"] = "children"
    requests_per_batch: int = 256

    def __post_init__(self) -> None:
        need(self.beams >= 1, "generate.beams", f"must be at least 1, got {self.beams}")
        need(self.requests_per_batch >= 1, "generate.requests_per_batch", f"must be at least 1, got {self.requests_per_batch}")
