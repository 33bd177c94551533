"""Small shops as Parquet tables for the data tests, and a run of `prepare` over them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oxyray.config import Config, DataConfig
from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.run import Run

ITEMS = [{"item_id": f"i{n}", "title": f"thing number {n}", "brand": f"b{n % 2}", "price": 1.5 * n} for n in range(6)]


def event(
    user: str | None, item: str | None, time: int | None, action: str | None = "click", scenario: str | None = "home", **more: Any
) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "event_time": time, "action": action, "scenario": scenario, **more}


EVENTS = [event(f"u{u}", f"i{(u + n) % 6}", 1000 + 10 * n + u) for u in range(4) for n in range(6)]


def write(folder: Path, events: Any = None, items: Any = None, **others: Any) -> Path:
    """Tables from lists of dictionaries (columns: all keys that occur) or from pyarrow tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"events": EVENTS if events is None else events, "items": ITEMS if items is None else items, **others}.items():
        pq.write_table(rows if isinstance(rows, pa.Table) else table(rows), folder / f"{name}.parquet")
    return folder


def folder() -> TemporaryDirectory[str]:
    """A temporary folder in memory where there is such a place: hundreds of examples would else wait for the disk."""
    return TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def config(path: Path, run: Path, **data: Any) -> Config:
    return Config(
        run_dir=str(run), data=DataConfig(**{"name": "toy", "source": "tables", "path": str(path), "split": "leave_one_out", **data})
    )


def run(path: Path, run_dir: Path, **data: Any) -> Prepared:
    """Prepare the tables of `path` into `run_dir`."""
    prepare(config(path, run_dir, **data), Run(run_dir))
    return Prepared.load(run_dir / "data")


def rows_of(prepared: Prepared) -> list[dict[str, Any]]:
    """All prepared events, part after part, with ids instead of numbers."""
    items, users = prepared.items["item_id"].to_pylist(), prepared.users["user_id"].to_pylist()
    rows = []
    for part in range(prepared.parts):
        columns = prepared.events(part)
        for n in range(len(columns["user"])):
            row = {name: values[n] for name, values in columns.items()}
            row |= {
                "user": users[row["user"]],
                "item": items[row["item"]],
                "trigger": items[row["trigger"]] if row["trigger"] >= 0 else None,
            }
            row |= {"action": prepared.meta.actions[row["action"]], "scenario": prepared.meta.scenarios[row["scenario"]]}
            rows.append(row)
    return rows


def digest(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its content's hash."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}
