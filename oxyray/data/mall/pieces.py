"""The shop in numbered pieces that are made, sent around and written one by one: blocks of users, chunks of items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from oxyray.data.mall import tables
from oxyray.data.mall.simulate import live
from oxyray.data.mall.slates import Pager
from oxyray.data.mall.world import World

ITEMS_PER_CHUNK = 16_384


@dataclass(frozen=True)
class Shared:
    """What every piece is made from. Scenarios with the same pool share a pager."""

    world: World
    pagers: list[Pager]

    @staticmethod
    def make(world: World) -> Shared:
        rng = np.random.default_rng([world.seed, 5])
        found: dict[bytes, Pager] = {}
        keys = [np.packbits(pool_I).tobytes() for pool_I in world.pool_CI]
        for key, pool_I in zip(keys, world.pool_CI, strict=True):
            if key not in found:
                found[key] = Pager.make(world.catalogue, pool_I, rng)
        return Shared(world, [found[key] for key in keys])


def make_items(shared: Shared, chunk: int) -> pa.Table:
    """Rows of `items.parquet`, in order of `item_id`."""
    order_I = np.argsort(shared.world.catalogue.public_I)
    return tables.items_table(shared.world.catalogue, order_I[chunk * ITEMS_PER_CHUNK : (chunk + 1) * ITEMS_PER_CHUNK])


def make_users(shared: Shared, block: int) -> dict[str, pa.Table]:
    """Everything that one block of users adds to the shop's files."""
    world = shared.world
    users, requests = live(world, block)
    made = tables.log_tables(world, shared.pagers, requests, block)
    return {"users": tables.users_table(world, users, block), "hidden": tables.hidden_users_table(world, users, block), **made}
