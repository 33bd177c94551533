"""How the item encoder joins text and picture, and what it learns from."""

from __future__ import annotations

from dataclasses import dataclass, field

from oxyray.config.plain import need
from oxyray.config.train import CourseConfig, OptimConfig

SOURCES = ("swing", "query", "peers")


@dataclass(kw_only=True)
class FusionConfig:
    """The fusion encoder (paper 2.2.2, 4.2): projections, Q-Former, MLP.

    width: inner width
    queries: learned query tokens that read an item
    layers: Q-Former layers; 0: the item's tokens are averaged (one model for both, no fusion)
    heads: attention heads
    out: dimensions of an item's vector
    temperature: of the contrastive loss
    """

    width: int = 128
    queries: int = 4
    layers: int = 2
    heads: int = 4
    out: int = 256
    temperature: float = 0.07

    def __post_init__(self) -> None:
        for name in ("width", "queries", "heads", "out"):
            need(getattr(self, name) >= 1, f"fuse.model.{name}", f"must be at least 1, got {getattr(self, name)}")
        need(self.layers >= 0, "fuse.model.layers", f"must be 0 or more, got {self.layers}")
        need(self.width % self.heads == 0, "fuse.model.heads", f"{self.heads} heads do not divide the width {self.width}")
        need(self.width % 4 == 0, "fuse.model.width", f"must be a multiple of 4, got {self.width}")
        need(self.temperature > 0, "fuse.model.temperature", f"must be positive, got {self.temperature}")


@dataclass(kw_only=True)
class FuseConfig(CourseConfig):
    """Training of the item encoder from pairs that belong together (paper 4.2). It is needed where sid.vectors=fused.

    text: whether it reads the items' texts
    given: whether it reads the shop's own vectors of `sid.given`
    pictures: none; small: a convolutional encoder for small pictures, trained here; or the path of any Hugging Face vision model, frozen
    picture_size: pictures are brought to this many pixels a side, where pictures=small
    rates: shares of the pairs by source: swing (two items taken by the same users), query (what was typed, and the item taken), peers (two
        items of one category taken after the same query; in a shop where nothing is typed, whose texts are alike)
    neighbours: most similar items by Swing that each item makes pairs with
    pairs_per_step: pairs in one optimizer step, over all workers; each is the others' negative (of its `micro_batches` part of the step)
    """

    epochs: float = 8
    max_minutes: float | None = None
    patience: int = 3
    text: bool = True
    given: bool = False
    pictures: str = "none"
    picture_size: int = 32
    rates: dict[str, float] = field(default_factory=lambda: {"swing": 1.0})
    neighbours: int = 20
    pairs_per_step: int = 512
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.01, zero_stage=1))
    model: FusionConfig = field(default_factory=FusionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("neighbours", "pairs_per_step"):
            need(getattr(self, name) > 0, f".{name}", f"must be positive, got {getattr(self, name)}")
        unknown = [name for name in self.rates if name not in SOURCES]
        need(not unknown, ".rates", f"no source {', '.join(unknown)}; known are {', '.join(SOURCES)}")
        need(all(rate >= 0 for rate in self.rates.values()), ".rates", f"must be 0 or more, got {self.rates}")
        need(sum(self.rates.values()) > 0, ".rates", "all are 0, so there is nothing to learn from: give one a rate")
        need(
            self.text or self.given or self.pictures != "none",
            ".text",
            "false, with given=false and pictures=none, leaves nothing to read",
        )
        need(self.text or not self.rates.get("query"), ".rates.query", "needs fuse.text=true: queries are texts")
        need(self.picture_size % 8 == 0 and self.picture_size > 0, ".picture_size", f"must be a multiple of 8, got {self.picture_size}")
