"""Item vectors that the shop has made itself, read from Parquet: two columns, `item_id` and `vector` (numbers, as many for every item).

Legend: N items, W numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from oxyray.errors import DataError

Array = np.ndarray


def given_vectors(path: str, item_ids: Sequence[str]) -> Array:
    """(N, W) float32 of these items, in their order, streamed from a file or a folder of files; vectors of other items are passed over.

    Raises DataError where the file cannot be read or lacks a column, an item has no vector or two, vectors differ in width, or one holds
    NaN or infinite values.
    """
    wanted = pa.array(item_ids, pa.large_string())
    found_NW, times_N = np.zeros((len(wanted), 0), dtype=np.float32), np.zeros(len(wanted), dtype=np.int64)
    try:
        source = pads.dataset(Path(path).expanduser(), format="parquet")
        if missing := [name for name in ("item_id", "vector") if name not in source.schema.names]:
            raise DataError(f"sid.given={path}: no column {missing[0]}; it has {', '.join(source.schema.names)}")
        for batch in source.to_batches(columns=["item_id", "vector"]):
            row_M = pc.index_in(batch["item_id"].cast(pa.large_string()), wanted).to_numpy(zero_copy_only=False)
            keep_M = np.flatnonzero(~np.isnan(row_M.astype(np.float64)))
            if not len(keep_M):
                continue
            rows_K = row_M[keep_M].astype(np.int64)
            vector_KW = _rectangle(batch["vector"].take(pa.array(keep_M)), path, wanted, rows_K)
            if not found_NW.shape[1]:
                found_NW = np.zeros((len(wanted), vector_KW.shape[1]), dtype=np.float32)
            if vector_KW.shape[1] != found_NW.shape[1]:
                raise DataError(f"sid.given={path}: {wanted[rows_K[0]]} has {vector_KW.shape[1]} numbers, others {found_NW.shape[1]}")
            found_NW[rows_K] = vector_KW
            np.add.at(times_N, rows_K, 1)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"sid.given={path}: cannot be read ({str(error).splitlines()[0]})") from None
    for bad_N, what in (
        (times_N == 0, "have no vector"),
        (times_N > 1, "have more than one vector"),
        (~np.isfinite(found_NW).all(axis=1), "have a vector with NaN or infinite values"),
    ):
        if bad_N.any():
            raise DataError(
                f"sid.given={path}: {int(bad_N.sum()):,} items {what}, the first is {wanted[int(bad_N.argmax())]}: mend the file"
            )
    return found_NW


def _rectangle(vectors: pa.Array, path: str, wanted: pa.Array, rows_K: Array) -> Array:
    """Lists of numbers as (K, W) float32."""
    if not (pa.types.is_list(vectors.type) or pa.types.is_large_list(vectors.type) or pa.types.is_fixed_size_list(vectors.type)):
        raise DataError(f"sid.given={path}: column vector must hold lists of numbers, it holds {vectors.type}")
    size_K = pc.fill_null(pc.list_value_length(vectors), 0).to_numpy(zero_copy_only=False)
    if (size_K != size_K[0]).any() or size_K[0] == 0:
        odd = int((size_K != size_K[0]).argmax()) if size_K[0] else 0
        raise DataError(f"sid.given={path}: {wanted[rows_K[odd]]} has {size_K[odd]} numbers, others {size_K.max()}")
    flat = vectors.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    return flat.reshape(len(vectors), int(size_K[0]))
