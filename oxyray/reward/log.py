"""The pages of a run, wherever they come from: the log of exposures where the shop has one, else requests with drawn negatives, a part at a
time; and the vectors of their queries.

A log of exposures is `exposures.parquet` beside the shop's other tables. Query vectors are encoded once and kept beside the ranker, so that
the processes that train and that judge need no encoder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.errors import RunError
from oxyray.files import whole
from oxyray.reward.pages import Pages, exposed_pages, sampled_pages
from oxyray.run import Run
from oxyray.sid.encoder import encode

Array = np.ndarray


@dataclass
class Log:
    """`parts` pieces of pages, each user wholly in one. One piece is in memory at a time."""

    prepared: Prepared
    exposures: Path | None
    negatives: int
    seed: int
    queries: QueryVectors | None = None
    _held: tuple[int, Pages] | None = None

    @classmethod
    def of(cls, config: Config, run: Run, prepared: Prepared) -> Log:
        """With the query vectors that `write_queries` left, if it has."""
        folder = run.path("source") if config.data.source == "mall" else Path(config.data.path or "").expanduser()
        file = folder / "exposures.parquet"
        exposures = file if file.is_file() and prepared.meta.split == "time" else None
        vectors = run.path("rank", "queries")
        queries = QueryVectors.load(vectors) if vectors.exists() else None
        return cls(prepared, exposures, config.rank.negatives, config.rank.seed, queries)

    @property
    def parts(self) -> int:
        return 1 if self.exposures else self.prepared.parts

    def pages(self, part: int) -> Pages:
        """One piece, its queries' vectors set where they are known. Raises DataError on a log of exposures that cannot be used."""
        if self._held is None or self._held[0] != part:
            self._held = part, self._read(part)
        return self._held[1]

    def _read(self, part: int) -> Pages:
        if self.exposures:
            pages = exposed_pages(self.prepared, self.exposures)
        else:
            pool_SI = np.stack([self.prepared.pools[name] for name in self.prepared.meta.scenarios])
            pages = sampled_pages(self.prepared.events(part), pool_SI, negatives=self.negatives, seed=self.seed + part)
        if self.queries is None or not pages.queries:
            return pages
        return dataclasses.replace(pages, query_WF=self.queries.of(pages.queries))


@dataclass(frozen=True)
class QueryVectors:
    """Vectors (W, F) of the distinct query texts, which are sorted."""

    text_W: pa.Array
    vector_WF: Array

    @classmethod
    def load(cls, folder: Path) -> QueryVectors:
        with pa.memory_map(str(folder / "queries.arrow")) as file:
            text_W = pa.ipc.open_file(file).read_all()["query"].combine_chunks()
        return cls(text_W, np.load(folder / "vectors.npy", allow_pickle=False))

    def of(self, texts: tuple[str, ...]) -> Array:
        """(N, F). Raises RunError on a text that was not encoded."""
        found = pc.index_in(pa.array(texts, pa.large_string()), value_set=self.text_W)
        if found.null_count:
            raise RunError("the log has queries that the ranker's vectors do not cover: run `oxyray rank force=true`")
        return self.vector_WF[found.to_numpy()]


def write_queries(config: Config, run: Run, log: Log) -> None:
    """Encode every distinct query of the log into `RUN/rank/queries`; nothing where there is none."""
    texts = sorted({text for part in range(log.parts) for text in log.pages(part).queries})
    if not texts:
        return
    vector_WF = encode(texts, config.sid, config.cluster)
    with whole(run.path("rank", "queries")) as folder:
        folder.mkdir(parents=True)
        table = pa.table({"query": pa.array(texts, pa.large_string())})
        with pa.ipc.new_file(str(folder / "queries.arrow"), table.schema) as file:
            file.write_table(table)
        np.save(folder / "vectors.npy", vector_WF.astype(np.float32))
    log.queries, log._held = QueryVectors.load(run.path("rank", "queries")), None
