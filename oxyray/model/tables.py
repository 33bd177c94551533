"""Embedding tables as plain tensors: what serving, rollouts and evaluation read, and the file form that training writes.

The policy never looks a row up: it is given the rows of `batch.lookups()`. In training they come from sharded tables
(`oxyray.train.sparse`), elsewhere from `PlainTables`, which needs nothing but torch. Choices: a row's first value depends on seed, table
name and row number alone, so it is the same for any number of shards; an id below 0 means "none" and gives a row of zeros; files are
safetensors, written block by block, so that a table larger than memory can be exported.

Legend: n ids, D row width.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from oxyray.errors import DataError, RunError

Tensor = torch.Tensor

BLOCK_ROWS = 8192
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table of `rows` x `dim`; first values are normal with deviation `init_std`."""

    name: str
    rows: int
    dim: int
    init_std: float = 0.05


def initial_rows(spec: TableSpec, seed: int, first: int, last: int) -> Tensor:
    """First values of rows `first : last`, float32 (last - first, D)."""
    blocks = []
    for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)):
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{spec.name}/{block}".encode()))
        rows_nD = torch.empty(BLOCK_ROWS, spec.dim).normal_(0, spec.init_std, generator=random)
        start = block * BLOCK_ROWS
        blocks.append(rows_nD[max(first - start, 0) : min(last - start, BLOCK_ROWS)])
    return torch.cat(blocks) if blocks else torch.empty(0, spec.dim)


def check_ids(name: str, ids_n: Tensor, rows: int) -> None:
    """Raises DataError where an id points behind the table's end."""
    if len(ids_n) and int(ids_n.max()) >= rows:
        raise DataError(
            f"table {name!r} has {rows} rows, and row {int(ids_n.max())} was asked for: the data and the model are not of the same run"
        )


class PlainTables:
    """Read-only tables in one process. `lookup` takes and gives dicts by table name."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.tables = {name: table.detach() for name, table in tables.items()}

    @classmethod
    def fresh(cls, specs: Iterable[TableSpec], seed: int) -> PlainTables:
        """Untrained tables: the first values that sharded training starts from."""
        return cls({spec.name: initial_rows(spec, seed, 0, spec.rows) for spec in specs})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> PlainTables:
        """Raises RunError when the file is missing or damaged."""
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                return cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            raise RunError(f"{path} is missing: run `oxyray pretrain` first") from None
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}): run `oxyray pretrain` with force=true") from error

    def save(self, path: str | Path) -> None:
        with TensorWriter(path, {name: (tuple(table.shape), table.dtype) for name, table in self.tables.items()}) as writer:
            for name, table in self.tables.items():
                writer.write(name, table)

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows (n, D) of each table for ids (n,); ids of a table that this model lacks are passed over. Raises DataError on an id behind
        the end."""
        found = {}
        for name, ids_n in ids.items():
            if name in self.tables:
                check_ids(name, ids_n, len(self.tables[name]))
                found[name] = take_rows(self.tables[name], ids_n)
        return found


def take_rows(rows_mD: Tensor, index_n: Tensor) -> Tensor:
    """`rows_mD[index_n]`, and zeros where the index is below 0."""
    if not len(rows_mD):
        return rows_mD.new_zeros(len(index_n), rows_mD.shape[1])
    taken_nD = rows_mD.index_select(0, index_n.clamp(min=0))
    return torch.where((index_n >= 0)[:, None], taken_nD, 0.0)


class TensorWriter:
    """Writes a safetensors file in pieces: each tensor's rows in order, tensors in the order of `shapes`. It is as large as it says, or an
    error."""

    def __init__(self, path: str | Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.path, self._left, begin, header = Path(path), {}, 0, {}
        for name, (shape, dtype) in shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, begin + size]}
            self._left[name] = size
            begin += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self.path, "wb")  # noqa: SIM115 - closed in __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorWriter:
        return self

    def write(self, name: str, values: Tensor) -> None:
        if next((key for key, left in self._left.items() if left), None) not in (name, None):
            raise RunError(f"{self.path}: {name!r} came out of order")
        # By way of bytes, so that any layout and device will do.
        data = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        self._left[name] -= len(data)
        self._file.write(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if error is None and any(self._left.values()):
            raise RunError(f"{self.path}: not all rows were written, {self._left} bytes are left")
