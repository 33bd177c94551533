"""The embedded shop: a seeded simulator whose choice probabilities are known, so that every result has a computable optimum beside it.

`write(config, folder)` writes a shop's canonical tables and its truth. How the shop works is told in `docs/mall.md`; the parts are:
what is sold (`goods`, `catalogue`, `texts`, `pictures`), when and to whom (`calendar`, `people`, `visits`), why (`memory`, `utility`),
how it is logged (`simulate`, `queries`, `slates`, `tables`), and what could best be done (`belief`, `optimum`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oxyray.config import MallConfig
from oxyray.data.mall import tables
from oxyray.data.mall.blocks import make_block, make_pagers
from oxyray.data.mall.simulate import blocks
from oxyray.data.mall.weights import Weights
from oxyray.data.mall.world import SCENARIOS, SIZES, World
from oxyray.files import write_json
from oxyray.progress import bar

__all__ = ["SCENARIOS", "SIZES", "World", "write"]

_ITEM_ROWS = 16_384


def write(config: MallConfig, folder: Path) -> None:
    """Write the shop into `folder`: items, users, events, exposures, pools, complements, calendar, and `truth/`.

    The same size and seed give the same bytes on any number of workers. Raises ConfigError where the sizes cannot make a shop.
    """
    world = World.make(config)
    folder = Path(folder)
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    pq.write_table(tables.pools_table(world), folder / "pools.parquet")
    pq.write_table(tables.complements_table(world), folder / "complements.parquet")
    pq.write_table(tables.calendar_table(world.calendar), folder / "calendar.parquet")
    _write_items(world, folder / "items.parquet")
    with _Writers(folder) as writers, bar(world.size.users, "simulating the shop", "user") as shown:
        for made in _blocks(world, config.workers):
            writers.add(made)
            shown.update(made["users"].num_rows)
    about = {"mall": dataclasses.asdict(config) | {"workers": 1}, "version": world.version(), "weights": _plain(world.weights)}
    write_json(folder / "truth" / "shop.json", about)


def _blocks(world: World, workers: int) -> Iterator[dict[str, pa.Table]]:
    if workers > 1 and blocks(world) > 1:
        from oxyray.data.mall.parallel import blocks_on_ray

        yield from blocks_on_ray(world, workers)
        return
    pagers = make_pagers(world)
    for block in range(blocks(world)):
        yield make_block(world, pagers, block)


def _write_items(world: World, path: Path) -> None:
    writer = None
    order = np.argsort(world.catalogue.public_I)
    for first in range(0, len(order), _ITEM_ROWS):
        rows = tables.items_table(world.catalogue, order[first : first + _ITEM_ROWS])
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    if writer:
        writer.close()


def _plain(weights: Weights) -> dict[str, float | list[float]]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(weights).items()}


_FILES = {"users": "users", "hidden": "truth/users", "events": "events", "requests": "truth/requests", "exposures": "exposures"}


class _Writers:
    """One Parquet file per table, one row group per block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> _Writers:
        return self

    def add(self, made: dict[str, pa.Table]) -> None:
        for name, file in _FILES.items():
            if name not in self.open:
                self.open[name] = pq.ParquetWriter(self.folder / f"{file}.parquet", made[name].schema)
            self.open[name].write_table(made[name])

    def __exit__(self, *raised: object) -> None:
        for writer in self.open.values():
            writer.close()
