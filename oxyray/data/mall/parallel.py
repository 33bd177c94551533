"""Blocks of users made on Ray, any number at a time; they come back in order, so the files do not depend on how many workers made them.

Ray that already runs is used; else one is started here for the time of the work. The world travels once, through the object store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from oxyray.data.mall.blocks import make_block, make_pagers
from oxyray.data.mall.simulate import blocks
from oxyray.data.mall.world import World
from oxyray.errors import ClusterError

TIMEOUT_S = 1800.0
"""How long one block may take at most; on one core a block of 4,096 users takes about 10 seconds."""


def blocks_on_ray(world: World, workers: int) -> Iterator[dict[str, pa.Table]]:
    """What `make_block` gives for each block, in order. Raises ClusterError where Ray does not start, a block fails or takes too long."""
    import ray

    with _ray(workers):
        shared = ray.put((world, make_pagers(world)))
        task = ray.remote(num_cpus=1, max_retries=2)(_make)
        number, sent = blocks(world), 0
        waiting: list[ray.ObjectRef] = []
        while waiting or sent < number:
            # Some blocks more than workers, so that none idles while a slow one holds the line; not all, so that memory stays bounded.
            while sent < number and len(waiting) < 2 * workers:
                waiting.append(task.remote(shared, sent))
                sent += 1
            try:
                yield ray.get(waiting.pop(0), timeout=TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                raise ClusterError(
                    f"a block of users took more than {TIMEOUT_S:.0f} s: is the machine overloaded? set data.mall.workers=1"
                ) from None
            except ray.exceptions.RayError as error:
                said = str(error).strip().splitlines()[-1]
                raise ClusterError(f"a block of users failed on Ray: {said}; data.mall.workers=1 does without Ray") from error


def _make(shared: tuple[World, list], block: int) -> dict[str, pa.Table]:
    return make_block(*shared, block)


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    import ray

    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        except Exception as error:  # Ray raises even plain `Exception` where a node does not come up in time
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterError(f"Ray did not start: {said}: see `oxyray doctor`, or set data.mall.workers=1 to do without Ray") from error
    try:
        yield
    finally:
        if mine:
            ray.shutdown()
