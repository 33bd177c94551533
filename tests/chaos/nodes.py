"""A Ray cluster on this machine whose second node comes and goes. Imports little: its classes are loaded by the processes of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from oxyray.cluster.fleet import Member
from oxyray.cluster.rows import here
from oxyray.cluster.start import _bring_token, ray_for
from oxyray.config import ClusterConfig


class Worker(Member):
    """A member that knows which version it was given."""

    version = -1

    def load(self, version: int) -> None:
        self.version = version

    def work(self) -> int:
        return self.version


class Place:
    """A cluster whose head always stays; `second` adds a node for the body."""

    def __init__(self, cluster: Any, cpus: int) -> None:
        self.cluster, self.cpus, self.node, self.held = cluster, cpus, None, None

    @contextmanager
    def second(self, cpus: int, left: int) -> Iterator[str]:
        """Gives its id. Of the head's CPUs only so many are left until `free`, so that what needs more must go to the second node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(here(), soft=False)
        hold: Any = ray.remote(Member).options(num_cpus=self.cpus - left, scheduling_strategy=strategy)
        self.held = hold.remote()
        ray.get(self.held.ping.remote(), timeout=120)
        self.node = self.cluster.add_node(num_cpus=cpus)
        try:
            yield self.node.node_id
        finally:
            self.free()
            self.lose()

    def free(self) -> None:
        import ray

        if self.held is not None:
            ray.kill(self.held)
        self.held = None

    def lose(self) -> None:
        """The node's daemon and all that it started are killed at once, as a machine that fails does it."""
        if self.node is not None:
            daemon = psutil.Process(self.node.all_processes["raylet"][0].process.pid)
            started = daemon.children(recursive=True)
            self.cluster.remove_node(self.node, allow_graceful=False)
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.node = None


@contextmanager
def cluster_of_one(cpus: int) -> Iterator[Place]:
    """A cluster whose head has so many CPUs, joined for the body."""
    from ray.cluster_utils import Cluster

    _bring_token()  # as `ray start --head` does: the driver will show it
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # else a lost node is believed in for 15 s
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False, "_system_config": soon})
    try:
        with ray_for(ClusterConfig(address=cluster.address, start_timeout_s=120), 1):
            yield Place(cluster, cpus)
    finally:
        cluster.shutdown()
