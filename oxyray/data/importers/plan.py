"""Which column of a file is which canonical one, how its cells are read, and how that is shown to a person before the import goes on.

In this order: what `data.TABLE_columns` says, a column of the same name (upper or lower case), one of the usual other names below. Where
action or scenario is missing, in the whole file or in a row, `data.default_action` and `data.default_scenario` (else `data.name`) stand.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from oxyray.config import DataConfig
from oxyray.data import tables
from oxyray.data.importers import values
from oxyray.data.tables import ACTIONS, COLUMNS, TYPES, Column
from oxyray.errors import ConfigError, DataError

_OTHER_NAMES = {
    "user_id": ("userid", "user", "customer_id", "customerid", "visitorid", "visitor_id", "uid", "reviewerid"),
    "item_id": ("itemid", "item", "product_id", "productid", "product", "sku", "stockcode", "asin", "parent_asin", "iid"),
    "event_time": ("timestamp", "time", "datetime", "date", "ts", "created_at", "invoicedate"),
    "action": ("event", "event_type", "action_type", "behavior", "behaviour", "behavior_type"),
    "scenario": ("channel", "page", "placement"),
    "request_id": ("order_id", "invoiceno", "invoice"),
    "trigger_item_id": ("trigger",),
    "query": ("search_query", "keyword", "keywords"),
    "quantity": ("qty",),
    "price": ("unit_price", "unitprice"),
    "title": ("name", "product_name", "item_name", "product_title"),
    "category_1": ("category", "main_category"),
    "brand": ("brand_name", "manufacturer"),
}
_ACTION_WORDS = {
    "click": ("view", "pv", "detail", "clk"),
    "cart": ("addtocart", "add_to_cart", "add"),
    "purchase": ("buy", "order", "transaction", "sale"),
}


@dataclass
class Plan:
    """`source`: canonical column to the file's column; `defaults`: what stands for empty cells, and `constants` for the columns that none
    feeds; `words`: the file's words for actions; `scale`: how its times are written (see `values.time_scale`)."""

    table: str
    source: dict[str, str]
    columns: list[Column]
    defaults: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    scale: str = "seconds"

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(column.name, TYPES[column.kind]) for column in self.columns])


def make_plan(data: DataConfig, table: str, file: Path, header: list[str], rows: pa.Table) -> Plan:
    """The plan for `file`, from its header and first rows. Raises DataError or ConfigError naming the column that has no match."""
    given: dict[str, str] = getattr(data, f"{table}_columns", {})
    source = _given(table, given, file, header)
    by_name = {name.lower(): name for name in header}
    for column in COLUMNS[table]:
        for name in (column.name, *_OTHER_NAMES.get(column.name, ())):
            if column.name not in source and name in by_name and by_name[name] not in source.values():
                source[column.name] = by_name[name]
    columns = [column for column in COLUMNS[table] if column.name in source or column.required]
    plan = Plan(table, source, columns, words=_words(data))
    if table == "events":
        plan.defaults = {"action": data.default_action, "scenario": data.default_scenario or data.name}
    for column in columns:
        if column.name not in source and column.name in plan.defaults:
            plan.constants[column.name] = plan.defaults[column.name]
        elif column.name not in source:
            have, key = ", ".join(header), f"{table}_columns"
            mend = f"set data.{key}.{column.name}=COLUMN" if hasattr(data, key) else "it has to bear that name"
            raise DataError(f"{file} line 1: no column for {column.name} (the file has: {have}); {mend}")
    if table == "users":
        kinds = {name: _profile_kind(rows[source.get(name, name)]) for name in [*source, *header] if name != "user_id"}
        source |= {name: name for name in header if name not in source.values() and kinds[name]}
        columns += [Column(name, kind) for name in source if (kind := kinds.get(name))]
    if "event_time" in source:
        plan.scale = _scale(data, rows[source["event_time"]])
    return plan


def shown(plan: Plan, file: Path, header: list[str], rows: pa.Table) -> str:
    """The plan as a small table: canonical column, the file's column, how it is read, the first value."""
    lines = [("column", "from", "read as", "first value")]
    for column in plan.columns:
        if column.name in plan.constants:
            lines.append((column.name, "(constant)", "text", plan.constants[column.name]))
            continue
        cells = rows[plan.source[column.name]]
        first = next((str(value) for value in cells.slice(0, 1000).to_pylist() if value not in (None, "")), "")
        kind = values.EXPECTED.get(column.kind, column.kind).split(" ", 1)[-1] if column.kind in ("whole", "number") else column.kind
        if column.kind == "time":
            kind = {"ISO": "ISO time", "position": "position"}.get(plan.scale, f"epoch {plan.scale}")
        lines.append((column.name, plan.source[column.name], kind, first[:50]))
    wide = [max(len(line[place]) for line in lines) for place in range(3)]
    unused = [name for name in header if name not in plan.source.values()]
    text = [f"{plan.table} from {file}"]
    text += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, wide, strict=False)) + "  " + line[3] for line in lines]
    return "\n".join(text + ([f"  not used: {', '.join(unused)}"] if unused else []))


def _given(table: str, given: dict[str, str], file: Path, header: list[str]) -> dict[str, str]:
    known = [column.name for column in COLUMNS[table]]
    for canonical, name in given.items():
        if canonical not in known and table != "users":
            raise ConfigError(f"data.{table}_columns.{canonical}: no such canonical column; known are {', '.join(known)}")
        if name not in header:
            near = difflib.get_close_matches(name, header, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the file has: {', '.join(header)}"
            raise DataError(f"{file} line 1: no column {name!r} ({hint}); see data.{table}_columns.{canonical}")
    return dict(given)


def _words(data: DataConfig) -> dict[str, str]:
    """The file's word for an action (lower case) to the canonical one."""
    for word, action in [*data.action_names.items(), ("", data.default_action)]:
        if action not in ACTIONS:
            key = f"data.action_names.{word}" if word else "data.default_action"
            raise ConfigError(f"{key}: must be one of {', '.join(ACTIONS)}, got {action!r}")
    usual = {word: action for action, others in _ACTION_WORDS.items() for word in (action, *others)}
    return usual | {word.lower(): action for word, action in data.action_names.items()}


def plain(column: pa.ChunkedArray) -> pa.Array:
    """Without a dictionary, and with true and false as words."""
    array = column.combine_chunks()
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    return array.cast(pa.large_string()) if pa.types.is_boolean(array.type) else array


def _profile_kind(column: pa.ChunkedArray) -> str | None:
    """None for what cannot be a feature: dates, lists."""
    cells = plain(column)
    if tables.is_text(cells.type):
        return "text" if values.parse(cells.cast(pa.large_string()), "number")[1].any() else "number"
    return next((kind for kind in ("number", "text") if tables.fits(cells.type, kind)), None)


def _scale(data: DataConfig, column: pa.ChunkedArray) -> str:
    cells = plain(column)
    if data.time_unit == "position":
        return "position"
    if pa.types.is_floating(cells.type):
        cells = values.rounded_down(cells)
    return values.time_scale(cells) if tables.is_text(cells.type) or pa.types.is_integer(cells.type) else "seconds"
