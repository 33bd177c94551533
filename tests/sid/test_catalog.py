"""The catalogue: its version is its content, a changed file is refused, published SIDs never move."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.errors import CatalogueError
from oxyray.sid.catalog import Catalog
from oxyray.sid.prefix import PrefixIndex

IDS = ("a", "b", "c", "d")
CODES = np.array([[0, 1, 2], [0, 1, 2], [3, 0, 0], [1, 1, 1]])


def catalog() -> Catalog:
    return Catalog.of(IDS, CODES, 4)


def test_round_trip(tmp_path: Path) -> None:
    made = catalog()
    made.save(tmp_path / "catalog")
    again = Catalog.load(tmp_path / "catalog", version=made.version)
    assert again.item_ids == IDS
    assert (again.codes_IL == CODES).all()
    assert (again.width, again.levels, len(again), again.version) == (4, 3, 4, made.version)
    assert again.codes_IL.dtype == np.int32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["catalog"]


def test_version_is_the_content() -> None:
    version = catalog().version
    assert Catalog.of(IDS, CODES.astype(np.int64).copy(), 4).version == version
    moved = CODES.copy()
    moved[2, 1] = 1
    others = [
        Catalog.of(IDS, moved, 4),
        Catalog.of(IDS, CODES, 5),
        Catalog.of(("a", "b", "c", "e"), CODES, 4),
        Catalog.of(("ab", "c", "d", "e"), CODES, 4),
    ]
    assert len({version, *(other.version for other in others)}) == 5


@pytest.mark.parametrize(
    ("ids", "codes", "says"),
    [
        (("a", "b", "a", "d"), CODES, "'a' stands twice"),
        (IDS, CODES + 1, "0..3"),
        (IDS, CODES - 1, "0..3"),
        (IDS, CODES.astype(float), "whole numbers"),
        (IDS[:3], CODES, "one SID an item"),
        ((), CODES[:0], "at least one item"),
        (IDS, CODES[:, 0], "one SID an item"),
    ],
)
def test_what_is_no_catalogue(ids: tuple[str, ...], codes: np.ndarray, says: str) -> None:
    with pytest.raises(CatalogueError, match=says):
        Catalog.of(ids, codes, 4)


def test_wrong_version_is_one_clear_line(tmp_path: Path) -> None:
    catalog().save(tmp_path)
    with pytest.raises(CatalogueError, match=f"holds catalogue {catalog().version}, but 0123456789abcdef is needed") as caught:
        Catalog.load(tmp_path, version="0123456789abcdef")
    assert "\n" not in str(caught.value)


def rewrite_codes(folder: Path, column: str, values: list[int]) -> None:
    table = pq.read_table(folder / "items.parquet")
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values, pa.int32())), folder / "items.parquet")


def rewrite_about(folder: Path, **changes: object) -> None:
    about = json.loads((folder / "catalog.json").read_text())
    (folder / "catalog.json").write_text(json.dumps(about | changes))


def test_files_changed_after_writing_are_refused(tmp_path: Path) -> None:
    def refused(name: str, change, says: str) -> None:  # type: ignore[no-untyped-def]
        folder = tmp_path / name
        catalog().save(folder)
        change(folder)
        with pytest.raises(CatalogueError, match=says) as caught:
            Catalog.load(folder)
        assert "\n" not in str(caught.value)

    refused("moved", lambda f: rewrite_codes(f, "code_1", [0, 0, 2, 1]), "changed after writing")
    refused("range", lambda f: rewrite_codes(f, "code_1", [0, 0, 4, 1]), "0..3")
    refused("width", lambda f: rewrite_about(f, width=3), "0..2")
    refused("wider", lambda f: rewrite_about(f, width=8), "changed after writing")
    refused("levels", lambda f: rewrite_about(f, levels=4), "oxyray sid")
    refused("kind", lambda f: rewrite_about(f, width="many"), "oxyray sid")
    refused("format", lambda f: rewrite_about(f, format=2), "format 2")
    refused("torn", lambda f: (f / "items.parquet").write_bytes((f / "items.parquet").read_bytes()[:-20]), "oxyray sid")
    refused("json", lambda f: (f / "catalog.json").write_text("{"), "oxyray sid")
    refused("gone", lambda f: (f / "items.parquet").unlink(), "oxyray sid")
    with pytest.raises(CatalogueError, match="missing"):
        Catalog.load(tmp_path / "nowhere")


def test_codes_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="read-only"):
        catalog().codes_IL[0, 0] = 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_append_never_moves_a_sid(data: st.DataObject) -> None:
    old, new = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 6))
    codes = np.array(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=old + new, max_size=old + new)))
    ids = [f"i{n}" for n in range(old + new)]
    before = Catalog.of(ids[:old], codes[:old], 4)
    after = before.append(ids[old:], codes[old:].reshape(new, 2))
    assert (after.codes_IL == codes).all()
    assert after.rows(ids[:old]).tolist() == before.rows(ids[:old]).tolist()
    assert after.extends(before)
    assert before.extends(after) == (new == 0)
    assert (after.version == before.version) == (new == 0)


def test_append_refuses_what_would_move_or_not_fit() -> None:
    with pytest.raises(CatalogueError, match="'b' has a SID already"):
        catalog().append(["e", "b"], CODES[:2])
    with pytest.raises(CatalogueError, match="3 levels"):
        catalog().append(["e"], np.array([[1, 1]]))
    with pytest.raises(CatalogueError, match="0..3"):
        catalog().append(["e"], np.array([[1, 1, 4]]))
    with pytest.raises(CatalogueError, match="'e' stands twice"):
        catalog().append(["e", "e"], CODES[:2])
    assert not catalog().append(["e"], CODES[:1]).extends(Catalog.of(IDS, CODES[::-1], 4))


def test_rows_and_unknown_items() -> None:
    assert catalog().rows(["c", "a", "c"]).tolist() == [2, 0, 2]
    with pytest.raises(CatalogueError, match="2 items are not in catalogue .* 'x'"):
        catalog().rows(["a", "x", "y"])


def test_index_of_all_items_and_of_a_pool() -> None:
    made = catalog()
    assert made.index.leaves == 3
    pool = made.pool_index(np.array([False, True, False, True]))
    want = PrefixIndex.from_codes(CODES[[1, 3]], 4, np.array([1, 3]))
    assert pool.leaf_items.tolist() == want.leaf_items.tolist() == [1, 3]
    assert pool.leaf_of(CODES).tolist() == [0, 0, -1, 1]
    with pytest.raises(CatalogueError, match="pool is empty"):
        made.pool_index(np.zeros(4, bool))
    with pytest.raises(CatalogueError, match="one bool for each of 4"):
        made.pool_index(np.ones(3, bool))
    with pytest.raises(CatalogueError, match="one bool for each of 4"):
        made.pool_index(np.arange(4))
