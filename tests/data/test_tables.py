from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxyray.data.tables import TYPES, Ids, Table, convert, find
from oxyray.errors import DataError
from tests.data import toy


def _convert(array: pa.Array, kind: str) -> list[object]:
    converted = convert(array, kind, Path("events.parquet"), "column")
    assert converted.type == TYPES[kind]
    return converted.to_pylist()


@pytest.mark.parametrize(
    ("array", "kind", "expected"),
    [
        (pa.array([1, 22, None]), "text", ["1", "22", None]),
        (pa.array([1.0, float("nan"), None]), "text", ["1", None, None]),
        (pa.array(["a", None, "a"]).dictionary_encode(), "text", ["a", None, "a"]),
        (pa.array(["a", ""], pa.large_string()), "text", ["a", ""]),
        (pa.array([3.0, None]), "whole", [3, None]),
        (pa.array([3, 4], pa.uint8()), "time", [3, 4]),
        (pa.array([Decimal("2.50")]), "number", [2.5]),
        (pa.array([2], pa.int16()), "number", [2.0]),
        (pa.array([datetime(2024, 3, 1, 0, 0, 1, 900_000)]), "time", [1709251201]),
        (pa.array([datetime(1969, 12, 31, 23, 59, 58, 500_000)], pa.timestamp("ms")), "time", [-2]),
        (pa.array([datetime(2024, 3, 1, tzinfo=UTC)], pa.timestamp("ns", "Europe/Berlin")), "time", [1709251200]),
        (pa.array([1709251200_000_000_007], pa.timestamp("ns")), "time", [1709251200]),
        (pa.array([Decimal("12"), None], pa.decimal128(38, 0)), "text", ["12", None]),
        (pa.array([date(2024, 3, 1)]), "time", [1709251200]),
        (pa.array([["a", "b"], None], pa.list_(pa.string())), "texts", [["a", "b"], None]),
        (pa.nulls(2), "number", [None, None]),
    ],
)
def test_a_type_is_changed_where_nothing_is_lost(array: pa.Array, kind: str, expected: list[object]) -> None:
    assert _convert(array, kind) == expected


@pytest.mark.parametrize(
    ("array", "kind"),
    [(pa.array([3.5]), "whole"), (pa.array([1.25]), "text"), (pa.array([1e300]), "time"), (pa.array([Decimal("1.5")]), "time")],
)
def test_a_value_that_would_change_is_an_error(array: pa.Array, kind: str) -> None:
    with pytest.raises(DataError, match=r"^events.parquet: column column has type"):
        _convert(array, kind)


@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))))
def test_whole_numbers_survive_as_text(values: list[int | None]) -> None:
    assert _convert(pa.array(values, pa.int64()), "text") == [None if v is None else str(v) for v in values]


def test_a_folder_of_files_is_read_in_name_order_and_missing_optional_columns_are_null(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    pq.write_table(toy.table([toy.event("u", "i1", 2, query="red")]), folder / "b.parquet")
    pq.write_table(toy.table([toy.event("u", "i0", 1, country="FR")]), folder / "a.parquet")
    table = Table("events", find(tmp_path, "events"))
    chunks = list(table.chunks())
    rows = pa.concat_tables([chunk.rows for chunk in chunks])
    assert [chunk.file.name for chunk in chunks] == ["a.parquet", "b.parquet"]
    assert rows["item_id"].to_pylist() == ["i0", "i1"]
    assert rows["query"].to_pylist() == [None, "red"]
    assert table.ignored == {"country"}
    assert table.rows == 2


def test_chunks_are_bounded_and_know_their_place(tmp_path: Path) -> None:
    toy.write(tmp_path, events=[toy.event("u", f"i{n}", n) for n in range(10)])
    chunks = list(Table("events", find(tmp_path, "events")).chunks(batch_rows=4))
    assert [(chunk.first_row, chunk.rows.num_rows) for chunk in chunks] == [(0, 4), (4, 4), (8, 2)]


def test_find_takes_a_named_file_and_says_what_is_absent(tmp_path: Path) -> None:
    toy.write(tmp_path)
    assert find(tmp_path, "users") == []
    assert find(tmp_path, "events", "events.parquet") == [tmp_path / "events.parquet"]
    with pytest.raises(DataError, match=r"data\.events_file"):
        find(tmp_path, "events", "clicks.parquet")
    with pytest.raises(DataError, match=r"set data\.path"):
        find(tmp_path / "none", "events")


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcdefg"))))
def test_ids_are_places_in_the_list(values: list[str | None]) -> None:
    known = ["c", "a", "f"]
    found = Ids(known).find(pa.chunked_array([pa.array(values, pa.large_string())]))
    assert found.tolist() == [known.index(v) if v in known else -1 for v in values]
