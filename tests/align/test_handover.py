"""Handing dense weights over on a real Ray: in one collective, by asking where it breaks, and to who comes later."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oxyray.align.handover import Broadcast
from oxyray.cluster.channel import Channel, Form, Seat, forms
from oxyray.cluster.fleet import Fleet, Member
from oxyray.cluster.group import Group, Rank
from oxyray.cluster.wait import answers

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]


class Sender(Rank):
    """Publishes arrays of its version."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.asked, self.opened = 0, 0

    def publish(self, version: int, keep: bool) -> list[Form]:
        assert keep
        self.kept = {"a": np.full((3, 2), version, np.float32), "b": np.array(version)}
        return forms(self.kept)

    def send(self, seat: Seat | None) -> None:
        if seat is None:
            return
        if self.channel is None or self.channel.seat != seat:
            self.channel, self.opened = Channel(seat), self.opened + 1
        self.channel.send(self.kept)

    def weights(self, version: int) -> dict[str, np.ndarray]:
        self.asked += 1
        return self.kept

    def counts(self) -> tuple[int, int]:
        return self.asked, self.opened


class Receiver(Member):
    def __init__(self, mark: str) -> None:
        self.mark = Path(mark)
        self.channel: Channel | None = None
        self.has = -1.0

    def ready(self) -> None:
        """Nothing to read."""

    def receive(self, version: int, seat: Seat, expected: list[Form], folder: str, servers: list[Any]) -> None:
        if self.channel is None or self.channel.seat != seat:
            self.channel = Channel(seat)
        if seat.rank == 2 and version == 1 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        found = self.channel.receive(expected)
        assert found["a"].shape == (3, 2)
        self.has = float(found["a"].mean() + found["b"]) / 2

    def fetch(self, version: int, learner: Any, folder: str, servers: list[Any]) -> None:
        [found] = answers([learner.weights.remote(version)], 30, "weights")
        self.has = float(found["a"].mean() + found["b"]) / 2

    def tell(self) -> float:
        return self.has


def test_a_receiver_that_dies_in_the_collective_leaves_the_others_with_the_weights(tmp_path: Path) -> None:
    import ray

    learners = Group(lambda rank: ray.remote(Sender).options(num_cpus=0).remote(), 2, 60, "learner")
    made: Any = ray.remote(Receiver).options(max_restarts=-1, num_cpus=0)
    rollouts = Fleet("rollout worker", [made.remote(str(tmp_path / "died")) for _ in range(2)], 60.0, 3)
    hand_over = Broadcast(5.0)

    def told(key: str) -> list[float]:
        for number in range(2):
            rollouts.submit((key, number), "tell")
        found: list[float] = rollouts.collect([(key, number) for number in range(2)], key)
        return found

    def counts() -> tuple[int, int]:
        found: tuple[int, int] = learners.call("counts")[0]
        return found

    hand_over(0, learners, rollouts, "tables", [])
    assert told("first") == [0.0, 0.0]
    assert counts() == (0, 1)
    hand_over(1, learners, rollouts, "tables", [])
    assert told("second") == [1.0, 1.0]
    assert (tmp_path / "died").exists()
    assert rollouts.restarts == 1
    assert counts()[0] >= 1, "the sender was asked"
    ends = time.monotonic() + 60
    while len(rollouts.healthy()) < 2 and time.monotonic() < ends:
        rollouts.pump()
        time.sleep(0.1)
    asked = counts()[0]
    hand_over(2, learners, rollouts, "tables", [])
    hand_over(3, learners, rollouts, "tables", [])
    assert told("third") == [3.0, 3.0]
    assert counts() == (asked, 2), "one channel more for both"
    rollouts.stop()
    learners.stop()
