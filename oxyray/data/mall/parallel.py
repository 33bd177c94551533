"""Numbered pieces of the shop made on Ray, as many at a time as there are workers; they come back in order, so the files do not depend on
how many made them.

Where Ray runs is the cluster configuration's business. What all pieces need travels once, through the object store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from oxyray.cluster.start import ray_for
from oxyray.config import ClusterConfig
from oxyray.errors import ClusterError

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""How long one piece may take at most; on one core a block of 4,096 users takes about 10 seconds."""

_WITHOUT = "data.mall.workers=1"


class InOrder(Protocol):
    def __call__(self, make: Callable[[Any, int], T], count: int) -> Iterator[T]:
        """`make(shared, number)` for each number below `count`, in order."""


@contextmanager
def on_ray(shared: Any, workers: int, cluster: ClusterConfig) -> Iterator[InOrder]:
    """Ray for the body, `shared` in its object store. Raises ClusterError where Ray does not start, a piece fails or takes too long."""
    import ray

    with ray_for(cluster, workers, otherwise=_WITHOUT):
        reference = ray.put(shared)

        def in_order(make: Callable[[Any, int], T], count: int) -> Iterator[T]:
            task = ray.remote(num_cpus=1, max_retries=2)(make)
            waiting: deque[ray.ObjectRef] = deque()
            running: list[ray.ObjectRef] = []
            sent = 0
            while waiting or sent < count:
                running = _unfinished(running)
                # Some pieces more than workers, so that none idles while a slow one holds the line; not all, so that memory stays bounded.
                while sent < count and len(running) < workers and len(waiting) < 2 * workers:
                    waiting.append(task.remote(reference, sent))
                    running.append(waiting[-1])
                    sent += 1
                if waiting[0] in running:
                    _one_of(running)
                else:
                    yield _get(waiting.popleft())

        yield in_order


def _unfinished(running: list[Any]) -> list[Any]:
    import ray

    return list(ray.wait(running, num_returns=len(running), timeout=0, fetch_local=False)[1]) if running else []


def _one_of(running: list[Any]) -> None:
    """Wait until one has ended."""
    import ray

    if not ray.wait(running, timeout=TIMEOUT_S, fetch_local=False)[0]:
        raise ClusterError(f"a piece of the shop took more than {TIMEOUT_S:.0f} s: is the machine overloaded? {_WITHOUT} does without Ray")


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"a piece of the shop did not arrive within {TIMEOUT_S:.0f} s: {_WITHOUT} does without Ray") from None
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[-1]
        raise ClusterError(f"a piece of the shop failed on Ray: {said}; {_WITHOUT} does without Ray") from error
