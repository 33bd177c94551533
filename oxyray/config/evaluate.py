"""Measuring the policy beside its baselines, and looking at what one user gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oxyray.config.plain import need


@dataclass(kw_only=True)
class SasrecConfig:
    """The SASRec baseline (full cross-entropy).

    width: size of an item's vector
    layers: attention layers
    heads: attention heads; must divide width
    dropout: share of activations dropped in training
    history: latest events of a user that it sees
    lr: learning rate
    epochs: passes over the training events at most
    patience: validations without a gain before training stops
    targets_per_step: training targets in one step
    max_minutes: stop after this time; null: no limit
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.4
    history: int = 50
    lr: float = 3e-3
    epochs: int = 60
    patience: int = 5
    targets_per_step: int = 1024
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "history", "lr", "epochs", "patience", "targets_per_step"):
            need(getattr(self, name) > 0, f"evaluate.sasrec.{name}", f"must be positive, got {getattr(self, name)}")
        need(self.width % self.heads == 0, "evaluate.sasrec.heads", f"must divide evaluate.sasrec.width={self.width}, got {self.heads}")
        need(0 <= self.dropout < 1, "evaluate.sasrec.dropout", f"must lie in [0, 1), got {self.dropout}")


@dataclass(kw_only=True)
class EvaluateConfig:
    """The table of results and the baselines beside the policy.

    ks: list lengths K of HR@K, Recall@K, NDCG@K
    max_requests: test requests at most, drawn with the seed; null: all
    baselines: of popularity, knn, sasrec
    hide: what of a request the policy is not told, to see what it was worth (paper, Table 9): of trigger, text
    before: where the policy was aligned, the supervised one that it started from is measured too
    bootstrap: resamples for the confidence intervals; 0: none
    """

    ks: tuple[int, ...] = (1, 5, 10, 30)
    max_requests: int | None = 20000
    baselines: tuple[str, ...] = ("popularity", "knn", "sasrec")
    hide: tuple[Literal["trigger", "text"], ...] = ()
    before: bool = True
    bootstrap: int = 200
    sasrec: SasrecConfig = field(default_factory=SasrecConfig)

    def __post_init__(self) -> None:
        need(len(self.ks) > 0 and all(k >= 1 for k in self.ks), "evaluate.ks", f"must be positive whole numbers, got {self.ks}")
        known = {"popularity", "knn", "sasrec"}
        need(set(self.baselines) <= known, "evaluate.baselines", f"known are {sorted(known)}, got {list(self.baselines)}")
        need(len(set(self.baselines)) == len(self.baselines), "evaluate.baselines", f"names one twice: {list(self.baselines)}")
        most = self.max_requests
        need(most is None or most > 0, "evaluate.max_requests", f"must be positive or null, got {most}")
        need(self.bootstrap >= 0, "evaluate.bootstrap", f"must be 0 (none) or more, got {self.bootstrap}")


@dataclass(kw_only=True)
class RecommendConfig:
    """What `oxyray recommend` prints; on the command line the short keys `user`, `scenario`, `trigger`, `query`, `k` set these.

    user: user_id to recommend to
    scenario: scenario to recommend in; null: the user's last
    trigger: item_id that the request starts from, for scenarios with a trigger
    query: what the user typed
    k: items to recommend
    """

    user: str | None = None
    scenario: str | None = None
    trigger: str | None = None
    query: str | None = None
    k: int = 10

    def __post_init__(self) -> None:
        need(self.k >= 1, "recommend.k", f"must be at least 1, got {self.k}")
