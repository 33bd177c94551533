"""What a process reads of a run before it can work: of wide items, the ids alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oxyray.config import Config, DataConfig
from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.errors import RunError
from oxyray.model.inputs import Inputs
from oxyray.run import Run
from oxyray.sid.catalog import Catalog
from oxyray.sid.encoder import TEXT_COLUMNS, item_texts

ITEMS, USERS = 20, 6


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A prepared shop with descriptions and pictures, and a catalogue of its items."""
    ids = [f"i{n:02d}" for n in range(ITEMS)]
    words = np.random.default_rng(0)
    items = {"item_id": ids, "title": [f"thing {n}" for n in range(ITEMS)], "price": [float(n) for n in range(ITEMS)]}
    items |= {"description": [words.bytes(500).hex() for _ in ids], "image": [words.bytes(1000) for _ in ids]}
    (tmp_path / "shop").mkdir()
    pq.write_table(pa.table(items), tmp_path / "shop" / "items.parquet")
    rows = [(f"u{user}", ids[(7 * user + place) % ITEMS], place, "click", "shop") for user in range(USERS) for place in range(5)]
    names = ("user_id", "item_id", "event_time", "action", "scenario")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), tmp_path / "shop" / "events.parquet")
    data = DataConfig(name="shop", source="tables", path=str(tmp_path / "shop"), split="leave_one_out", time_unit="position")
    run = Run(tmp_path / "run")
    prepare(Config(run_dir=str(run.folder), data=data), run)
    codes_IL = np.stack(np.divmod(np.arange(ITEMS), 8), axis=1)
    Catalog.of(ids, codes_IL, 8).save(run.path("sid", "catalog"))
    return run


def damage(path: Path, columns: set[str]) -> None:
    """Overwrite what the Parquet file holds of these columns; its footer and the other columns stay."""
    whole, meta = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata
    for group in range(meta.num_row_groups):
        for place in range(meta.num_columns):
            column = meta.row_group(group).column(place)
            if column.path_in_schema.split(".")[0] in columns:
                start = column.dictionary_page_offset or column.data_page_offset
                whole[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(whole)


def test_training_and_serving_read_no_more_of_the_items_than_their_ids(run: Run) -> None:
    damage(run.path("data", "items.parquet"), {"title", "description", "image", "price"})
    inputs = Inputs.load(run)
    assert inputs.vocab.items == ITEMS
    assert inputs.prepared.item_index("i03") == 3
    with pytest.raises(RunError, match=r"items.parquet is damaged"):
        _ = inputs.prepared.items


def test_texts_are_the_same_without_the_columns_that_are_no_text(run: Run) -> None:
    prepared = Prepared.load(run.path("data"))
    want = item_texts(prepared.items)
    damage(run.path("data", "items.parquet"), {"image", "price"})
    some = prepared.item_columns("item_id", *TEXT_COLUMNS)
    assert set(some.column_names) == {"item_id", "title", "description"}
    assert item_texts(some) == want
