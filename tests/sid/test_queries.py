"""Query texts: found in events and exposures, encoded once, and numbered the same wherever events are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.errors import DataError, RunError
from oxyray.model.inputs import Inputs
from oxyray.reward.log import Log
from oxyray.reward.pages import _numbered
from oxyray.run import Run
from oxyray.sid import stage
from oxyray.sid.encoder import encode
from oxyray.sid.queries import QueryVectors, distinct_queries
from tests.sid.test_stage import made

TYPED = ["red lipstick", None, "tea pott", "", "red lipstick"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("shop")
    config, run = made(folder, tmp_path_factory.mktemp("vectors"))
    events = pq.read_table(folder / "shop" / "events.parquet")
    typed = [TYPED[row % len(TYPED)] for row in range(events.num_rows)]
    pq.write_table(events.append_column("query", pa.array(typed, pa.string())), folder / "shop" / "events.parquet")
    pq.write_table(pa.table({"query": ["garden hose", "red lipstick", None]}), folder / "shop" / "exposures.parquet")
    prepare(config, run)
    stage.sid(config, run)
    run.write_config(config)
    return run


def test_every_text_is_encoded_once_and_events_say_which_they_have(shop: Run) -> None:
    queries = QueryVectors.load(shop)
    assert queries is not None
    assert queries.text_W.to_pylist() == ["red lipstick", "tea pott"]
    inputs = Inputs.load(shop)
    assert inputs.vocab.query == queries.vector_WF.shape[1] == 384
    seen = set()
    for part in range(inputs.prepared.parts):
        events = inputs.prepared.events(part)
        for text, row in zip(events["query"], events["query_row"], strict=True):
            assert row == (-1 if not text else ["red lipstick", "tea pott"].index(text))
            seen.add(int(row))
    assert seen == {-1, 0, 1}
    assert "query_row" not in inputs.prepared.user_events(3), "who is served needs no numbering of all texts"


def test_vectors_are_the_text_encoders_and_an_unknown_text_is_an_error(shop: Run, tmp_path: Path) -> None:
    queries = QueryVectors.load(shop)
    assert queries is not None
    config, _ = made(tmp_path, tmp_path / "vectors")
    want = encode(["tea pott", "red lipstick"], replace(config.sid, cache_dir=str(tmp_path / "again")))
    assert np.allclose(queries.of(("tea pott", "red lipstick")), want, atol=1e-5)
    with pytest.raises(RunError, match="queries that RUN/sid/queries does not cover: run `oxyray sid force=true`"):
        queries.of(("nobody typed this",))


def test_pages_of_the_log_find_every_query_and_take_an_empty_one_for_none(shop: Run) -> None:
    inputs = Inputs.load(shop)
    pages = Log.of(shop.config(), shop, inputs.prepared).pages(0)
    assert sorted(pages.queries) == ["red lipstick", "tea pott"]
    assert pages.query_WF is not None
    assert len(pages.query_WF) == 2
    empty = pa.chunked_array([pa.array(["", "a", None, "a"], pa.large_string())])
    assert _numbered(empty)[1].tolist() == [-1, 0, -1, 0]


def test_exposures_come_into_the_run_where_pages_can_be_made_of_them(shop: Run, tmp_path: Path) -> None:
    without = Prepared.load(shop.path("data"))
    assert without.exposures is None, "left one out"
    assert distinct_queries(without).to_pylist() == ["red lipstick", "tea pott"]
    config = shop.config()
    run = Run(tmp_path / "run")
    prepare(replace(config, run_dir=str(run.folder), data=replace(config.data, split="time", time_unit="seconds")), run)
    by_time = Prepared.load(run.path("data"))
    (Path(config.data.path or "") / "exposures.parquet").unlink()
    assert by_time.exposures is not None, "the run has its own"
    assert distinct_queries(by_time).to_pylist() == ["garden hose", "red lipstick", "tea pott"]
    assert distinct_queries(by_time, shown=False).to_pylist() == ["red lipstick", "tea pott"]


def test_a_damaged_log_of_exposures_is_named(tmp_path: Path) -> None:
    _, run = made(tmp_path, tmp_path / "vectors")
    run.path("data", "exposures.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"exposures\.parquet: not a readable log of exposures"):
        distinct_queries(Prepared.load(run.path("data")))


def test_a_shop_without_queries_has_none(tmp_path: Path) -> None:
    config, run = made(tmp_path, tmp_path / "vectors")
    stage.sid(config, run)
    assert QueryVectors.load(run) is None
    inputs = Inputs.load(run)
    assert inputs.vocab.query == 0
    assert "query_row" not in inputs.prepared.events(0)
    collate = inputs.collator(config.model)
    assert collate.query_WF is None
