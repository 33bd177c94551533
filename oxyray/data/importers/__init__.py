"""From what people have to canonical tables: `write(data, folder, quarantine)` for `data.source` of `files` (CSV or Parquet by a column
mapping, `columns.py`) and `amazon_reviews` (the published JSON lines, `amazon.py`).

Importers only translate: they stream, put rows that cannot be read into the quarantine, and leave all rules of the contract to `prepare`.
"""

from __future__ import annotations

from pathlib import Path

from oxyray.config import DataConfig
from oxyray.data.contract import Quarantine
from oxyray.data.importers import amazon, columns


def files(data: DataConfig) -> list[Path]:
    """The files that `write` would read. Raises DataError where there are none of a table that must be there."""
    return amazon.files(data) if data.source == "amazon_reviews" else [file for of in columns.files(data).values() for file in of]


def write(data: DataConfig, folder: Path, quarantine: Quarantine) -> None:
    """Write `items.parquet`, `events.parquet` and, where there are users, `users.parquet` into `folder`. Raises DataError."""
    folder.mkdir(parents=True)
    if data.source == "amazon_reviews":
        amazon.write(data, folder, quarantine)
    else:
        columns.write(data, folder, quarantine)
