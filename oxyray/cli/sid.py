"""`oxyray sid encode|lookup` and `oxyray sid --report`: what a run's semantic IDs are, with the run's own configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oxyray.errors import ConfigError, DataError
from oxyray.files import whole
from oxyray.run import Run

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

VERBS = {
    "encode": "items=FILE [out=FILE.parquet]: the SIDs of new items, and how far they have drifted from the codebook",
    "lookup": "item=ID,ID or code=12-3-200 or code=12: SIDs of items, items of a SID or of its first codes",
}
_SHOWN = 50


def ask(verb: str, asked: dict[str, str], run: Run) -> None:
    """Carry out and print. Raises ConfigError on missing or unknown words, DataError on a file that cannot be read."""
    known = {"encode": ("items", "out"), "lookup": ("item", "code")}[verb]
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"{unknown[0]}: `oxyray sid {verb}` takes {' and '.join(known)}, and run_dir or data")
    if verb == "encode":
        if "items" not in asked:
            raise ConfigError("items: must be given: oxyray sid encode items=FILE (Parquet or CSV with item_id, title, …)")
        encode(run, Path(asked["items"]).expanduser(), Path(asked["out"]).expanduser() if "out" in asked else None)
    elif len(asked) != 1:
        raise ConfigError("item or code: one of them must be given: oxyray sid lookup item=ID,ID or code=12-3-200")
    else:
        lookup(run, asked)


def encode(run: Run, file: Path, out: Path | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from oxyray.data.tables import titled
    from oxyray.sid.encoder import TEXT_COLUMNS
    from oxyray.sid.tokenizer import ENOUGH, Tokenizer

    items, tokenizer = read_items(file), Tokenizer.load(run.folder)
    if tokenizer.reads_texts and not set(TEXT_COLUMNS) & set(items.column_names):
        raise DataError(f"items={file}: no text to read: it needs one or more of the columns {', '.join(TEXT_COLUMNS)}")
    items = titled(items)
    encoded = tokenizer.encode(items)
    ids = items["item_id"].to_pylist()
    titles = items["title"].to_pylist()
    _show(ids, encoded.codes_NL, titles)
    print(encoded.drift or f"drift: not known, as fewer than {ENOUGH} items were held out when these semantic IDs were made (sid.held_out)")
    if out is not None:
        codes = {f"code_{level + 1}": encoded.codes_NL[:, level] for level in range(encoded.codes_NL.shape[1])}
        with whole(out) as part:
            pq.write_table(pa.table({"item_id": ids} | codes), part)
        print(f"written: {out}")


def lookup(run: Run, asked: dict[str, str]) -> None:
    import pyarrow as pa

    from oxyray.data.prepared import Prepared
    from oxyray.sid.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run.folder)
    if "item" in asked:
        ids = [name.strip() for name in asked["item"].split(",")]
    else:
        try:
            codes = [int(code) for code in asked["code"].split("-")]
        except ValueError:
            raise ConfigError(f"code={asked['code']}: expected codes with dashes between them, as 12-3-200") from None
        ids = tokenizer.items(codes)
    table = Prepared.load(run.need("data", stage="prepare")).item_columns("title")
    rows = tokenizer.catalog.rows(ids)
    titles = table["title"].take(pa.array(rows)).to_pylist() if table.column_names else [""] * len(ids)
    _show(ids, tokenizer.sids(ids), titles)
    if not ids:
        print(f"no item has a SID that begins with {asked['code']}")


def read_items(file: Path) -> pa.Table:
    """Canonical item columns from Parquet or CSV. Raises DataError where that cannot be read or has no item_id."""
    import pyarrow as pa
    import pyarrow.csv as pc_csv
    import pyarrow.parquet as pq

    from oxyray.sid.encoder import TEXT_COLUMNS

    try:
        words = pc_csv.ConvertOptions(column_types=dict.fromkeys(("item_id", *TEXT_COLUMNS), pa.string()))  # 0012345 is no number
        table = pc_csv.read_csv(file, convert_options=words) if file.suffix.lower() == ".csv" else pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"items={file}: cannot be read ({str(error).splitlines()[0]})") from None
    if "item_id" not in table.column_names:
        raise DataError(f"items={file}: no column item_id; it has {', '.join(table.column_names)}")
    for name in ("item_id", *TEXT_COLUMNS):
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.large_string()))
    return table


def _show(ids: Sequence[str], codes_NL: np.ndarray, titles: Sequence[str | None]) -> None:
    names = ["-".join(map(str, codes)) for codes in codes_NL[:_SHOWN].tolist()]
    for item_id, name, title in zip(ids, names, titles, strict=False):
        print(f"{item_id:<14} {name:<16} {(title or '')[:80]}".rstrip())
    if len(ids) > _SHOWN:
        print(f"… and {len(ids) - _SHOWN:,} more")
