"""The embedded shop: a seeded simulator whose choice probabilities are known, so that every result has a computable optimum beside it.

`write(config, folder)` writes a shop's canonical tables and its truth. How the shop works is told in `docs/mall.md`; the parts are:
what is sold (`goods`, `catalogue`, `texts`, `pictures`), when and to whom (`calendar`, `people`, `visits`), why (`memory`, `utility`),
how it is logged (`simulate`, `queries`, `slates`, `tables`), and what could best be done (`belief`, `optimum`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oxyray.config import ClusterConfig, MallConfig
from oxyray.data.mall import tables
from oxyray.data.mall.parallel import InOrder, on_ray
from oxyray.data.mall.pieces import ITEMS_PER_CHUNK, Shared, make_items, make_users
from oxyray.data.mall.simulate import blocks
from oxyray.data.mall.weights import Weights
from oxyray.data.mall.world import SCENARIOS, SIZES, World
from oxyray.files import whole, write_json
from oxyray.progress import bar

__all__ = ["SCENARIOS", "SIZES", "World", "write"]

_FILES = {"users": "users", "hidden": "truth/users", "events": "events", "requests": "truth/requests", "exposures": "exposures"}


def write(config: MallConfig, folder: Path, cluster: ClusterConfig | None = None) -> None:
    """Write the shop as `folder`, whole or not at all: items, users, events, exposures, pools, complements, calendar, and `truth/`.

    The same configuration gives the same bytes on any number of workers; several are Ray's, on `cluster`. Raises ConfigError where the
    sizes cannot make a shop, ClusterError where workers were asked for and Ray fails.
    """
    world = World.make(config)
    with whole(Path(folder)) as part:
        (part / "truth").mkdir(parents=True)
        pq.write_table(tables.pools_table(world), part / "pools.parquet")
        pq.write_table(tables.complements_table(world), part / "complements.parquet")
        pq.write_table(tables.calendar_table(world.calendar), part / "calendar.parquet")
        with _in_order(Shared.make(world), config.workers, cluster or ClusterConfig()) as in_order:
            _write_items(world, in_order, part)
            _write_users(world, in_order, part)
        about = {"mall": dataclasses.asdict(config) | {"workers": 1}, "version": world.version(), "weights": _plain(world.weights)}
        write_json(part / "truth" / "shop.json", about)


@contextmanager
def _in_order(shared: Shared, workers: int, cluster: ClusterConfig) -> Iterator[InOrder]:
    if workers > 1 and blocks(shared.world) > 1:
        with on_ray(shared, workers, cluster) as in_order:
            yield in_order
    else:

        def here(make: Callable[[Any, int], Any], count: int) -> Iterator[Any]:
            return (make(shared, number) for number in range(count))

        yield here


def _write_items(world: World, in_order: InOrder, folder: Path) -> None:
    with _Writers(folder) as writers, bar(world.size.items, "stocking the shop", "item") as shown:
        for rows in in_order(make_items, -(-world.size.items // ITEMS_PER_CHUNK)):
            writers.add("items", rows)
            shown.update(rows.num_rows)


def _write_users(world: World, in_order: InOrder, folder: Path) -> None:
    with _Writers(folder) as writers, bar(world.size.users, "simulating the shop", "user") as shown:
        for made in in_order(make_users, blocks(world)):
            for name, file in _FILES.items():
                writers.add(file, made[name])
            shown.update(made["users"].num_rows)


def _plain(weights: Weights) -> dict[str, float | list[float]]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(weights).items()}


class _Writers:
    """Parquet files that grow by a row group with each piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> _Writers:
        return self

    def add(self, file: str, rows: pa.Table) -> None:
        if file not in self.open:
            self.open[file] = pq.ParquetWriter(self.folder / f"{file}.parquet", rows.schema)
        self.open[file].write_table(rows)

    def __exit__(self, *raised: object) -> None:
        for writer in self.open.values():
            writer.close()
