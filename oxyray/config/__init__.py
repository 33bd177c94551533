"""The whole configuration, as keyword-only dataclasses.

Hydra composes a DictConfig from `conf/`; `from_dict` turns it into these classes once, at the entry point. After that no component reads a
DictConfig: each receives its own slice. Whatever can be known to be wrong before work starts (a wrong type, an unknown key, heads that do
not divide the width) is a `ConfigError` here: one line that names the key, what is wrong, and the mend.

Each class's docstring ends with its keys, one `key: what it means` a line. `oxyray STAGE --help` and `docs/configuration.md` print
those lines, so a key's meaning is written once, beside its default.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from oxyray.config.align import AlignConfig, ObjectiveConfig
from oxyray.config.cluster import ClusterConfig, TrackingConfig
from oxyray.config.data import MALL_ITEMS, DataConfig, MallConfig, SidConfig
from oxyray.config.evaluate import EvaluateConfig, RecommendConfig, SasrecConfig
from oxyray.config.fuse import FuseConfig, FusionConfig
from oxyray.config.model import ContextConfig, GenerateConfig, InstructionConfig, ModelConfig, MoEConfig, RetrievalConfig
from oxyray.config.plain import from_dict, need, set_dotted, to_dict
from oxyray.config.reward import RewardConfig
from oxyray.config.train import CourseConfig, OptimConfig, RankConfig, RankerConfig, TrainConfig


@dataclass(kw_only=True)
class Config:
    """Everything.

    run_dir: folder that holds all that the run makes
    seed: the one seed from which the others follow
    force: redo stages that are fresh
    """

    run_dir: str
    seed: int = 7
    force: bool = False
    data: DataConfig
    fuse: FuseConfig = field(default_factory=FuseConfig)
    sid: SidConfig = field(default_factory=SidConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        need(
            self.generate.normalise == "children" or self.model.head == "codes",
            "generate.normalise",
            "over the whole vocabulary needs model.head=codes: the tied head scores a prefix's children only",
        )
        need(
            self.generate.normalise == "children" or not self.model.repeats,
            "generate.normalise",
            "over the whole vocabulary does not know what was had already: set model.repeats=false",
        )
        beams, top = self.generate.beams, max(self.evaluate.ks)
        need(top <= beams, "generate.beams", f"{beams} beams cannot fill the top {top} of evaluate.ks: set generate.beams={top} or more")
        most, width = self.sid.width**self.sid.levels, self.sid.width
        if self.data.source == "mall":
            items = self.data.mall.items or MALL_ITEMS[self.data.mall.size]
            most = min(most, items)
        need(
            beams <= most, "generate.beams", f"{beams} beams are wider than the catalogue of {most} items at most: set it to {most} or less"
        )
        need(not self.fuse.given or self.sid.given is not None, "sid.given", "must name the file of the vectors for fuse.given=true")
        if self.data.source == "mall":
            need(width <= items, "sid.width", f"{width} codes are more than the shop's {items} items: set it to {items} or less")

    @property
    def processes(self) -> int:
        """The most processes that a stage has at work at a time."""
        aligning = self.align.learners + self.align.rollouts + self.align.judges
        return max(self.data.mall.workers, self.sid.workers, self.fuse.workers, self.train.workers, self.rank.workers, aligning)


__all__ = [
    "AlignConfig",
    "ClusterConfig",
    "Config",
    "ContextConfig",
    "CourseConfig",
    "DataConfig",
    "EvaluateConfig",
    "FuseConfig",
    "FusionConfig",
    "GenerateConfig",
    "InstructionConfig",
    "MallConfig",
    "MoEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RankConfig",
    "RankerConfig",
    "RecommendConfig",
    "RetrievalConfig",
    "RewardConfig",
    "SasrecConfig",
    "SidConfig",
    "TrackingConfig",
    "TrainConfig",
    "from_dict",
    "set_dotted",
    "to_dict",
]
