"""`predictions.parquet`: what every model recommended for every test request, and the table of results recomputed from it.

One row for each (model, protocol, request's target): `request_id` (the prepared request number), `user_id`, `scenario`, `item_ids`
best first, `scores`, `target_item_id`, `model`, `protocol`, and `sids`: the list's distinct SIDs best first, as leaf numbers of the
catalogue's prefix index. The lists are as long as the largest K.

`recompute` needs this file, the prepared events (for the positives of a user's day) and the catalogue (for SID level), and is the
only way the table is made: what `oxyray evaluate` prints is what anyone gets from the files.

Legend: R rows, K places, P positives of all rows, M metrics, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.data.prepared import Prepared
from oxyray.data.requests import timeline
from oxyray.errors import RunError
from oxyray.evaluate.baselines import Lists
from oxyray.evaluate.lists import PROTOCOLS
from oxyray.evaluate.metrics import Resampled, names, row_metrics
from oxyray.evaluate.requests import TEST, Requests

Array = np.ndarray

SECONDS_PER_DAY = 86_400
SCHEMA = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.large_string()),
        ("scenario", pa.string()),
        ("item_ids", pa.list_(pa.large_string())),
        ("scores", pa.list_(pa.float32())),
        ("target_item_id", pa.large_string()),
        ("model", pa.string()),
        ("protocol", pa.string()),
        ("sids", pa.list_(pa.int64())),
    ]
)
LEVELS = ("item", "sid")


class Writer:
    """Appends lists of one model and protocol at a time; close it (or use it with `with`)."""

    def __init__(self, path: Path, prepared: Prepared) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._items = prepared.item_ids.combine_chunks()
        self._users = prepared.user_ids.combine_chunks()
        self._scenarios = pa.array(prepared.meta.scenarios, pa.string())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def add(self, model: str, protocol: str, requests: Requests, lists: Lists, sid_RK: Array) -> None:
        rows = len(requests)
        columns = [
            pa.array(requests.request_R, pa.int64()),
            self._users.take(pa.array(requests.user_R)),
            self._scenarios.take(pa.array(requests.scenario_R)),
            _jagged(lists.item_RK, lists.item_RK >= 0, lambda flat: self._items.take(pa.array(flat))),
            _jagged(lists.score_RK, lists.item_RK >= 0, lambda flat: pa.array(flat, pa.float32())),
            self._items.take(pa.array(requests.target_R)),
            pa.array([model] * rows, pa.string()),
            pa.array([protocol] * rows, pa.string()),
            _jagged(sid_RK, sid_RK >= 0, lambda flat: pa.array(flat, pa.int64())),
        ]
        self._file.write_table(pa.table([column.cast(field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA))


def _jagged(value_RK: Array, real_RK: Array, to_arrow: Any) -> pa.Array:
    """Real places come first in each row."""
    offsets = np.concatenate([[0], np.cumsum(real_RK.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), to_arrow(value_RK[real_RK]))


@dataclass(frozen=True)
class Predicted:
    """Rows of one model and protocol, as indices: `item_RK` and `sid_RK` are padded with -1."""

    request_R: Array
    user_R: Array
    scenario_R: Array
    target_R: Array
    item_RK: Array
    sid_RK: Array


def read(path: Path, prepared: Prepared, model: str, protocol: str) -> Predicted:
    """Raises RunError when ids of the file are not of this data."""
    table = pq.read_table(path, filters=(pc.field("model") == model) & (pc.field("protocol") == protocol))
    items, users = prepared.item_ids, prepared.user_ids
    return Predicted(
        request_R=table["request_id"].to_numpy(),
        user_R=_indices(table["user_id"], users, path),
        scenario_R=_indices(
            table["scenario"].cast(pa.large_string()), pa.chunked_array([pa.array(prepared.meta.scenarios, pa.large_string())]), path
        ),
        target_R=_indices(table["target_item_id"], items, path),
        item_RK=_padded(table["item_ids"], lambda flat: _indices(flat, items, path)),
        sid_RK=_padded(table["sids"], lambda flat: flat.to_numpy()),
    )


def models(path: Path) -> list[str]:
    """The models in the file, in the order of their first rows."""
    return pc.unique(pq.read_table(path, columns=["model"])["model"]).to_pylist()


def _indices(values: pa.ChunkedArray, known: pa.ChunkedArray, path: Path) -> Array:
    found = pc.index_in(values, value_set=known.combine_chunks())
    if found.null_count:
        stranger = values.filter(pc.is_null(found))[0].as_py()
        raise RunError(
            f"{path} speaks of {stranger!r}, which this data does not hold: it was written for other data; run `oxyray evaluate` again"
        )
    return found.to_numpy().astype(np.int64)


def _padded(column: pa.ChunkedArray, flat_values: Any) -> Array:
    length_R = pc.list_value_length(column).to_numpy()
    value_RK = np.full((len(length_R), int(length_R.max(initial=0))), -1, dtype=np.int64)
    value_RK[np.arange(value_RK.shape[1]) < length_R[:, None]] = flat_values(pc.list_flatten(column))
    return value_RK


@dataclass(frozen=True)
class Positives:
    """What each user took on each day of the test split: distinct pairs (key_P, item_P), sorted; a key is one user's day."""

    request_key: dict[int, int]
    key_P: Array
    item_P: Array

    @classmethod
    def of(cls, prepared: Prepared) -> Positives:
        """Days are UTC; where time is a position, every request is a day of its own."""
        days, requests, pairs, base = prepared.meta.time_unit == "seconds", dict[int, int](), list[Array](), 0
        for part in range(prepared.parts):
            time = timeline(prepared.events(part))
            test = np.flatnonzero(time.split_E == TEST)
            day_T = time.asked_E[test] // SECONDS_PER_DAY if days else time.request_E[test]
            key_T = _numbered(time.user_E[test], day_T) + base
            base = int(key_T.max(initial=base - 1)) + 1
            requests |= dict(zip(time.request_E[test].tolist(), key_T.tolist(), strict=True))
            pairs.append(_distinct(key_T, time.item_E[test]))
        return cls(requests, *np.concatenate(pairs, axis=1))

    def of_rows(self, request_R: Array, path: Path) -> tuple[Array, Array]:
        """(row_P, item_P): the positives of each row's user and day."""
        try:
            key_R = np.array([self.request_key[request] for request in request_R.tolist()], dtype=np.int64)
        except KeyError as error:
            raise RunError(
                f"{path} has request {error.args[0]}, which is no test request of this data: run `oxyray evaluate` again"
            ) from None
        first_R, last_R = np.searchsorted(self.key_P, key_R, "left"), np.searchsorted(self.key_P, key_R, "right")
        row_P = np.repeat(np.arange(len(key_R)), last_R - first_R)
        at_P = np.arange(len(row_P)) + np.repeat(first_R - (np.cumsum(last_R - first_R) - (last_R - first_R)), last_R - first_R)
        return row_P, self.item_P[at_P]


def _numbered(*columns: Array) -> Array:
    """Equal tuples get the same number, 0 upwards in sorted order."""
    return np.unique(np.stack([column.astype(np.int64) for column in columns]), axis=1, return_inverse=True)[1].reshape(-1)


def _distinct(left_N: Array, right_N: Array) -> Array:
    """The distinct pairs, sorted: (2, N)."""
    span = 1 + int(right_N.max(initial=0))
    key_N = np.unique(left_N.astype(np.int64) * span + right_N)
    return np.stack([key_N // span, key_N % span])


def recompute(
    path: str | Path, prepared: Prepared, leaf_I: Array | None, ks: Sequence[int], resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The results of `predictions.parquet`: `table` (means with 95% intervals for every model, protocol, level, overall and by
    scenario) and `against` (the first model less each other one, paired). `leaf_I` maps items to SIDs; without it there is no SID
    level.

    Raises RunError when the file is of other data.
    """
    path = Path(path)
    known, positives, metric_names = models(path), Positives.of(prepared), names(ks)
    table: list[dict[str, Any]] = []
    against: list[dict[str, Any]] = []
    for protocol in PROTOCOLS:
        first: dict[str, Array] = {}
        resampled: Resampled | None = None
        asked: Array | None = None
        for model in known:
            rows = read(path, prepared, model, protocol)
            if asked is None:
                asked, resampled = np.stack([rows.request_R, rows.target_R]), Resampled.draw(rows.user_R, resamples, seed)
            elif not np.array_equal(asked, np.stack([rows.request_R, rows.target_R])):
                raise RunError(
                    f"{path}: {model} and {known[0]} answered different requests, so they cannot be compared: run `oxyray evaluate` again"
                )
            assert resampled is not None
            for level, value_RM in _levels(rows, positives, leaf_I, ks, path):
                table += _entries(model, protocol, level, value_RM, rows.scenario_R, prepared.meta.scenarios, metric_names, resampled)
                if model == known[0]:
                    first[level] = value_RM
                else:
                    against.append(_difference(known[0], model, protocol, level, first[level] - value_RM, metric_names, resampled))
    return {"table": table, "against": against}


def _levels(rows: Predicted, positives: Positives, leaf_I: Array | None, ks: Sequence[int], path: Path) -> Iterator[tuple[str, Array]]:
    row_P, item_P = positives.of_rows(rows.request_R, path)
    yield "item", row_metrics(rows.item_RK, rows.target_R, row_P, item_P, ks)
    if leaf_I is not None:
        row_P, sid_P = _distinct(row_P, leaf_I[item_P])
        yield "sid", row_metrics(rows.sid_RK, leaf_I[rows.target_R], row_P, sid_P, ks)


def _entries(
    model: str,
    protocol: str,
    level: str,
    value_RM: Array,
    scenario_R: Array,
    scenarios: list[str],
    metric_names: list[str],
    resampled: Resampled,
) -> list[dict[str, Any]]:
    interval_M2 = resampled.interval(value_RM)
    entries = [_entry(model, protocol, level, None, value_RM, metric_names)]
    if not np.isnan(interval_M2).any():
        entries[0]["intervals"] = {name: [float(low), float(high)] for name, (low, high) in zip(metric_names, interval_M2, strict=True)}
    for number, scenario in enumerate(scenarios):
        if (scenario_R == number).any():
            entries.append(_entry(model, protocol, level, scenario, value_RM[scenario_R == number], metric_names))
    return entries


def _entry(model: str, protocol: str, level: str, scenario: str | None, value_RM: Array, metric_names: list[str]) -> dict[str, Any]:
    """`scenario` None: overall."""
    means = {name: float(value) for name, value in zip(metric_names, value_RM.mean(axis=0), strict=True)} if len(value_RM) else {}
    return {"model": model, "protocol": protocol, "level": level, "scenario": scenario, "requests": len(value_RM), "metrics": means}


def _difference(
    ours: str, theirs: str, protocol: str, level: str, value_RM: Array, metric_names: list[str], resampled: Resampled
) -> dict[str, Any]:
    figures = zip(metric_names, value_RM.mean(axis=0), resampled.interval(value_RM), resampled.p_value(value_RM), strict=True)
    metrics = {
        name: {"difference": float(mean), "p": float(p)} | ({} if np.isnan(interval).any() else {"interval": [float(x) for x in interval]})
        for name, mean, interval, p in figures
    }
    return {"model": ours, "baseline": theirs, "protocol": protocol, "level": level, "metrics": metrics}
