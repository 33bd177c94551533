"""The shop's query texts as vectors of the shared text encoder, `RUN/sid/queries`: made once, so that whoever reads them later (training,
rollouts, judges) needs no encoder.

Legend: W distinct texts, N rows, F width of a text vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.data.prepared import Prepared
from oxyray.errors import DataError, RunError
from oxyray.run import Run

Array = np.ndarray


def distinct_queries(prepared: Prepared, shown: bool = True) -> pa.Array:
    """Every query text of the events and, with `shown`, of the exposures, once, sorted. Empty texts count as none. Raises DataError where
    the exposures cannot be read."""
    texts, exposures = pa.array([], pa.large_string()), prepared.exposures if shown else None
    for part in range(prepared.parts):
        texts = _joined(texts, prepared.query_column(part))
    try:
        if exposures is not None and "query" in pq.read_schema(exposures).names:
            texts = _joined(texts, pq.read_table(exposures, columns=["query"])["query"].cast(pa.large_string()))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{exposures}: not a readable log of exposures ({str(error).splitlines()[0][:200]})") from error
    return texts.take(pc.array_sort_indices(texts))


def _joined(texts: pa.Array, column: pa.ChunkedArray) -> pa.Array:
    typed = column.filter(pc.greater(pc.binary_length(column), 0))
    return pa.chunked_array([texts, *typed.chunks], pa.large_string()).unique()


@dataclass(frozen=True)
class QueryVectors:
    """Vectors (W, F) of the distinct texts, which are sorted."""

    text_W: pa.Array
    vector_WF: Array

    @classmethod
    def load(cls, run: Run) -> QueryVectors | None:
        """None where the shop has no queries."""
        folder = run.path("sid", "queries")
        if not folder.exists():
            return None
        with pa.memory_map(str(folder / "queries.arrow")) as file:
            text_W = pa.ipc.open_file(file).read_all()["query"].combine_chunks()
        return cls(text_W, np.load(folder / "vectors.npy", allow_pickle=False, mmap_mode="r"))

    def save(self, folder: Path) -> None:
        """Into a new folder, of whatever the stage writes whole or not at all."""
        folder.mkdir()
        table = pa.table({"query": self.text_W})
        with pa.ipc.new_file(str(folder / "queries.arrow"), table.schema) as file:
            file.write_table(table)
        np.save(folder / "vectors.npy", self.vector_WF.astype(np.float32, copy=False))

    def of(self, texts: tuple[str, ...]) -> Array:
        """(N, F). Raises RunError on a text that was not encoded."""
        found = pc.index_in(pa.array(texts, pa.large_string()), value_set=self.text_W)
        if found.null_count:
            raise RunError("the log has queries that RUN/sid/queries does not cover: run `oxyray sid force=true`")
        return self.vector_WF[found.to_numpy()]
