"""What the data and the catalogue of a run give to its policy: item features, sizes, batches. One place, so that training, evaluation and
serving agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from oxyray.config import Config, ModelConfig
from oxyray.data.prepared import Prepared
from oxyray.data.stream import Collator, ItemFeatures
from oxyray.errors import CatalogueError, ConfigError, RunError
from oxyray.model.items import Vocab
from oxyray.model.policy import Policy
from oxyray.model.tables import TableSpec
from oxyray.run import Run
from oxyray.sid.catalog import Catalog
from oxyray.sid.queries import QueryVectors


@dataclass(frozen=True)
class Inputs:
    """`vocab` is what a saved model must have been built for."""

    prepared: Prepared
    catalog: Catalog
    text_IF: np.ndarray | None
    queries: QueryVectors | None = None

    @classmethod
    def load(cls, run: Run, version: str | None = None) -> Inputs:
        """Read `RUN/data` and `RUN/sid`. Raises RunError naming the missing stage, CatalogueError where items and SIDs do not fit or the
        catalogue is not of `version`."""
        prepared = Prepared.load(run.need("data", stage="prepare"))
        catalog = Catalog.load(run.need("sid", "catalog", stage="sid"), version)
        if list(catalog.item_ids) != prepared.item_ids.to_pylist():
            raise CatalogueError(f"{run.path('sid')} has SIDs of other items than {run.path('data')}: run `oxyray sid` again")
        vectors = run.path("sid", "vectors.npy")
        text_IF = np.load(vectors, allow_pickle=False, mmap_mode="r") if vectors.exists() else None
        if text_IF is not None and len(text_IF) != len(catalog):
            raise RunError(f"{vectors} has {len(text_IF)} rows for {len(catalog)} items: run `oxyray sid` again")
        queries = QueryVectors.load(run)
        prepared.query_texts = None if queries is None else queries.text_W
        return cls(prepared, catalog, text_IF, queries)

    @cached_property
    def features(self) -> ItemFeatures:
        text = None if self.text_IF is None else torch.from_numpy(np.array(self.text_IF, dtype=np.float32))
        return ItemFeatures(
            torch.from_numpy(self.catalog.codes_IL.astype(np.int64)), torch.from_numpy(self.prepared.side_IC.astype(np.int64)), text
        )

    @cached_property
    def vocab(self) -> Vocab:
        meta = self.prepared.meta
        return Vocab(
            items=meta.items, users=meta.users, scenarios=len(meta.scenarios), actions=len(meta.actions),
            side=tuple(feature["size"] for feature in meta.side), profile=tuple(feature["size"] for feature in meta.profile),
            levels=self.catalog.levels, width=self.catalog.width, text=0 if self.text_IF is None else int(self.text_IF.shape[1]),
            query=0 if self.queries is None else int(self.queries.vector_WF.shape[1]), clock=meta.time_unit == "seconds",
        )  # fmt: skip

    def policy(self, config: ModelConfig) -> Policy:
        return Policy(config, self.vocab, self.catalog.index)

    def tables(self, config: ModelConfig) -> list[TableSpec]:
        """The sparse tables beside the policy: items, and users when asked for."""
        specs = [TableSpec(name="item", rows=self.vocab.items, dim=config.row_dim)]
        return specs + ([TableSpec(name="user", rows=self.vocab.users, dim=config.row_dim)] if config.user_table else [])

    def collator(self, config: ModelConfig, action_weights: dict[str, float] | None = None) -> Collator:
        """Raises ConfigError when an action of the data has no weight."""
        actions = self.prepared.meta.actions
        if action_weights is not None and (missing := [name for name in actions if name not in action_weights]):
            raise ConfigError(f"train.action_weights: no weight for {missing}; give every action one")
        weight_A = np.array([1.0 if action_weights is None else action_weights[name] for name in actions])
        some = config.head == "codes" or config.item_negatives < self.vocab.items
        negatives = min(config.item_negatives, self.vocab.items) if config.item_loss and some else 0
        texts = self.queries.vector_WF if self.queries is not None and config.instruction.text else None
        older = config.retrieval.history if config.retrieval.top else 0
        return Collator(self.features, self.prepared.profile_UP, weight_A, config.head == "tied", negatives, texts, older)


def check_beams(config: Config, inputs: Inputs) -> None:
    """Raises ConfigError when more beams are asked for than the catalogue has SIDs."""
    if config.generate.beams > inputs.catalog.index.leaves:
        raise ConfigError(f"generate.beams={config.generate.beams} is wider than the catalogue of {inputs.catalog.index.leaves} SIDs: "
                          f"set generate.beams={inputs.catalog.index.leaves} or less")  # fmt: skip
