"""Validation during training: loss and hit rate by generation on a fixed sample of the validation split.

The sample is drawn once, by the seed, and dealt out to the ranks by batches. A request sees what it could see when it was asked: its
user's earlier events of the training and validation splits. Lists come from the same beam search that serves, within the scenario's pool,
seen items allowed ("as specified"). This chooses when to stop and which weights to keep; the table of results is the business of `oxyray
evaluate`.

Legend: R requests, K items of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from oxyray.config import Config
from oxyray.data.batch import Batch
from oxyray.data.requests import Timeline, request_segments, timeline
from oxyray.generate.engine import Generator
from oxyray.model.inputs import Inputs
from oxyray.model.policy import Policy
from oxyray.train.engine import TrainEngine

TOP = 10


@dataclass(frozen=True)
class _Piece:
    """Requests that are asked together: the batch, and their targets as catalogue indices."""

    batch: Batch
    target_R: np.ndarray


class Validation:
    """Ready to be measured again and again, on at most `limit` requests. `requests` is the size of the sample over all ranks; with 0 there
    is nothing to measure."""

    def __init__(self, config: Config, inputs: Inputs, rank: int, world: int, limit: int) -> None:
        self.config, self.inputs = config, inputs
        pieces = _pieces(config, inputs, limit)
        self.requests = sum(len(piece.target_R) for piece in pieces)
        mine: list[_Piece | None] = list(pieces[rank::world])
        self._pieces = mine + [None] * (-(-len(pieces) // world) - len(mine))
        self._generator: Generator | None = None

    def measure(self, engine: TrainEngine, policy: Policy) -> dict[str, float]:
        """`valid_loss` (weighted mean), `valid_hit` and `valid_ndcg` of the top 10 items and `valid_hit1` of the first over the whole
        sample, the same on every rank. Collective. `policy` has whole weights: the engine's own, or under ZeRO-3 a copy."""
        generator = self._ready(policy)
        generator.renew()
        training = policy.training
        policy.eval()
        sums = torch.zeros(5, dtype=torch.float64)
        try:
            for piece in self._pieces:
                sums += self._one(engine, generator, piece)
        finally:
            policy.train(training)
        sums = sums.to(engine.device)
        dist.all_reduce(sums)
        loss, weight, hits, gain, first = sums.tolist()
        shares = {"valid_hit": hits, "valid_ndcg": gain, "valid_hit1": first}
        return {"valid_loss": loss / weight} | {name: value / self.requests for name, value in shares.items()}

    @torch.no_grad()
    def _one(self, engine: TrainEngine, generator: Generator, piece: _Piece | None) -> torch.Tensor:
        """Sums of loss, weight, hits, gains, hits in the first place. A rank without a piece takes part in the lookup."""
        if piece is None:
            engine.lookup({})
            return torch.zeros(5, dtype=torch.float64)
        batch = piece.batch.to(engine.device)
        rows = engine.lookup(generator.wanted(batch))
        generator.lookup = lambda ids: rows
        torch.manual_seed(self.config.train.seed)
        loss = generator.policy.loss(batch, rows, shelf=generator.shelf(batch, rows)).total
        pools = generator.pools_of(piece.batch.scenario_Q.numpy(), self.inputs.prepared.pools)
        found_RK = generator.generate(batch, TOP, pools).item_BR
        hit_RK = found_RK == piece.target_R[:, None]
        gain = (hit_RK / np.log2(np.arange(TOP) + 2)).sum()
        return torch.tensor([float(loss), batch.weight(), float(hit_RK.sum()), float(gain), float(hit_RK[:, 0].sum())], dtype=torch.float64)

    def _ready(self, policy: Policy) -> Generator:
        if self._generator is None or self._generator.policy is not policy:
            counts_I, settings = self.inputs.prepared.train_counts_I(), self.config.generate
            self._generator = Generator(
                policy,
                lambda ids: {},
                self.inputs.catalog.index,
                counts_I,
                settings.beams,
                settings.normalise,
                (),
                settings.graphs == "auto",
            )
        return self._generator


def _pieces(config: Config, inputs: Inputs, limit: int) -> list[_Piece]:
    """The sample, in batches."""
    collate, size = inputs.collator(config.model, config.train), config.generate.requests_per_batch
    pieces = []
    asked_AS = inputs.target_weights(config.train) > 0
    for time, rows in _sample(inputs, asked_AS, limit, config.train.seed):
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            batch = collate(time, request_segments(time, part, config.model.history), negative_N=collate.draw(config.train.seed, first))
            pieces.append(_Piece(batch, time.item_E[part]))
    return pieces


def _sample(inputs: Inputs, asked_AS: np.ndarray, limit: int, seed: int) -> list[tuple[Timeline, np.ndarray]]:
    """At most `limit` validation events of the actions and scenarios that count, uniformly drawn over all parts: timelines and rows."""
    prepared = inputs.prepared
    counts = []
    for part in range(prepared.parts):
        rows = prepared.events(part, ["split", "action", "scenario"])
        counts.append(int(((rows["split"] == 1) & asked_AS[rows["action"], rows["scenario"]]).sum()))
    chosen = np.random.default_rng(seed).permutation(sum(counts))[:limit]
    sample, first = [], 0
    for part, count in enumerate(counts):
        here = np.sort(chosen[(chosen >= first) & (chosen < first + count)] - first)
        first += count
        if len(here):
            time = timeline(prepared.events(part), splits=(0, 1))
            asked_E = (time.split_E == 1) & asked_AS[time.action_E, time.scenario_E]
            sample.append(time.of_rows(np.flatnonzero(asked_E)[here]))
    return sample
