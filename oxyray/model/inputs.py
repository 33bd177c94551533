"""What the data and the catalogue of a run give to its policy: item features, sizes, batches. One place, so that training, evaluation and
serving agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from oxyray.config import Config, ModelConfig, TrainConfig
from oxyray.data.prepared import Prepared
from oxyray.data.stream import Collator, ItemFeatures
from oxyray.errors import CatalogueError, ConfigError, RunError
from oxyray.files import read_json
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
    encoder: str = ""  # what made the texts' vectors, by a hash of its files

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
        figures = run.path("sid", "quality.json")
        encoder = read_json(figures).get("encoder", {}).get("identity", "") if figures.exists() else ""
        return cls(prepared, catalog, text_IF, queries, encoder)

    @property
    def made_of(self) -> dict[str, str]:
        """What a model that learns from these is trained with: all three must be the same where it is used."""
        return {"catalogue": self.catalog.version, "data": self.prepared.meta.fingerprint, "encoder": self.encoder}

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

    def collator(self, config: ModelConfig, train: TrainConfig | None = None) -> Collator:
        """Without `train` every target weighs 1. Raises ConfigError as `target_weights`."""
        meta = self.prepared.meta
        weight_AS = np.ones((len(meta.actions), len(meta.scenarios))) if train is None else self.target_weights(train)
        some = config.head == "codes" or config.item_negatives < self.vocab.items
        negatives = min(config.item_negatives, self.vocab.items) if config.item_loss and some else 0
        texts = self.queries.vector_WF if self.queries is not None and config.instruction.text else None
        older = config.retrieval.history if config.retrieval.top else 0
        return Collator(self.features, self.prepared.profile_UP, weight_AS, config.head == "tied", negatives, texts, older)

    def target_weights(self, train: TrainConfig) -> np.ndarray:
        """Weight of a training target by its action and scenario: (actions, scenarios). Raises ConfigError when an action of the data has
        no weight, when a scenario is named that the data does not have, and when all weights are 0."""
        actions, scenarios = self.prepared.meta.actions, self.prepared.meta.scenarios
        if missing := [name for name in actions if name not in train.action_weights]:
            raise ConfigError(f"train.action_weights: no weight for {missing}; give every action one")
        given = train.scenario_weights
        known = [*scenarios, "default"]
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"train.scenario_weights: the data has no scenario {', '.join(unknown)}; known are {', '.join(known)}")
        weight_S = [given.get(name, given.get("default", 1.0)) for name in scenarios]
        weight_AS: np.ndarray = np.outer([train.action_weights[name] for name in actions], weight_S)
        if not weight_AS.any():
            raise ConfigError("train.action_weights, train.scenario_weights: no target weighs anything, so nothing can be learned")
        return weight_AS


def check_beams(config: Config, inputs: Inputs) -> None:
    """Raises ConfigError when more beams are asked for than the catalogue has SIDs."""
    if config.generate.beams > inputs.catalog.index.leaves:
        raise ConfigError(f"generate.beams={config.generate.beams} is wider than the catalogue of {inputs.catalog.index.leaves} SIDs: "
                          f"set generate.beams={inputs.catalog.index.leaves} or less")  # fmt: skip
