"""Processes that work in step, one rank each of a torch.distributed group: they are made, asked and ended together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from oxyray.cluster.wait import GroupLost, ProcessLost, answers, first_line, lost_among
from oxyray.errors import OxyrayError

_GRACE_S = 30.0  # Ray takes that long to believe that a node is gone


class Rank:
    """What an actor of a group extends."""

    def meet(self) -> tuple[str, str, int]:
        """This process's node, its address, and a port that is free there."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), int(free.getsockname()[1])

    def join(self, rank: int, world: int, local_rank: int, local_world: int, address: str, port: int, seconds: float) -> None:
        """Enter the process group: NCCL where the process has a GPU, else gloo. Waits for the others, `seconds` at most."""
        import datetime
        import os

        import torch

        if torch.cuda.is_available() and torch.cuda.device_count() == 1:
            local_rank, local_world = 0, 1  # Ray shows an actor its own device alone, whose number is 0
        told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world}
        os.environ.update({name: str(value) for name, value in told.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)})
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        limit = datetime.timedelta(seconds=seconds)
        torch.distributed.init_process_group(backend, rank=rank, world_size=world, timeout=limit)


class Group:
    """`make(rank)` gives the actor of a rank; they are of use once the group is formed. Every call is made on all ranks, and the first
    failure is raised: a lost rank as GroupLost, after which the group is of no use."""

    def __init__(self, make: Callable[[int], Any], world: int, seconds: float, name: str) -> None:
        self.name, self.seconds = name, seconds
        self.actors = [make(rank) for rank in range(world)]
        self.nodes: list[str] = []

    def form(self) -> None:
        """Let the ranks meet and join."""
        met = self.call("meet")
        self.nodes = [node for node, _, _ in met]
        places = [(self.nodes[:rank].count(node), self.nodes.count(node)) for rank, node in enumerate(self.nodes)]
        _, address, port = met[0]
        try:
            self.call("join", [(rank, len(met), *place, address, port, self.seconds) for rank, place in enumerate(places)])
        except OxyrayError:
            raise
        except Exception as error:  # the port may be taken by now: another try finds another
            raise GroupLost(f"{self.name}s: join ({first_line(error)})") from error

    def begin(self, method: str, each: Sequence[tuple[Any, ...]] | None = None, **arguments: Any) -> Callable[[], list[Any]]:
        """Call `method` on every rank, with arguments of its own from `each`; gives what waits for the answers."""
        sent = each or [()] * len(self.actors)
        refs = [getattr(actor, method).remote(*own, **arguments) for actor, own in zip(self.actors, sent, strict=True)]

        def wait() -> list[Any]:
            try:
                return answers(refs, self.seconds, f"{self.name}s: {method}")
            except ProcessLost as error:
                raise GroupLost(str(error)) from error
            except OxyrayError:
                raise
            except Exception as error:  # a rank whose neighbour died may tell of its broken connection before Ray tells of the death
                asked = [*refs, *(actor.meet.remote() for actor in self.actors)]  # who has answered may have died since
                lost = lost_among(asked, _GRACE_S, f"{self.name}s: {method}")
                if lost is not None:
                    raise GroupLost(str(lost)) from error
                raise

        return wait

    def call(self, method: str, each: Sequence[tuple[Any, ...]] | None = None, **arguments: Any) -> list[Any]:
        return self.begin(method, each, **arguments)()

    def stop(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
