"""Where it runs, and who is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oxyray.config.plain import need


@dataclass(kw_only=True)
class TrackingConfig:
    """Weights & Biases beside `metrics.jsonl`.

    wandb: send every line of metrics.jsonl to wandb too
    project: wandb project
    mode: offline keeps the wandb files in the run folder (`wandb sync` sends them later)
    entity: wandb team or user; null: the account's own
    """

    wandb: bool = False
    project: str = "oxyray"
    mode: Literal["online", "offline"] = "offline"
    entity: str | None = None


@dataclass(kw_only=True)
class ClusterConfig:
    """Ray: `address` is `local` (a fresh one), `auto` (the running one) or an address.

    address: local starts Ray for this command; auto or HOST:PORT joins a running cluster
    cpus: cores that a local Ray offers; null: all
    object_store_gb: memory of a local Ray's object store, in GiB
    start_timeout_s: longest wait for Ray, in seconds
    stages_at_once: stages that need nothing of each other (pretrain and rank) run side by side, at most so many, where there is room
    """

    address: str = "local"
    cpus: int | None = None
    object_store_gb: float = 1.0
    start_timeout_s: float = 120.0
    stages_at_once: int = 1

    def __post_init__(self) -> None:
        need(self.cpus is None or self.cpus >= 1, "cluster.cpus", f"must be at least 1 or null, got {self.cpus}")
        need(self.object_store_gb >= 0.1, "cluster.object_store_gb", f"must be at least 0.1, got {self.object_store_gb}")
        need(self.stages_at_once >= 1, "cluster.stages_at_once", f"must be at least 1, got {self.stages_at_once}")
        need(self.start_timeout_s > 0, "cluster.start_timeout_s", f"must be positive, got {self.start_timeout_s}")
