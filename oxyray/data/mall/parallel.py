"""Numbered pieces of the shop made on Ray, any number at a time; they come back in order, so the files do not depend on how many workers
made them.

Ray that already runs is used; else one is started here for the time of the work. What all pieces need travels once, through the object
store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from oxyray.errors import ClusterError

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""How long one piece may take at most; on one core a block of 4,096 users takes about 10 seconds."""


class InOrder(Protocol):
    def __call__(self, make: Callable[[Any, int], T], count: int) -> Iterator[T]:
        """`make(shared, number)` for each number below `count`, in order."""


@contextmanager
def on_ray(shared: Any, workers: int) -> Iterator[InOrder]:
    """Ray for the body, `shared` in its object store. Raises ClusterError where Ray does not start, a piece fails or takes too long."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        except Exception as error:  # Ray raises even plain `Exception` where a node does not come up in time
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterError(f"Ray did not start: {said}: see `oxyray doctor`, or set data.mall.workers=1 to do without Ray") from error
    try:
        reference = ray.put(shared)

        def in_order(make: Callable[[Any, int], T], count: int) -> Iterator[T]:
            task = ray.remote(num_cpus=1, max_retries=2)(make)
            waiting: list[ray.ObjectRef] = []
            sent = 0
            while waiting or sent < count:
                # Some pieces more than workers, so that none idles while a slow one holds the line; not all, so that memory stays bounded.
                while sent < count and len(waiting) < 2 * workers:
                    waiting.append(task.remote(reference, sent))
                    sent += 1
                yield _get(waiting.pop(0))

        yield in_order
    finally:
        if mine:
            ray.shutdown()


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        mend = "is the machine overloaded? data.mall.workers=1 does without Ray"
        raise ClusterError(f"a piece of the shop took more than {TIMEOUT_S:.0f} s: {mend}") from None
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[-1]
        raise ClusterError(f"a piece of the shop failed on Ray: {said}; data.mall.workers=1 does without Ray") from error
