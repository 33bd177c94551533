"""The catalogue: which item has which semantic ID, under a version that is the hash of its content.

A model knows codes, people know items; the catalogue joins them, and a checkpoint names the version that it was trained on. So a load
proves that the content hashes to its version, and refuses any other. SIDs once published never move: new items are appended and make a new
version.

Legend: I items, L levels, N rows asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oxyray.errors import CatalogueError, RunError
from oxyray.files import read_json, whole, write_json
from oxyray.sid.prefix import PrefixIndex

Array = np.ndarray

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Catalog:
    """Row i is item index i: `item_ids[i]` has the SID `codes_IL[i]`, int32 codes in 0..width-1. Make it with `Catalog.of`, which
    checks."""

    item_ids: tuple[str, ...]
    codes_IL: Array
    width: int
    version: str

    @classmethod
    def of(cls, item_ids: Sequence[str], codes_IL: Array, width: int) -> Catalog:
        """Raises CatalogueError on no item, repeated item ids, codes of another shape or outside 0..width-1."""
        codes_IL = np.ascontiguousarray(codes_IL)
        if codes_IL.ndim != 2 or codes_IL.shape[1] == 0 or len(codes_IL) != len(item_ids) or len(item_ids) == 0:
            raise CatalogueError(
                f"a catalogue needs one SID an item and at least one item; got {len(item_ids)} items and codes of shape {codes_IL.shape}"
            )
        if not np.issubdtype(codes_IL.dtype, np.integer) or codes_IL.min() < 0 or codes_IL.max() >= width:
            raise CatalogueError(
                f"codes must be whole numbers in 0..{width - 1}; found {codes_IL.dtype} {codes_IL.min()}..{codes_IL.max()}"
            )
        ids = tuple(map(str, item_ids))
        if len(set(ids)) < len(ids):
            raise CatalogueError(f"item id {_first_repeated(ids)!r} stands twice in the catalogue: item ids must be unique")
        codes_IL = codes_IL.astype(np.int32)
        codes_IL.flags.writeable = False
        return cls(ids, codes_IL, int(width), _content_hash(ids, codes_IL, width))

    @property
    def levels(self) -> int:
        return int(self.codes_IL.shape[1])

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def index(self) -> PrefixIndex:
        """The legal prefixes of all items."""
        return PrefixIndex.from_codes(self.codes_IL, self.width)

    def pool_index(self, mask_I: Array) -> PrefixIndex:
        """The legal prefixes of the items in a pool (bool per item); its leaves hold indices into the whole catalogue. Raises
        CatalogueError on an empty pool or a mask of another length."""
        mask_I = np.asarray(mask_I)
        if mask_I.dtype != bool or mask_I.shape != (len(self),):
            raise CatalogueError(f"a pool is one bool for each of {len(self)} items; got {mask_I.dtype} of shape {mask_I.shape}")
        items = np.flatnonzero(mask_I)
        if len(items) == 0:
            raise CatalogueError("the pool is empty: a scenario needs at least one item that may be recommended there")
        return PrefixIndex.from_codes(self.codes_IL[items], self.width, items)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def rows(self, item_ids: Sequence[str]) -> Array:
        """Item indices (N,) of item ids. Raises CatalogueError naming the first unknown one."""
        unknown = [item_id for item_id in item_ids if item_id not in self._row_of]
        if unknown:
            raise CatalogueError(
                f"{len(unknown)} items are not in catalogue {self.version}, first {unknown[0]!r}: append them, or run `oxyray sid` again"
            )
        return np.array([self._row_of[item_id] for item_id in item_ids], dtype=np.int64)

    def append(self, item_ids: Sequence[str], codes_NL: Array) -> Catalog:
        """A new version with these items behind the old ones, whose rows and SIDs stay. Raises CatalogueError on an item that is in
        already, or codes that do not fit."""
        again = [item_id for item_id in item_ids if item_id in self._row_of]
        if again:
            raise CatalogueError(f"item {again[0]!r} has a SID already, and published SIDs never move: append new items only")
        codes_NL = np.asarray(codes_NL)
        if codes_NL.ndim != 2 or codes_NL.shape[1] != self.levels:
            raise CatalogueError(f"this catalogue's SIDs have {self.levels} levels; the new codes have shape {codes_NL.shape}")
        return Catalog.of((*self.item_ids, *item_ids), np.concatenate([self.codes_IL, codes_NL]), self.width)

    def extends(self, older: Catalog) -> bool:
        """Whether every item of `older` stands here in the same row with the same SID: then a model of the older version can use this
        one."""
        count = len(older)
        same_form = self.width == older.width and self.levels == older.levels and len(self) >= count
        return same_form and self.item_ids[:count] == older.item_ids and bool(np.array_equal(self.codes_IL[:count], older.codes_IL))

    def save(self, folder: str | Path) -> None:
        """Write `items.parquet` and `catalog.json`; the folder is whole or absent."""
        with whole(Path(folder)) as part:
            part.mkdir(parents=True)
            columns = {f"code_{level + 1}": pa.array(self.codes_IL[:, level]) for level in range(self.levels)}
            pq.write_table(pa.table({"item_id": pa.array(self.item_ids, pa.large_string())} | columns), part / "items.parquet")
            about = {
                "format": _FORMAT,
                "version": self.version,
                "items": len(self),
                "distinct": self.index.leaves,
                "levels": self.levels,
                "width": self.width,
            }
            write_json(part / "catalog.json", about)

    @classmethod
    def load(cls, folder: str | Path, version: str | None = None) -> Catalog:
        """Raises CatalogueError when files are absent or damaged, the content does not hash to its version, or another `version` is asked
        for."""
        folder = Path(folder)
        mend = "run `oxyray sid` again"
        try:
            about = read_json(folder / "catalog.json")
            table = pq.read_table(folder / "items.parquet")
            if about["format"] != _FORMAT:
                raise CatalogueError(f"{folder}: written in format {about['format']}, this version reads {_FORMAT}: {mend}")
            names = [f"code_{level + 1}" for level in range(about["levels"])]
            codes_IL = np.stack([table.column(name).to_numpy() for name in names], axis=1)
            catalog = cls.of(table.column("item_id").to_pylist(), codes_IL, about["width"])
            said = about["version"]
        except (RunError, OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise CatalogueError(f"{folder}: no readable catalogue ({str(error).splitlines()[0]}): {mend}") from error
        if catalog.version != said:
            raise CatalogueError(
                f"{folder}: its content hashes to {catalog.version}, but it says version {said}: it was changed after writing; {mend}"
            )
        if version is not None and version != said:
            raise CatalogueError(
                f"{folder} holds catalogue {said}, but {version} is needed: use the one that the model was trained with, or train again"
            )
        return catalog


def _content_hash(item_ids: tuple[str, ...], codes_IL: Array, width: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {width} {codes_IL.shape}\n".encode())
    for item_id in item_ids:
        name = item_id.encode(errors="surrogatepass")
        digest.update(len(name).to_bytes(4, "little") + name)
    digest.update(np.ascontiguousarray(codes_IL, dtype="<i4").tobytes())
    return digest.hexdigest()[:16]


def _first_repeated(ids: tuple[str, ...]) -> str:
    seen: set[str] = set()
    for item_id in ids:
        if item_id in seen:
            return item_id
        seen.add(item_id)
    return ""
