"""The published Amazon Reviews files (`data.source=amazon_reviews`): JSON lines, plain or gzip, of 2014, 2018 and 2023.

A review becomes an event with `data.default_action`; its rating is not used. Items are those that were reviewed: with the title,
categories, brand and price that the meta file gives, or bare where it has none (their id then stands for the title). Filtering to a k-core
is `data.core`, done by `prepare` for every source. Pictures are links in these files and are not fetched.

Forms: 2014 `reviewerID, asin, unixReviewTime` with meta lines in Python's notation (single quotes); 2018 the same fields in JSON, meta
prices as text; 2023 `user_id, parent_asin, timestamp` in milliseconds, meta keyed by `parent_asin`. The form is read from each line.
"""

from __future__ import annotations

import ast
import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oxyray.config import DataConfig
from oxyray.data.contract import Quarantine
from oxyray.data.importers.text import lines
from oxyray.data.tables import COLUMNS, TYPES, Chunk
from oxyray.errors import DataError

_ROWS = 65_536
_LONGEST = 2000
_PRICE = re.compile(r"^\$?\s*([0-9][0-9,]*\.?[0-9]*)$")
_TAG = re.compile(r"<[^>]{1,200}>")
_EVENT_SCHEMA = pa.schema([(c.name, TYPES[c.kind]) for c in COLUMNS["events"] if c.required])
_ITEM_FIELDS = ("item_id", "title", "description", "category_1", "category_2", "category_3", "brand", "price")
_ITEM_SCHEMA = pa.schema([(c.name, TYPES[c.kind]) for c in COLUMNS["items"] if c.name in _ITEM_FIELDS])


def files(data: DataConfig) -> list[Path]:
    """The file of reviews and the file of meta data."""
    root = Path(data.path or "").expanduser()
    reviews = _one(root, data.events_file, "events_file", "reviews", lambda name: not name.startswith("meta_"))
    return [reviews, _one(root, data.items_file, "items_file", "meta", lambda name: name.startswith("meta_"))]


def write(data: DataConfig, folder: Path, quarantine: Quarantine) -> None:
    """Write `events.parquet` and `items.parquet` into `folder`. Raises DataError."""
    reviews, meta = files(data)
    scenario = data.default_scenario or data.name
    reviewed: set[str] = set()
    with pq.ParquetWriter(folder / "events.parquet", _EVENT_SCHEMA) as writer:
        for batch in _batches(_reviews(reviews, data.default_action, scenario, quarantine), _EVENT_SCHEMA):
            reviewed.update(batch["item_id"].to_pylist())
            writer.write_table(batch)
    if not reviewed:
        raise DataError(
            f"{reviews}: no reviews in it; these files hold one JSON object a line with reviewerID and asin, or user_id and parent_asin"
        )
    left = set(reviewed)
    with pq.ParquetWriter(folder / "items.parquet", _ITEM_SCHEMA) as writer:
        for batch in _batches(_items(meta, left, quarantine), _ITEM_SCHEMA):
            writer.write_table(batch)
        bare = ({"item_id": item_id} for item_id in sorted(left))
        for batch in _batches(bare, _ITEM_SCHEMA):
            writer.write_table(batch)
    print(
        f"reviews from {reviews}, items from {meta}: {len(reviewed):,} reviewed items, {len(left):,} of them without meta data", flush=True
    )


def _one(root: Path, given: str | None, key: str, what: str, fits: Any) -> Path:
    """The one file of reviews or of meta data in `root`, by the published names."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.path to the folder of the Amazon Reviews files")
    if given is not None:
        if not (root / given).is_file():
            raise DataError(f"{root / given}: no such file; see data.{key}")
        return root / given
    endings = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
    found = sorted(path for path in root.iterdir() if path.name.endswith(endings) and fits(path.name))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise DataError(
            f"{root}: one {what} file is expected (*.json, *.jsonl, also .gz), found {len(found)} ({names}); set data.{key}=NAME"
        )
    return found[0]


def _reviews(file: Path, action: str, scenario: str, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    for record in _records(file, "events", ("reviewerID", "user_id"), quarantine):
        new = "parent_asin" in record or "user_id" in record
        yield {
            "user_id": _text(record.get("user_id" if new else "reviewerID")),
            "item_id": _text(record.get("parent_asin" if new else "asin")),
            "event_time": _seconds(record.get("timestamp"), 1000) if new else _seconds(record.get("unixReviewTime"), 1),
            "action": action,
            "scenario": scenario,
        }


def _items(file: Path, left: set[str], quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    """Items of `left`, each once; they are taken out of it."""
    for record in _records(file, "items", ("asin", "parent_asin"), quarantine):
        item_id = _text(record.get("parent_asin") or record.get("asin"))
        if item_id not in left:
            continue
        left.remove(item_id)
        path = _path(record)
        yield {
            "item_id": item_id,
            "title": _words(record.get("title")),
            "description": _words(record.get("description")) or _words(record.get("features") or record.get("feature")),
            "brand": _words(record.get("brand") or record.get("store")),
            "price": _price(record.get("price")),
            **{f"category_{level + 1}": name for level, name in enumerate(path[:3])},
        }


def _records(file: Path, table: str, keys: tuple[str, ...], quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    """The lines as objects that carry one of `keys`; others go to the quarantine."""
    reasons = ["line is not a JSON object", f"line has no {' or '.join(keys)}"]
    bad: list[tuple[int, int, str]] = []
    count = 0

    def put_aside() -> None:
        if bad:
            line_N, reason_N = np.array([line for line, _, _ in bad]), np.array([reason for _, reason, _ in bad])
            quarantine.take(f"{table}_import", Chunk(pa.table({"line": [text for _, _, text in bad]}), file, 0, line_N), reasons, reason_N)
            bad.clear()

    for number, line in lines(file, "importing"):
        count += 1
        record = _object(line)
        if record is not None and any(record.get(key) for key in keys):
            yield record
            continue
        bad.append((number, 1 if record is None else 2, line[:500].decode(errors="replace").strip()))
        if len(bad) == _ROWS:
            put_aside()
    put_aside()
    quarantine.check(f"{table}_import", count)


def _object(line: bytes) -> dict[str, Any] | None:
    """JSON, or Python's notation as the meta files of 2014 have it; None where it is neither. Nothing is executed."""
    try:
        value = json.loads(line.decode())
    except ValueError:
        try:
            value = ast.literal_eval(line.decode().strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _path(record: dict[str, Any]) -> list[str]:
    """The item's categories from the most general one down. 2014 gives several paths: the first one counts."""
    names = record.get("categories") or record.get("category") or []
    if names and isinstance(names[0], list):
        names = names[0]
    names = [name for value in (names if isinstance(names, list) else [names]) if (name := _words(value))]
    return names or [name for name in [_words(record.get("main_category") or record.get("main_cat"))] if name]


def _seconds(value: Any, per_second: int) -> int | None:
    return int(value // per_second) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _price(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    found = _PRICE.match(value.strip()) if isinstance(value, str) else None
    return float(found[1].replace(",", "")) if found else None


def _words(value: Any) -> str | None:
    """Text without markup; lists are joined."""
    if isinstance(value, list):
        value = " ".join(str(part) for part in value)
    if not isinstance(value, str):
        return None
    return " ".join(_TAG.sub(" ", html.unescape(_sound(value[: 2 * _LONGEST]))).split())[:_LONGEST] or None


def _text(value: Any) -> str | None:
    return _sound(str(value)) if value not in (None, "") else None


def _sound(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _batches(records: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    batch: list[dict[str, Any]] = []
    for record in records:
        batch.append(record)
        if len(batch) == _ROWS:
            yield pa.Table.from_pylist(batch, schema=schema)
            batch = []
    if batch:
        yield pa.Table.from_pylist(batch, schema=schema)
