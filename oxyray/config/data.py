"""Where the shop comes from, and its semantic IDs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oxyray.config.plain import need

Size = Literal["tiny", "small", "medium", "large", "million"]
MALL_ITEMS: dict[Size, int] = {"tiny": 272, "small": 2_700, "medium": 20_000, "large": 200_000, "million": 1_000_000}
"""Items of the embedded shop's sizes."""


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
            need(value is None or value > 0, f"data.mall.{name}", f"must be positive, got {value}")
        need(self.workers >= 1, "data.mall.workers", f"must be at least 1, got {self.workers}")


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
    default_action: action of events that carry none (source=files)
    default_scenario: scenario of events that carry none (source=files); null: the data's name
    core: keep users and items with at least this many events, repeated until all have them; 0 keeps all
    split: time cuts all users at the same moments; leave_one_out keeps each user's last event for test and the one before for validation
    valid_share: share of the events, by time, for validation (split=time)
    test_share: share of the events, by time, for test (split=time)
    time_unit: whether event_time is in seconds or only the position in the user's sequence
    latest_time: events after this time (in time_unit) are quarantined; null: after the present
    max_bad_share: stop when more than this share of the rows breaks the contract
    shards: files into which the prepared events are divided; a process holds one at a time, so more of them take less memory
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
        need(self.source == "mall" or bool(self.path), "data.path", f"data.source={self.source} needs a folder: data.path=/my/tables")
        need(
            self.source != "mall" or self.path is None,
            "data.path",
            f"is {self.path}, but data=mall makes its shop itself: say whose tables these are, data=tables or a choice of your own",
        )
        need(
            0 < self.valid_share < 1 and 0 < self.test_share < 1 and self.valid_share + self.test_share < 1,
            "data.valid_share, data.test_share",
            f"must be positive and sum to less than 1, got {self.valid_share} and {self.test_share}",
        )
        ordered = self.time_unit == "seconds" or self.split == "leave_one_out"
        need(
            ordered,
            "data.split",
            "positions of different users cannot be cut at one time: set data.split=leave_one_out with time_unit=position",
        )
        need(0 <= self.max_bad_share <= 1, "data.max_bad_share", f"is a share between 0 and 1, got {self.max_bad_share}")
        need(self.shards >= 1, "data.shards", f"must be at least 1, got {self.shards}")
        need(self.core >= 0, "data.core", f"must be 0 (off) or more, got {self.core}")


@dataclass(kw_only=True)
class SidConfig:
    """Semantic IDs (paper 2.2.2): text vectors, optionally joined with behaviour, quantised by RQ-KMeans into `levels` codes of `width`.

    encoder: minilm (from its package) or the path of any Hugging Face text encoder
    vectors: text alone, text joined with co-occurrence in the training events, given: the shop's own, or fused: of the encoder that the
        stage `fuse` trains
    given: Parquet file or folder with the columns item_id and vector, for sid.vectors=given and fuse.given=true
    behaviour_dim: dimensions of the behaviour part
    behaviour_weight: weight of the behaviour part beside the text part
    pca_dim: dimensions kept by PCA before quantisation; 0 keeps all
    levels: codes an item
    width: codes a level
    iterations: k-means rounds a level
    balance: most items of a code, in multiples of the mean; null: no bound
    held_out: share of the items that the codebook is not learned from; how well it describes them is told, and drift is measured by it
    seed: of k-means and its re-seeded clusters
    collisions: of items that share a SID. reassign moves them to the nearest free code of the last level; extra_level numbers them by one
        more level; none leaves them
    collision_limit: most error that such a move may leave, in multiples of the mean squared error before the last level
    batch_items: items encoded at a time
    workers: processes for encoding, Swing and k-means (more than 1: on Ray)
    cache_dir: folder that keeps text vectors by content
    """

    encoder: str = "minilm"
    vectors: Literal["text", "text_behaviour", "given", "fused"] = "text"
    given: str | None = None
    behaviour_dim: int = 128
    behaviour_weight: float = 1.0
    pca_dim: int = 0
    levels: int = 3
    width: int = 256
    iterations: int = 25
    balance: float | None = None
    held_out: float = 0.05
    seed: int = 7
    collisions: Literal["none", "reassign", "extra_level"] = "reassign"
    collision_limit: float = 4.0
    batch_items: int = 64
    workers: int = 1
    cache_dir: str = "~/.cache/oxyray/vectors"

    def __post_init__(self) -> None:
        need(self.vectors != "given" or self.given is not None, "sid.given", "must name the file of the vectors for sid.vectors=given")
        need(self.levels >= 1, "sid.levels", f"must be at least 1, got {self.levels}")
        need(2 <= self.width <= 65536, "sid.width", f"must lie in 2..65536, got {self.width}")
        for name in ("iterations", "workers", "batch_items", "behaviour_dim"):
            need(getattr(self, name) >= 1, f"sid.{name}", f"must be at least 1, got {getattr(self, name)}")
        need(0 <= self.held_out < 1, "sid.held_out", f"is a share in [0, 1), got {self.held_out}")
        need(self.balance is None or self.balance > 1, "sid.balance", f"must be more than 1 (or null for no bound), got {self.balance}")
        need(self.collision_limit > 0, "sid.collision_limit", f"must be positive (or sid.collisions=none), got {self.collision_limit}")
        need(self.pca_dim >= 0, "sid.pca_dim", f"must be 0 (off) or more, got {self.pca_dim}")
        need(self.behaviour_weight > 0, "sid.behaviour_weight", f"must be positive (or sid.vectors=text), got {self.behaviour_weight}")
