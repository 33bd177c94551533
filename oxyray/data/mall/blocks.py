"""One block of users as tables: the unit that is simulated, sent around and written."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from oxyray.data.mall import tables
from oxyray.data.mall.simulate import live
from oxyray.data.mall.slates import Pager
from oxyray.data.mall.world import World


def make_block(world: World, pagers: list[Pager], block: int) -> dict[str, pa.Table]:
    """Everything that one block of users adds to the shop's files."""
    users, requests = live(world, block)
    made = tables.log_tables(world, pagers, requests, block)
    return {"users": tables.users_table(world, users, block), "hidden": tables.hidden_users_table(world, users, block), **made}


def make_pagers(world: World) -> list[Pager]:
    """One for each scenario; scenarios with the same pool share theirs."""
    rng = np.random.default_rng([world.seed, 5])
    found: dict[bytes, Pager] = {}
    for pool_I in world.pool_CI:
        key = np.packbits(pool_I).tobytes()
        if key not in found:
            found[key] = Pager.make(world.catalogue, pool_I, rng)
    return [found[np.packbits(pool_I).tobytes()] for pool_I in world.pool_CI]
