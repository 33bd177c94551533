"""A shop of random behaviour with a catalogue of the paper's density, as canonical tables: for timing, there is nothing to learn in it.

Item vectors are given, and lie in as many clusters within clusters as there shall be pairs of first and second codes, some 18 items in
each (Table 2: 70% of the pairs and 0.15% of the triples are in use).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHILDREN = 17.6


def write(folder: Path, items: int, codes: int, users: int, events: int, seed: int) -> list[str]:
    """Write the tables, `events` a user, and give the words of the command line that read them."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    item_ids = np.array([f"i{n}" for n in range(items)])
    pq.write_table(pa.table({"item_id": item_ids, "title": ["an item"] * items}), folder / "items.parquet")
    rows = users * events
    table = {
        "user_id": np.repeat([f"u{n}" for n in range(users)], events),
        "item_id": item_ids[random.integers(0, items, rows)],
        "event_time": np.tile(np.arange(events) * 3600, users) + random.integers(0, 3600, rows),
        "action": random.choice(["click", "purchase"], rows),
        "scenario": ["home"] * rows,
    }
    pq.write_table(pa.table(table), folder / "events.parquet")
    pairs = int(items / CHILDREN)
    first_P, second_P = np.arange(pairs) % codes, random.integers(0, codes, pairs)
    near_CF, far_CF = (random.normal(size=(codes, 32)).astype(np.float32) for _ in range(2))
    pair_I = random.integers(0, pairs, items)
    vector_IF = 3 * far_CF[first_P[pair_I]] + near_CF[second_P[pair_I]] + 0.2 * random.normal(size=(items, 32)).astype(np.float32)
    (folder / "vectors").mkdir()
    pq.write_table(pa.table({"item_id": item_ids, "vector": list(vector_IF)}), folder / "vectors" / "part.parquet")
    return ["data=tables", f"data.path={folder}", "sid.vectors=given", f"sid.given={folder / 'vectors'}", f"sid.width={codes}"]
