"""The whole configuration, as keyword-only dataclasses.

Hydra composes a DictConfig from `conf/`; `from_dict` turns it into these classes once, at the entry point. After that no component reads a
DictConfig: each receives its own slice. Whatever can be known to be wrong before work starts (a wrong type, an unknown key, heads that do
not divide the width) is a `ConfigError` here: one line that names the key, what is wrong, and the mend.

Each class's docstring ends with its keys, one `key: what it means` a line. `oxyray STAGE --help` and `docs/configuration.md` print
those lines, so a key's meaning is written once, beside its default.
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
_WORDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

Size = Literal["tiny", "small", "medium", "large", "million"]


def _need(ok: bool, key: str, why: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: {why}")


@dataclass(kw_only=True)
class MallConfig:
    """The embedded shop (see `oxyray.data.mall`). `size` fixes items, users and days; the other fields override it when given.

    size: how large a shop: tiny is made in seconds, million has a million users
    seed: of the simulation; the same seed gives the same shop
    items: number of items, instead of the size's
    users: number of users, instead of the size's
    days: length of the simulated calendar in days, instead of the size's
    workers: processes that simulate users at the same time (more than 1: on Ray)
    """

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

    `mall` simulates the embedded shop; `tables` reads canonical Parquet from `path`; `files` imports CSV or Parquet files by a column
    mapping; `amazon_reviews` reads the published JSON-lines dumps.

    name: names the run folder and the report
    source: reader of the tables: mall, tables, files or amazon_reviews
    path: folder of the tables or files; not used by mall
    items_file: file of items inside path, where the reader does not know its name
    events_file: file of events inside path, likewise
    users_file: file of users inside path, likewise
    items_columns: canonical column: column of the items file
    events_columns: canonical column: column of the events file
    users_columns: canonical column: column of the users file
    action_names: the events' word for an action: click, cart or purchase (source=files)
    default_action: action of events that carry none
    default_scenario: scenario of events that carry none
    core: keep users and items with at least this many events, repeated until all have them; 0 keeps all
    split: time cuts all users at the same moments; leave_one_out keeps each user's last event for test and the one before for validation
    valid_share: share of the events, by time, for validation (split=time)
    test_share: share of the events, by time, for test (split=time)
    time_unit: whether event_time is in seconds or only the position in the user's sequence
    latest_time: events after this time (in time_unit) are quarantined; null: after the present
    max_bad_share: stop when more than this share of the rows breaks the contract
    shards: files into which the prepared events are divided; at least one a training worker
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
    action_names: dict[str, str] = field(default_factory=dict)
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
        _need(
            0 < self.valid_share < 1 and 0 < self.test_share < 1 and self.valid_share + self.test_share < 1,
            "data.valid_share, data.test_share",
            f"must be positive and sum to less than 1, got {self.valid_share} and {self.test_share}",
        )
        ordered = self.time_unit == "seconds" or self.split == "leave_one_out"
        _need(
            ordered,
            "data.split",
            "positions of different users cannot be cut at one time: set data.split=leave_one_out with time_unit=position",
        )
        _need(0 <= self.max_bad_share <= 1, "data.max_bad_share", f"is a share between 0 and 1, got {self.max_bad_share}")
        _need(self.shards >= 1, "data.shards", f"must be at least 1, got {self.shards}")
        _need(self.core >= 0, "data.core", f"must be 0 (off) or more, got {self.core}")


@dataclass(kw_only=True)
class SidConfig:
    """Semantic IDs (paper 2.2.2): text vectors, optionally joined with behaviour, quantised by RQ-KMeans into `levels` codes of `width`.

    encoder: minilm (from its package) or the path of any Hugging Face text encoder
    vectors: text alone, or text joined with co-occurrence in the training events
    behaviour_dim: dimensions of the behaviour part
    behaviour_weight: weight of the behaviour part beside the text part
    pca_dim: dimensions kept by PCA before quantisation; 0 keeps all
    levels: codes an item
    width: codes a level
    iterations: k-means rounds a level
    seed: of k-means and its re-seeded clusters
    collisions: reassign moves items that share a SID to the nearest free code of the last level; none leaves them
    collision_limit: most error that such a move may leave, in multiples of the mean squared error before the last level
    batch_items: items encoded at a time
    workers: encoding processes (more than 1: Ray Data)
    cache_dir: folder that keeps text vectors by content
    """

    encoder: str = "minilm"
    vectors: Literal["text", "text_behaviour"] = "text"
    behaviour_dim: int = 128
    behaviour_weight: float = 1.0
    pca_dim: int = 0
    levels: int = 3
    width: int = 256
    iterations: int = 25
    seed: int = 7
    collisions: Literal["none", "reassign"] = "reassign"
    collision_limit: float = 4.0
    batch_items: int = 64
    workers: int = 1
    cache_dir: str = "~/.cache/oxyray/vectors"

    def __post_init__(self) -> None:
        _need(self.levels >= 1, "sid.levels", f"must be at least 1, got {self.levels}")
        _need(2 <= self.width <= 65536, "sid.width", f"must lie in 2..65536, got {self.width}")
        for name in ("iterations", "workers", "batch_items", "behaviour_dim"):
            _need(getattr(self, name) >= 1, f"sid.{name}", f"must be at least 1, got {getattr(self, name)}")
        _need(self.collision_limit > 0, "sid.collision_limit", f"must be positive (or sid.collisions=none), got {self.collision_limit}")
        _need(self.pca_dim >= 0, "sid.pca_dim", f"must be 0 (off) or more, got {self.pca_dim}")
        _need(self.behaviour_weight > 0, "sid.behaviour_weight", f"must be positive (or sid.vectors=text), got {self.behaviour_weight}")


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
    item_negatives: items drawn as negatives of the item-level loss
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
            _need(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        pair = 2 * self.heads  # a head's size is even, for rotary positions
        mend = f"set model.width={max(1, round(self.width / pair)) * pair}"
        _need(self.width % self.heads == 0, "model.heads", f"{self.heads} heads do not divide model.width={self.width}: {mend}")
        _need(self.width % pair == 0, "model.heads", f"model.width={self.width} / {self.heads} heads is odd, and must be even: {mend}")
        _need(self.row_dim % 4 == 0, "model.row_dim", f"must be a multiple of 4 (an embedding kernel's rule), got {self.row_dim}")
        _need(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), got {self.dropout}")
        _need(self.item_loss >= 0, "model.item_loss", f"must be 0 or more, got {self.item_loss}")
        _need(self.distill >= 0, "model.distill", f"must be 0 or more, got {self.distill}")
        possible = self.head == "tied" and self.item_loss > 0 and self.item_negatives == 0
        _need(
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
        _need(self.lr >= 0 and self.table_lr >= 0, "train.optim.lr", "learning rates must be 0 or more")
        _need(self.zero_stage in (0, 1, 2, 3), "train.optim.zero_stage", f"must be 0, 1, 2 or 3, got {self.zero_stage}")
        _need(self.clip > 0, "train.optim.clip", f"must be positive (1e9 for no clipping), got {self.clip}")
        _need(0 <= self.warmup_share < 1, "train.optim.warmup_share", f"is a share of the run in [0, 1), got {self.warmup_share}")


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
        for name in ("epochs", "targets_per_step", "micro_batches", "workers", "eval_every_epochs", "patience", "keep_checkpoints"):
            _need(getattr(self, name) > 0, f"train.{name}", f"must be positive, got {getattr(self, name)}")
        for name in ("max_minutes", "max_steps", "threads_per_worker"):
            _need(
                getattr(self, name) is None or getattr(self, name) > 0,
                f"train.{name}",
                f"must be positive or null, got {getattr(self, name)}",
            )
        for name in ("overfit_batches", "profile_steps"):
            _need(getattr(self, name) >= 0, f"train.{name}", f"must be 0 (off) or more, got {getattr(self, name)}")
        _need(
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
        _need(self.beams >= 1, "generate.beams", f"must be at least 1, got {self.beams}")
        _need(self.requests_per_batch >= 1, "generate.requests_per_batch", f"must be at least 1, got {self.requests_per_batch}")


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
            _need(getattr(self, name) > 0, f"evaluate.sasrec.{name}", f"must be positive, got {getattr(self, name)}")
        _need(self.width % self.heads == 0, "evaluate.sasrec.heads", f"must divide evaluate.sasrec.width={self.width}, got {self.heads}")
        _need(0 <= self.dropout < 1, "evaluate.sasrec.dropout", f"must lie in [0, 1), got {self.dropout}")


@dataclass(kw_only=True)
class EvaluateConfig:
    """The table of results and the baselines beside the policy.

    ks: list lengths K of HR@K, Recall@K, NDCG@K
    max_requests: test requests at most, drawn with the seed; null: all
    baselines: of popularity, knn, sasrec
    bootstrap: resamples for the confidence intervals; 0: none
    """

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
    """What `oxyray recommend` prints; on the command line the short keys `user`, `scenario`, `trigger`, `k` set these.

    user: user_id to recommend to
    scenario: scenario to recommend in; null: the run's first
    trigger: item_id that the request starts from, for scenarios with a trigger
    k: items to recommend
    """

    user: str | None = None
    scenario: str | None = None
    trigger: str | None = None
    k: int = 10

    def __post_init__(self) -> None:
        _need(self.k >= 1, "recommend.k", f"must be at least 1, got {self.k}")


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
    """

    address: str = "local"
    cpus: int | None = None
    object_store_gb: float = 1.0
    start_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        _need(self.cpus is None or self.cpus >= 1, "cluster.cpus", f"must be at least 1 or null, got {self.cpus}")
        _need(self.object_store_gb >= 0.1, "cluster.object_store_gb", f"must be at least 0.1, got {self.object_store_gb}")
        _need(self.start_timeout_s > 0, "cluster.start_timeout_s", f"must be positive, got {self.start_timeout_s}")


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
    sid: SidConfig = field(default_factory=SidConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _need(
            self.generate.normalise == "children" or self.model.head == "codes",
            "generate.normalise",
            "over the whole vocabulary needs model.head=codes: the tied head scores a prefix's children only",
        )
        beams, top = self.generate.beams, max(self.evaluate.ks)
        _need(top <= beams, "generate.beams", f"{beams} beams cannot fill the top {top} of evaluate.ks: set generate.beams={top} or more")
        most = self.sid.width**self.sid.levels
        if self.data.source == "mall" and self.data.mall.items is not None:
            most = min(most, self.data.mall.items)
        _need(
            beams <= most, "generate.beams", f"{beams} beams are wider than the catalogue of {most} items at most: set it to {most} or less"
        )


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from plain values, checking every key and type.

    Raises ConfigError naming the key (`where` is its dotted prefix), what came, what was expected and, for an unknown key, the nearest
    known one.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{where}{key}: no such key"
                + (f"; did you mean {where}{near[0]}?" if near else f"; known here: {', '.join(sorted(known))}")
            )
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
        raise ConfigError(f"{where}: expected {_WORDS.get(hint, hint.__name__)}, got {value!r}")
    return value
