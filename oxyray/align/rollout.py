"""The generating side of the loop, without Ray: requests in, candidates with their log-probabilities out (paper 2.4.1, 3.1.3).

A rollout holds a copy of the dense weights and reads the published tables, as files of its node or however it is told to open them; both
say which version they are of, and candidates are only made when they agree.

Legend: B requests, G candidates of a request, L SID levels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from oxyray.align.requests import Requests
from oxyray.cluster.publish import Open, Reader, TableReader
from oxyray.config import AlignConfig, Config
from oxyray.data.batch import Batch
from oxyray.errors import GenerationError
from oxyray.generate.beam import beam_search
from oxyray.generate.fixed import Best, GumbelTopK
from oxyray.generate.graphs import Graphs
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.sample import Sampling, sample
from oxyray.generate.steps import PolicySteps
from oxyray.model.inputs import Inputs
from oxyray.model.likelihood import path_logprob
from oxyray.model.policy import Rows, Shelf
from oxyray.model.saved import read_model
from oxyray.run import Run

Array = np.ndarray
Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """Candidates of one piece of a step: leaves of the prefix index (-1: none), each token's log-probability under the mask and temperature
    that generated it, and that of the item really taken. `reference_BJL` are the same of the supervised policy, the item really taken in
    the last column; only where the objective asks how far the policy has gone from it."""

    step: int
    piece: int
    version: int
    leaf_BG: Array
    behaviour_BGL: Array
    target_behaviour_BL: Array
    seconds: float
    reference_BJL: Array | None = None


class Pools:
    """The rules of a batch from its scenarios."""

    def __init__(self, inputs: Inputs, tree: torch.nn.Module) -> None:
        self._tree, scenarios = tree, inputs.prepared.meta.scenarios
        masks = [inputs.prepared.pools[name] for name in scenarios]
        self._pools = [None if mask.all() else Pool.of_items(tree, torch.from_numpy(mask), f"the pool of {name}")  # type: ignore[arg-type]
                       for name, mask in zip(scenarios, masks, strict=True)]  # fmt: skip

    def legal(self, batch: Batch) -> Legal:
        return Legal(self._tree, [self._pools[scenario] for scenario in batch.scenario_Q.tolist()])  # type: ignore[arg-type]


class Rollout:
    def __init__(self, config: Config, settings: AlignConfig, device: str = "cpu") -> None:
        self.settings, self.device = settings, device
        self.inputs = Inputs.load(Run(config.run_dir))
        self.policy = self.inputs.policy(config.model).to(device).eval()
        self.requests = Requests(self.inputs, config, settings)
        self.pools = Pools(self.inputs, self.policy.tree)
        self._graphs: Graphs | None = None
        most = -(-settings.requests_per_step // settings.pieces)
        wanted = config.generate.graphs == "auto" and settings.candidates != "sample"
        if wanted and Graphs.can(self.policy, most, settings.group):
            beam, group = settings.candidates == "beam", settings.group
            self._graphs = Graphs(
                self.policy, lambda: Best(group) if beam else GumbelTopK(group, None), temperature=1.0 if beam else settings.temperature
            )
        folder = Run(config.run_dir).path("pretrain", "model")
        self._reference = read_model(folder, self.inputs, device) if settings.objective.kl else None
        self._folder, self._readers = Path(), dict[str, Reader]()
        self._open: Open = TableReader
        self._shelf: Shelf | None = None  # of this version, where batches hold the whole catalogue
        self._reference_shelf: Shelf | None = None
        self.version = -1

    def load(self, version: int, weights: Mapping[str, Array | Tensor], folder: Path, open_table: Open = TableReader) -> int:
        """Take over the dense weights of a version, whose tables are published in `folder`, and how a table there is opened; gives the
        version back. What was opened stays open while the folder is the same."""
        if folder != self._folder:
            self._folder, self._open, self._readers = folder, open_table, {}
        self._shelf = None
        # Ray's arrays cannot be written to, of which torch would warn
        given = {name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)) for name, value in weights.items()}
        self.policy.load_state_dict(given, strict=False)
        self.version = version
        return version

    def release(self) -> None:
        """Let go of the published tables."""
        self._folder, self._readers = Path(), {}

    @torch.no_grad()
    def generate(self, step: int, piece: int) -> Rolled:
        """Raises GenerationError when the published tables are of another version than the weights."""
        clock = time.perf_counter()
        asked, settings = self.requests.at(step)[piece], self.settings
        rows, legal, batch = self._rows(asked), self.pools.legal(asked), asked.to(self.device)
        shelf = self._shelf or self.policy.shelf(batch, rows)
        self._shelf = shelf if batch.items.whole else None
        steps = PolicySteps.begin(self.policy, batch, rows, shelf)
        begun = steps.decoding.fork()
        torch.manual_seed(hash((settings.seed, step, piece)) % 2**63)
        found_BG = self._candidates(steps, legal)  # as wide as the largest pool of the piece
        leaf_BG = F.pad(found_BG, (0, settings.group - found_BG.shape[1]), value=-1)
        path_BJL = paths(self.inputs, leaf_BG.cpu(), self.requests.taken(step, piece)).to(self.device)
        behaviour_BJL = path_logprob(self.policy, begun, path_BJL, legal, settings.temperature).cpu().numpy()
        reference_BJL = None if self._reference is None else self._by_reference(batch, path_BJL, legal)
        return Rolled(
            step=step, piece=piece, version=self.version, leaf_BG=leaf_BG.int().cpu().numpy(), behaviour_BGL=behaviour_BJL[:, :-1],
            target_behaviour_BL=behaviour_BJL[:, -1], seconds=time.perf_counter() - clock, reference_BJL=reference_BJL,
        )  # fmt: skip

    def _candidates(self, steps: PolicySteps, legal: Legal) -> Tensor:
        settings = self.settings
        if self._graphs is not None:
            return self._graphs.walk(steps.decoding, legal).leaf_BK
        if settings.candidates == "beam":
            return beam_search(steps, legal, settings.group).leaf_BK
        sampling = Sampling(temperature=settings.temperature, replacement=settings.candidates == "sample")
        return sample(steps, legal, settings.group, sampling).leaf_BG

    def _by_reference(self, batch: Batch, path_BJL: Tensor, legal: Legal) -> Array:
        start, tables = self._reference  # type: ignore[misc]
        rows = tables.lookup(batch.lookups())
        shelf = self._reference_shelf or start.shelf(batch, rows)
        self._reference_shelf = shelf if batch.items.whole else None
        return start.logprob(batch, rows, path_BJL, legal, self.settings.temperature, shelf).cpu().numpy()

    def _rows(self, batch: Batch) -> Rows:
        found = {}
        for name, ids in batch.lookups().items():
            if (name == "user" and self.policy.user is None) or (name == "item" and self._shelf is not None):
                continue
            if name not in self._readers:
                self._readers[name] = self._open(self._folder, name)
            rows, version = self._readers[name].read(ids.clamp(min=0).numpy())
            if version != self.version:
                raise GenerationError(
                    f"table {name} is of version {version}, the weights are of {self.version}: publish both before generating"
                )
            found[name] = torch.from_numpy(rows).to(self.device)
        return found


def paths(inputs: Inputs, leaf_BG: Tensor, taken_B: Tensor) -> Tensor:
    """Nodes of the index on the way to each candidate and, last, to the item really taken, -1 where there is none: (B, J = G + 1, L)."""
    catalog = inputs.catalog
    leaf_B = torch.from_numpy(catalog.index.leaf_of(catalog.codes_IL[taken_B.clamp(min=0).numpy()]))
    leaf_BJ = torch.cat([leaf_BG.long(), torch.where(taken_B >= 0, leaf_B, -1)[:, None]], dim=1)
    path_BJL = torch.from_numpy(catalog.index.node_path(leaf_BJ.clamp(min=0).flatten().numpy()).astype(np.int64))
    return torch.where((leaf_BJ >= 0)[..., None], path_BJL.view(*leaf_BJ.shape, -1), -1)
