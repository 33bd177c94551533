"""The pages of a run, wherever they come from: the log of exposures where the shop has one, else requests with drawn negatives, a part at a
time; with the vectors of their queries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.reward.pages import Pages, exposed_pages, sampled_pages
from oxyray.run import Run
from oxyray.sid.queries import QueryVectors

Array = np.ndarray


@dataclass
class Log:
    """`parts` pieces of pages, each user wholly in one. One piece is in memory at a time."""

    prepared: Prepared
    negatives: int
    seed: int
    queries: QueryVectors | None = None
    _held: tuple[int, Pages] | None = None

    @classmethod
    def of(cls, config: Config, run: Run, prepared: Prepared) -> Log:
        queries = QueryVectors.load(run) if config.rank.model.text_input else None
        return cls(prepared, config.rank.negatives, config.rank.seed, queries)

    @property
    def parts(self) -> int:
        return 1 if self.prepared.exposures else self.prepared.parts

    def pages(self, part: int) -> Pages:
        """One piece, its queries' vectors set where they are known. Raises DataError on a log of exposures that cannot be used."""
        if self._held is None or self._held[0] != part:
            self._held = part, self._read(part)
        return self._held[1]

    def _read(self, part: int) -> Pages:
        if self.prepared.exposures:
            pages = exposed_pages(self.prepared, self.prepared.exposures)
        else:
            pool_SI = np.stack([self.prepared.pools[name] for name in self.prepared.meta.scenarios])
            pages = sampled_pages(self.prepared.events(part), pool_SI, negatives=self.negatives, seed=self.seed + part)
        if self.queries is None or not pages.queries:
            return pages
        return dataclasses.replace(pages, query_WF=self.queries.of(pages.queries))
