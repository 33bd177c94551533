"""The whole configuration, as keyword-only dataclasses.

Hydra composes a DictConfig from `conf/`; `from_dict` turns it into these classes once, at the entry point. After that no component reads a
DictConfig: each receives its own slice. Whatever can be known to be wrong before work starts (a wrong type, an unknown key, heads that do
not divide the width) is a `ConfigError` here: one line that names the key, what is wrong, and the mend.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from oxyray.errors import ConfigError

T = TypeVar("T")

Size = Literal["tiny", "small", "medium", "large", "million"]


def _need(ok: bool, key: str, why: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: {why}")


@dataclass(kw_only=True)
class MallConfig:
    """The embedded shop (see `oxyray.data.mall`). `size` fixes items, users and days; the other fields override it when given."""

    size: Size = "small"
    seed: int = 7
    items: int | None = None
    users: int | None = None
    days: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("items", "users", "days"):
            value = getattr(self, name)
            _need(value is None or value > 0, f"data.mall.{name}", f"must be positive, got {value}")
        _need(self.workers >= 1, "data.mall.workers", f"must be at least 1, got {self.workers}")


@dataclass(kw_only=True)
class DataConfig:
    """Where the shop's tables come from and how they are split. `source` picks the reader:

    `mall` simulates the embedded shop; `tables` reads canonical Parquet from `path`; `files` imports CSV or Parquet files by a column mapping;
    `amazon_reviews` reads the published JSON-lines dumps.
    """

    name: str
    source: Literal["mall", "tables", "files", "amazon_reviews"]
    path: str | None = None
    items_file: str | None = None
    events_file: str | None = None
    users_file: str | None = None
    items_columns: dict[str, str] = field(default_factory=dict)
    events_columns: dict[str, str] = field(default_factory=dict)
    users_columns: dict[str, str] = field(default_factory=dict)
    default_action: str = "purchase"
    default_scenario: str | None = None
    core: int = 0
    split: Literal["time", "leave_one_out"] = "time"
    valid_share: float = 0.1
    test_share: float = 0.1
    time_unit: Literal["seconds", "position"] = "seconds"
    latest_time: int | None = None
    max_bad_share: float = 0.01
    shards: int = 1
    mall: MallConfig = field(default_factory=MallConfig)

    def __post_init__(self) -> None:
        _need(self.source == "mall" or bool(self.path), "data.path", f"data.source={self.source} needs a folder: data.path=/my/tables")
        _need(0 < self.valid_share < 1 and 0 < self.test_share < 1 and self.valid_share + self.test_share < 1,
              "data.valid_share, data.test_share", f"must be positive and sum to less than 1, got {self.valid_share} and {self.test_share}")
        _need(0 <= self.max_bad_share <= 1, "data.max_bad_share", f"is a share between 0 and 1, got {self.max_bad_share}")
        _need(self.shards >= 1, "data.shards", f"must be at least 1, got {self.shards}")
        _need(self.core >= 0, "data.core", f"must be 0 (off) or more, got {self.core}")


@dataclass(kw_only=True)
class SidConfig:
    """Semantic IDs (paper 2.2.2): text vectors, optionally joined with behaviour, quantised by RQ-KMeans into `levels` codes of `width`."""

    encoder: str = "minilm"
    vectors: Literal["text", "text_behaviour"] = "text"
    behaviour_dim: int = 128
    behaviour_weight: float = 1.0
    pca_dim: int = 0
    levels: int = 3
    width: int = 256
    iterations: int = 25
    seed: int = 7
    batch_items: int = 64
    workers: int = 1
    cache_dir: str = "~/.cache/oxyray/vectors"

    def __post_init__(self) -> None:
        _need(self.levels >= 1, "sid.levels", f"must be at least 1, got {self.levels}")
        _need(2 <= self.width <= 65536, "sid.width", f"must lie in 2..65536, got {self.width}")
        _need(self.iterations >= 1, "sid.iterations", f"must be at least 1, got {self.iterations}")
        _need(self.workers >= 1, "sid.workers", f"must be at least 1, got {self.workers}")


@dataclass(kw_only=True)
class ModelConfig:
    """The policy (paper 2.3.3): encoder over history and profile, decoder over `BOS, instruction, s1..sL`.

    `head` is what scores a code: `tied` scores a prefix's children with vectors tied to the items below them (needs every item's vector in each
    step: catalogues to some 200k items), `codes` has one output vector per level and code (any catalogue).
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
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "heads", "encoder_layers", "decoder_layers", "hidden", "history", "row_dim"):
            _need(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        _need(self.width % self.heads == 0, "model.heads",
              f"must divide model.width, but {self.heads} heads do not divide width {self.width}: set model.width={self.width // self.heads * self.heads or self.heads}")
        _need(self.width // self.heads % 2 == 0, "model.heads",
              f"width / heads must be even for rotary positions, got {self.width} / {self.heads}")
        _need(self.row_dim % 4 == 0, "model.row_dim", f"must be a multiple of 4 (an embedding kernel's rule), got {self.row_dim}")
        _need(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), got {self.dropout}")
        _need(self.item_loss >= 0, "model.item_loss", f"must be 0 or more, got {self.item_loss}")
        _need(0 <= self.label_smoothing < 1, "model.label_smoothing", f"must lie in [0, 1), got {self.label_smoothing}")


@dataclass(kw_only=True)
class OptimConfig:
    """One optimizer step: AdamW on the dense part (DeepSpeed), a fused optimizer on the tables (TorchRec)."""

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
        _need(self.lr >= 0 and self.table_lr >= 0, "train.optim.lr", "learning rates must be 0 or more")
        _need(self.zero_stage in (0, 1, 2, 3), "train.optim.zero_stage", f"must be 0, 1, 2 or 3, got {self.zero_stage}")
        _need(self.clip > 0, "train.optim.clip", f"must be positive (1e9 for no clipping), got {self.clip}")
        _need(0 <= self.warmup_share < 1, "train.optim.warmup_share", f"is a share of the run in [0, 1), got {self.warmup_share}")


@dataclass(kw_only=True)
class TrainConfig:
    """Pre-training. Sizes are named by what they count; `targets_per_step` is the whole optimizer step over all workers."""

    epochs: float = 10
    max_minutes: float | None = None
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
    seed: int = 7
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "targets_per_step", "micro_batches", "workers", "eval_every_epochs", "patience", "keep_checkpoints"):
            _need(getattr(self, name) > 0, f"train.{name}", f"must be positive, got {getattr(self, name)}")
        _need(self.targets_per_step >= self.workers * self.micro_batches, "train.targets_per_step",
              f"must give every worker and micro-batch a target: at least {self.workers * self.micro_batches}")


@dataclass(kw_only=True)
class GenerateConfig:
    """Beam search over the prefix index. `normalise` says over what a code's probability sums to one."""

    beams: int = 50
    normalise: Literal["children", "vocabulary"] = "children"
    requests_per_batch: int = 256

    def __post_init__(self) -> None:
        _need(self.beams >= 1, "generate.beams", f"must be at least 1, got {self.beams}")
        _need(self.requests_per_batch >= 1, "generate.requests_per_batch", f"must be at least 1, got {self.requests_per_batch}")


@dataclass(kw_only=True)
class SasrecConfig:
    """The SASRec baseline (full cross-entropy)."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.4
    history: int = 50
    lr: float = 1e-3
    epochs: int = 60
    patience: int = 5
    targets_per_step: int = 3500
    max_minutes: float | None = None


@dataclass(kw_only=True)
class EvaluateConfig:
    ks: tuple[int, ...] = (1, 5, 10, 30)
    max_requests: int | None = 20000
    baselines: tuple[str, ...] = ("popularity", "knn", "sasrec")
    bootstrap: int = 200
    sasrec: SasrecConfig = field(default_factory=SasrecConfig)

    def __post_init__(self) -> None:
        _need(len(self.ks) > 0 and all(k >= 1 for k in self.ks), "evaluate.ks", f"must be positive whole numbers, got {self.ks}")
        known = {"popularity", "knn", "sasrec"}
        _need(set(self.baselines) <= known, "evaluate.baselines", f"known are {sorted(known)}, got {list(self.baselines)}")


@dataclass(kw_only=True)
class RecommendConfig:
    """What `oxyray recommend` prints; on the command line the short keys `user`, `scenario`, `trigger`, `k` set these."""

    user: str | None = None
    scenario: str | None = None
    trigger: str | None = None
    k: int = 10


@dataclass(kw_only=True)
class TrackingConfig:
    wandb: bool = False
    project: str = "oxyray"
    mode: Literal["online", "offline"] = "offline"
    entity: str | None = None


@dataclass(kw_only=True)
class ClusterConfig:
    """Ray: `address` is `local` (a fresh one), `auto` (the running one) or an address."""

    address: str = "local"
    cpus: int | None = None
    object_store_gb: float = 1.0
    start_timeout_s: float = 120.0


@dataclass(kw_only=True)
class Config:
    run_dir: str
    seed: int = 7
    force: bool = False
    data: DataConfig
    sid: SidConfig = field(default_factory=SidConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _need(max(self.evaluate.ks) <= self.generate.beams, "generate.beams",
              f"evaluate.ks asks for the top {max(self.evaluate.ks)}, but generate.beams={self.generate.beams}: set generate.beams={max(self.evaluate.ks)} or more")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from plain values, checking every key and type.

    Raises ConfigError naming the key (`where` is its dotted prefix), what came, what was expected and, for an unknown key, the nearest known one.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(f"{where}{key}: no such key" + (f"; did you mean {where}{near[0]}?" if near else f"; known here: {', '.join(sorted(known))}"))
    for name, spec in known.items():
        if name not in values and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name}: missing, and it has no default")
    return cls(**{key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values (JSON-able) of a config dataclass."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a group of keys, got {value!r}")
        return from_dict(typing.cast(type, hint), value, where + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ConfigError(f"{where}: expected a list{'' if args[-1] is Ellipsis else f' of {len(args)}'}, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(_convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
