"""Requests to items: batches of requests through beam search, SIDs resolved to items.

A SID that several items share gives all of them, next to each other: more training events first, then the smaller item index. That is the
stated tie-break; item-level metrics stand on it.

Legend: B requests, K beams, G samples, R items a request, I items of the catalogue.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from oxyray.data.batch import Batch
from oxyray.errors import CatalogueError
from oxyray.generate.beam import Beams, beam_search, warn_if_short
from oxyray.generate.fixed import Best, Choice, GumbelTopK
from oxyray.generate.graphs import Graphs
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.rerank import Opinion
from oxyray.generate.sample import Samples, Sampling, sample
from oxyray.generate.score import Normalise
from oxyray.generate.steps import PolicySteps
from oxyray.model.head import Tree
from oxyray.model.layers import Tensor
from oxyray.model.policy import Policy, Rows, Shelf
from oxyray.sid.prefix import PrefixIndex

Lookup = Callable[[dict[str, Tensor]], Rows]
Pools = Pool | None | Sequence[Pool | None]  # one for all requests, or one each


@dataclass(frozen=True)
class Generated:
    """Items best first, `item_BR` (-1: none left) with `score_BR` (log-probability of their SID), and the SIDs themselves: leaves of
    `index`, `leaf_BK`. With second opinions, items stand by `score_BR` with what they add, and SIDs by their log-probability."""

    item_BR: np.ndarray
    score_BR: np.ndarray
    leaf_BK: np.ndarray
    logprob_BK: np.ndarray
    index: PrefixIndex


@dataclass(frozen=True)
class Cap:
    """At most `most` items of a category in a list, best first. `category_I`: the category of every item, -1 for none (not capped)."""

    category_I: np.ndarray
    most: int

    def keep(self, item_N: np.ndarray) -> np.ndarray:
        """Which of these items, best first, stay: bool (N,)."""
        category_N = self.category_I[item_N]
        order_N = np.argsort(category_N, kind="stable")
        sorted_N = category_N[order_N]
        rank_N = np.empty(len(item_N), dtype=np.int64)
        rank_N[order_N] = np.arange(len(item_N)) - np.searchsorted(sorted_N, sorted_N)
        return (rank_N < self.most) | (category_N < 0)


@dataclass(frozen=True)
class _Serving:
    """All that knows one version of the catalogue. A batch takes it once, so a swap falls between batches."""

    policy: Policy
    index: PrefixIndex
    items: np.ndarray  # those of each leaf in the order of the tie-break, from `offset[leaf]` on
    offset: np.ndarray
    pools: dict[str, Pool] = field(default_factory=dict)
    graphs: dict[Hashable, Graphs] = field(default_factory=dict)  # on a GPU, of what is asked for again and again
    whole_shelf: list[Shelf] = field(default_factory=list)  # of the whole catalogue, once a batch has asked for it

    @classmethod
    def of(cls, policy: Policy, index: PrefixIndex, order_I: np.ndarray) -> _Serving:
        return cls(policy, index, index.ranked_items(order_I), np.append(0, np.cumsum(index.leaf_count, dtype=np.int64)))

    def captured(self, key: Hashable, choice: Callable[[], Choice], normalise: Normalise, temperature: float = 1.0) -> Graphs:
        if key not in self.graphs:
            self.graphs[key] = Graphs(self.policy, choice, normalise, temperature)
        return self.graphs[key]

    def wanted(self, batch: Batch) -> dict[str, Tensor]:
        found = batch.lookups()
        if batch.items.whole and self.whole_shelf:
            del found["item"]
        return found

    @torch.no_grad()
    def shelf(self, batch: Batch, rows: Rows) -> Shelf:
        if batch.items.whole and self.whole_shelf:
            return self.whole_shelf[0]
        shelf = self.policy.shelf(batch, rows)
        self.whole_shelf[:] = [shelf] if batch.items.whole else []
        return shelf

    def below(self, leaf_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items of these leaves in order, and the place in `leaf_N` that each belongs to."""
        first_N, count_N = self.offset[leaf_N], self.offset[leaf_N + 1] - self.offset[leaf_N]
        place_T = np.repeat(np.arange(len(leaf_N)), count_N)
        start_N = np.cumsum(count_N) - count_N
        return self.items[np.arange(len(place_T)) - start_N[place_T] + first_N[place_T]].astype(np.int64), place_T


class Generator:
    """A policy, the rows of its tables and a catalogue's index, ready to answer requests. `order_I` is the tie-break: larger comes
    first. The vectors of the whole catalogue, which a tied head needs, are computed once: `renew` when weights or rows change.
    `opinions` have the last word on the order of items. On a GPU searches are captured as CUDA graphs, unless `capture` is False."""

    def __init__(
        self,
        policy: Policy,
        lookup: Lookup,
        index: PrefixIndex,
        order_I: np.ndarray,
        beams: int,
        normalise: Normalise = "children",
        opinions: Sequence[Opinion] = (),
        capture: bool = True,
    ) -> None:
        self.capture = capture
        self.lookup, self.beams, self.normalise, self.opinions = lookup, beams, normalise, opinions
        self._serving = _Serving.of(policy, index, order_I)

    @property
    def policy(self) -> Policy:
        return self._serving.policy

    def swap(self, index: PrefixIndex, order_I: np.ndarray) -> None:
        """Serve a new version of the catalogue from the next batch on; a batch that is under way ends on the old one. The weights stay the
        same tensors. Raises CatalogueError when the SIDs have another shape."""
        old = self._serving
        if (index.levels, index.width) != (old.index.levels, old.index.width):
            raise CatalogueError(
                f"the model is built for SIDs of {old.index.levels} levels of {old.index.width} codes, "
                f"the new catalogue has {index.levels} of {index.width}"
            )
        policy = copy.copy(old.policy)
        policy._modules = policy._modules | {"tree": Tree(index).to(old.policy.tree.device)}
        self._serving = _Serving.of(policy, index, order_I)

    def renew(self) -> None:
        """To be called when the weights or the tables' rows have changed: what was kept of them is let go."""
        self._serving.whole_shelf.clear()

    def wanted(self, batch: Batch) -> dict[str, Tensor]:
        """The rows that a batch needs looked up, by table: without those of items, where all are known."""
        return self._serving.wanted(batch)

    def shelf(self, batch: Batch, rows: Rows) -> Shelf:
        """The vectors of the batch's items, for who computes more than `generate` on them."""
        return self._serving.shelf(batch, rows)

    def pool(self, name: str, allowed_I: np.ndarray) -> Pool | None:
        """The named pool (bool, an entry for each item), kept until the catalogue is swapped; None where it is the whole catalogue."""
        if allowed_I.all():
            return None
        serving = self._serving
        if name not in serving.pools:
            serving.pools[name] = Pool.of_items(serving.policy.tree, torch.from_numpy(allowed_I), f"the pool of {name}")
        return serving.pools[name]

    def pools_of(self, scenario_B: np.ndarray, allowed: Mapping[str, np.ndarray]) -> list[Pool | None]:
        """The pool of each request's scenario, an index into the names of `allowed` (in their order)."""
        named = [self.pool(name, allowed_I) for name, allowed_I in allowed.items()]
        return [named[scenario] for scenario in scenario_B.tolist()]

    def listed(self, item_N: np.ndarray) -> Pool:
        """An ad-hoc pool: these items. Raises GenerationError when none of them is in the catalogue."""
        return Pool.of_items(self.policy.tree, torch.from_numpy(np.asarray(item_N, dtype=np.int64)), "the list of items")

    def generate(
        self,
        batch: Batch,
        items: int,
        pool: Pools = None,
        exclude: Sequence[np.ndarray] | None = None,
        cap: Cap | None = None,
        per_root: int | None = None,
    ) -> Generated:
        """The best `items` items of each request.

        `exclude` lists item indices that a request must not get (what its user has already, what is blocked): the beams go to others.
        `cap` and `per_root` are for diversity: items of one category in a list, beams under one first code. A pool belongs to the version
        of the catalogue that it was made for.
        """
        serving = self._serving
        pools = _each(pool, batch.segments)
        legal = Legal(serving.policy.tree, pools, exclude)
        with self._started(serving, batch) as steps:
            if per_root is None and self._captures(steps, self.beams):
                warn_if_short(legal, self.beams)
                graphs = serving.captured(self.beams, lambda: Best(self.beams), self.normalise)
                beams = Beams.of(graphs.walk(steps.decoding, legal))
            else:
                beams = beam_search(steps, legal, self.beams, self.normalise, per_root)
        leaf_BK, logprob_BK = beams.leaf_BK.cpu().numpy(), beams.logprob_BK.float().cpu().numpy()
        lists = []
        for b, leaf_K in enumerate(leaf_BK):
            real = leaf_K >= 0
            found, place = serving.below(leaf_K[real])
            keep = np.ones(len(found), dtype=bool)
            if (mine := pools[b]) is not None:
                keep &= mine.has(found)
            if exclude is not None and len(exclude[b]):
                keep &= ~np.isin(found, exclude[b])
            lists.append((found[keep], logprob_BK[b][real][place[keep]]))
        if self.opinions:
            lists = self._reordered(batch, lists)
        item_BR = np.full((len(leaf_BK), items), -1, dtype=np.int64)
        score_BR = np.full((len(leaf_BK), items), -np.inf, dtype=np.float32)
        for b, (found, score) in enumerate(lists):
            if cap is not None:
                keep = cap.keep(found)
                found, score = found[keep], score[keep]
            size = min(items, len(found))
            item_BR[b, :size], score_BR[b, :size] = found[:size], score[:size]
        return Generated(item_BR, score_BR, leaf_BK, logprob_BK, serving.index)

    def sample(
        self,
        batch: Batch,
        samples: int,
        sampling: Sampling | None = None,
        pool: Pools = None,
        exclude: Sequence[np.ndarray] | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """`samples` SIDs drawn for each request, with the log-probability of each of their tokens (see `oxyray.generate.sample`)."""
        serving = self._serving
        legal = Legal(serving.policy.tree, _each(pool, batch.segments), exclude)
        sampling = sampling or Sampling()
        with self._started(serving, batch) as steps:
            if not (sampling.plain and generator is None and self._captures(steps, samples)):
                return sample(steps, legal, samples, sampling, generator)
            warn_if_short(legal, samples)
            key = samples, sampling.temperature
            graphs = serving.captured(key, lambda: GumbelTopK(samples, None), "children", sampling.temperature)
            drawn = graphs.walk(steps.decoding, legal)
            return Samples(drawn.leaf_BK, drawn.logprob_BKL, drawn.score_BK)

    def _captures(self, steps: PolicySteps, beams: int) -> bool:
        return self.capture and Graphs.can(steps.policy, len(steps.hidden_BKD), beams)

    def _reordered(self, batch: Batch, lists: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The lists in the order of what the opinions make of them."""
        item_BR = np.full((len(lists), max((len(found) for found, _ in lists), default=0)), -1, dtype=np.int64)
        for b, (found, _) in enumerate(lists):
            item_BR[b, : len(found)] = found
        bonus_BR = sum((opinion(batch, item_BR) for opinion in self.opinions), np.zeros(item_BR.shape))
        reordered = []
        for (found, score), bonus_R in zip(lists, bonus_BR, strict=True):
            total = (score + bonus_R[: len(found)]).astype(np.float32)
            order = np.argsort(-total, kind="stable")
            reordered.append((found[order], total[order]))
        return reordered

    @contextmanager
    def _started(self, serving: _Serving, batch: Batch) -> Iterator[PolicySteps]:
        policy, training = serving.policy, serving.policy.training
        policy.eval()
        try:
            rows = self.lookup(serving.wanted(batch))
            yield PolicySteps.begin(policy, batch, rows, serving.shelf(batch, rows))
        finally:
            policy.train(training)


def _each(pool: Pools, requests: int) -> Sequence[Pool | None]:
    return [pool] * requests if pool is None or isinstance(pool, Pool) else pool
