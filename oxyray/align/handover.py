"""How the learners' dense weights reach the rollout workers, under one version with the tables: through Ray's object store, one copy a
node, or in one collective from the first learner.

Either way a worker that comes later gets them before it serves.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

from oxyray.cluster.channel import ChannelLost, Seat
from oxyray.cluster.fleet import Fleet
from oxyray.cluster.group import Group
from oxyray.cluster.rows import Servers

_LIMIT_S = 60.0  # for a collective; Ray's own way is there when it fails


class HandOver(Protocol):
    def __call__(self, version: int, learners: Group, rollouts: Fleet, tables: str, servers: Servers) -> None:
        """Have the learners publish `version`, tables and dense weights, and every rollout worker take it over. Nobody generates
        meanwhile."""


def through_the_store(version: int, learners: Group, rollouts: Fleet, tables: str, servers: Servers) -> None:
    import ray

    weights = learners.call("publish", version=version)[0]
    rollouts.enrol("load", version=version, weights=ray.put(weights), folder=tables, servers=servers)


class Broadcast:
    """One channel from the first learner to the rollout workers that there are, opened anew when somebody was replaced. Where it breaks,
    and by workers that come later, the first learner is asked for what it published; by all of them, once it broke twice in a row."""

    def __init__(self, timeout_s: float) -> None:
        self.seconds = min(timeout_s, _LIMIT_S)
        self._opened: tuple[Any, ...] = ()
        self._seats: list[Seat] = []
        self._broke = 0

    def __call__(self, version: int, learners: Group, rollouts: Fleet, tables: str, servers: Servers) -> None:
        expected = learners.call("publish", version=version, keep=True)[0]
        common = {"version": version, "folder": tables, "servers": servers}
        later = {"learner": learners.actors[0], **common}
        members = self._seated(learners, rollouts) if self._broke < 2 else []
        if members:
            nobody = [(None,)] * (len(learners.actors) - 1)
            sent = learners.begin("send", [(self._seats[0],), *nobody])
            each = {member: {"seat": seat, "expected": expected, **common} for member, seat in zip(members, self._seats[1:], strict=True)}
            lost: ChannelLost | None = None
            try:
                rollouts.enrol("fetch", at_once=("receive", each), **later)
            except ChannelLost as error:
                lost = error
            except BaseException:
                with suppress(Exception):  # the sender gives up by itself; what ended the rollout workers' part is to be told
                    sent()
                raise
            try:
                sent()
            except ChannelLost as error:
                lost = lost or error
            if lost is None:
                self._broke = 0
                return
            self._opened, self._broke = (), self._broke + 1
            ever = " from now on" if self._broke == 2 else ""
            print(f"publication of version {version}: {lost}: the rollout workers ask the first learner{ever}", flush=True)
        rollouts.enrol("fetch", **later)

    def _seated(self, learners: Group, rollouts: Fleet) -> list[int]:
        """The rollout workers that have a seat: the same as before, where everybody is who he was."""
        if self._opened == (learners, rollouts.restarts, *rollouts.healthy()):
            return rollouts.healthy()
        rollouts.enrol("ready")  # whatever takes its time first: the sender does not wait for long
        members, (_, address, port) = rollouts.healthy(), learners.call("meet")[0]
        self._seats = [Seat(address, port, rank, 1 + len(members), self.seconds) for rank in range(1 + len(members))]
        self._opened = (learners, rollouts.restarts, *members)
        return members
