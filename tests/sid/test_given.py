"""Item vectors that the shop brings: read in any order and from many files, quantised, refused with what is wrong and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oxyray.config import Config, DataConfig, SidConfig
from oxyray.data.prepare import prepare
from oxyray.errors import ConfigError, DataError
from oxyray.pipeline import STAGES, vector_files
from oxyray.run import Run
from oxyray.sid import stage
from oxyray.sid.given import given_vectors
from oxyray.sid.rqkmeans import RQKMeans
from oxyray.sid.tokenizer import Tokenizer
from tests.sid.test_stage import write_shop

IDS = [f"i{n:02d}" for n in range(54)]


def write(path: Path, vectors: dict[str, Any], kind: pa.DataType | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(list(vectors.values()), kind or pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": list(vectors), "vector": column}), path, row_group_size=7)
    return path


def own(seed: int = 0, width: int = 6) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {item: random.normal(size=width).astype(np.float32).tolist() for item in IDS}


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 6)])
def test_any_order_any_files_and_items_of_nobody(tmp_path: Path, kind: pa.DataType) -> None:
    vectors = own()
    turned = dict(reversed(vectors.items()))
    write(tmp_path / "all" / "a.parquet", {name: turned[name] for name in list(turned)[:20]}, kind)
    write(tmp_path / "all" / "b.parquet", {name: turned[name] for name in list(turned)[20:]} | {"another": [9.0] * 6}, kind)
    found_NW = given_vectors(str(tmp_path / "all"), IDS)
    assert found_NW.dtype == np.float32
    np.testing.assert_array_equal(found_NW, np.array([vectors[item] for item in IDS], dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held.pop("i03"), "1 items have no vector, the first is i03"),
        (lambda held: held.update(i05=[float("nan")] * 6), "1 items have a vector with NaN or infinite values, the first is i05"),
        (lambda held: held.update(i06=[1.0] * 5), "i06 has 5 numbers, others 6"),
        (lambda held: held.update(i07=None), "i07 has 0 numbers, others 6"),
        (lambda held: held.update({item: [] for item in held}), "has 0 numbers"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Any, says: str) -> None:
    vectors = own()
    change(vectors)
    with pytest.raises(DataError, match=says) as caught:
        given_vectors(str(write(tmp_path / "v.parquet", vectors)), IDS)
    assert str(tmp_path / "v.parquet") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        given_vectors(str(tmp_path / "none.parquet"), IDS)
    pq.write_table(pa.table({"item_id": IDS}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="no column vector; it has item_id"):
        given_vectors(str(tmp_path / "ids.parquet"), IDS)
    pq.write_table(pa.table({"item_id": IDS, "vector": IDS}), tmp_path / "words.parquet")
    with pytest.raises(DataError, match="must hold lists of numbers, it holds string"):
        given_vectors(str(tmp_path / "words.parquet"), IDS)
    write(tmp_path / "two" / "a.parquet", own())
    write(tmp_path / "two" / "b.parquet", {"i09": [0.5] * 6})
    with pytest.raises(DataError, match="1 items have more than one vector, the first is i09"):
        given_vectors(str(tmp_path / "two"), IDS)
    with pytest.raises(ConfigError, match="sid.given"):
        SidConfig(vectors="given")


def test_the_stage_quantises_them_and_knows_when_they_change(tmp_path: Path) -> None:
    vectors = own()
    file = write(tmp_path / "own" / "v.parquet", vectors)
    data = DataConfig(name="shop", source="tables", path=str(write_shop(tmp_path / "shop")), split="leave_one_out", time_unit="position")
    settings = SidConfig(width=8, levels=2, cache_dir=str(tmp_path / "cache"), vectors="given", given=str(file.parent), collisions="none")
    config = Config(run_dir=str(tmp_path / "run"), data=data, sid=settings)
    run = Run(config.run_dir)
    prepare(config, run)
    stage.sid(config, run)
    tokenizer = Tokenizer(config, run)
    wanted_NW = np.array([vectors[item] for item in tokenizer.catalog.item_ids], dtype=np.float32)
    assert (RQKMeans.load(run.path("sid", "codebook.npz")).assign(wanted_NW) == tokenizer.catalog.codes_IL).all()
    assert vector_files(config) == [file]
    assert next(made for made in STAGES if made.name == "sid").files(config) == [file]

    new = pa.table({"item_id": ["n1"], "title": ["a spade"]})
    with pytest.raises(DataError, match="1 items have no vector, the first is n1"):
        tokenizer.encode(new)
    write(file.parent / "new.parquet", {"n1": vectors["i20"]})
    assert (tokenizer.encode(new).codes_NL[0] == tokenizer.sids(["i20"])[0]).all()
    assert len(vector_files(config)) == 2
