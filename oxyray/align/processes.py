"""The actors of the loop: thin Ray processes around `Learner`, `Rollout` and `RewardService`, which know nothing of Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from oxyray.align.judge import Judge
from oxyray.align.learner import Judged, Learner
from oxyray.align.rollout import Rolled, Rollout
from oxyray.cluster.channel import Channel, Form, Seat, forms
from oxyray.cluster.fleet import Member
from oxyray.cluster.group import Rank
from oxyray.cluster.publish import sweep
from oxyray.cluster.rows import here, opener
from oxyray.cluster.wait import ProcessLost, answers
from oxyray.config import Config, from_dict
from oxyray.errors import ClusterError, RewardError
from oxyray.logs import log_warnings
from oxyray.run import Run
from oxyray.train import checkpoint


class WeightsLost(ClusterError):
    """A rollout worker could not have the learners' dense weights."""


class LearnerProcess(Rank):
    """One learner. It publishes its tables in `tables`, in a folder of its node."""

    def __init__(self, config: dict[str, Any], tables: str, checkpoints: str) -> None:
        self.config, self.tables, self.checkpoints = from_dict(Config, config), Path(tables), Path(checkpoints)
        self.kept: tuple[int, dict[str, np.ndarray]] = (-1, {})
        self.channel: Channel | None = None

    def join(self, rank: int, world: int, local_rank: int, local_world: int, address: str, port: int, seconds: float) -> None:
        import torch

        super().join(rank, world, local_rank, local_world, address, port, seconds)
        log_warnings(Run(self.config.run_dir).folder, f"align-learner{rank}")
        sweep(self.tables.parent)
        if rank == 0:
            checkpoint.sweep(self.checkpoints)
        torch.distributed.barrier()
        self.learner = Learner(self.config, self.config.align, self.tables / here(), self.checkpoints, rank, world, _device())

    def pid(self) -> int:
        return os.getpid()

    def step(self) -> int:
        return self.learner.step

    def learn(self, pieces: list[tuple[Rolled, Judged]]) -> dict[str, float]:
        return self.learner.learn(pieces)

    def publish(self, version: int, keep: bool = False) -> dict[str, np.ndarray] | list[Form]:
        """The dense weights; or their forms, where they are kept here to be sent or asked for."""
        weights = self.learner.publish(version)
        if not keep:
            return weights
        self.kept = version, weights
        return forms(weights)

    def send(self, seat: Seat | None) -> None:
        """What is kept, to all who receive in this channel; nothing without a seat."""
        if seat is not None:
            self.channel = _channel(self.channel, seat)
            self.channel.send(self.kept[1])

    def weights(self, version: int) -> dict[str, np.ndarray]:
        """What is kept. Raises WeightsLost when it is of another version."""
        if self.kept[0] != version:
            raise WeightsLost(f"dense weights of version {version} were asked for, the first learner keeps those of {self.kept[0]}")
        return self.kept[1]

    def validate(self) -> dict[str, float]:
        return self.learner.validate()

    def save(self, meta: dict[str, Any]) -> None:
        self.learner.save(meta)

    def export(self, folder: str, about: dict[str, Any]) -> None:
        self.learner.export(Path(folder), **about)


class RolloutProcess(Member):
    """One rollout worker."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = from_dict(Config, config)
        self.channel: Channel | None = None

    @cached_property
    def rollout(self) -> Rollout:
        """Made by the first call, whose errors keep their type; those of an actor's constructor would not."""
        _settle(self.config, "rollout")
        return Rollout(self.config, self.config.align, _device())

    def load(self, version: int, weights: Mapping[str, np.ndarray], folder: str, servers: Sequence[tuple[str, Any]]) -> int:
        """`servers` answer for the rows of other nodes, see `oxyray.cluster.rows`."""
        return self.rollout.load(version, weights, Path(folder), opener(servers))

    def ready(self) -> None:
        """Read data and policy."""
        _ = self.rollout

    def receive(self, version: int, seat: Seat, expected: list[Form], folder: str, servers: Sequence[tuple[str, Any]]) -> int:
        """As `load`, in a channel from the first learner. Raises ChannelLost."""
        self.channel = _channel(self.channel, seat)
        return self.rollout.load(version, self.channel.receive(expected), Path(folder), opener(servers))

    def fetch(self, version: int, learner: Any, folder: str, servers: Sequence[tuple[str, Any]]) -> int:
        """As `load`, from what the first learner keeps. Raises WeightsLost."""
        try:
            [weights] = answers([learner.weights.remote(version)], self.config.align.timeout_s, "dense weights")
        except ProcessLost as error:
            raise WeightsLost(str(error)) from error
        return self.load(version, weights, folder, servers)

    def release(self) -> None:
        if "rollout" in vars(self):
            self.rollout.release()

    def generate(self, step: int, piece: int) -> Rolled:
        return self.rollout.generate(step, piece)


class JudgeProcess(Member):
    """One process that computes rewards. A reward that fails is tried again, then raised: it never becomes a number."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = from_dict(Config, config)

    def begin(self) -> None:
        """Read data and ranker."""
        _settle(self.config, "judge")
        self.judging = Judge(self.config, self.config.align, _device())

    def judge(self, rolled: Rolled) -> tuple[Judged, dict[str, tuple[float, int]]]:
        for _ in range(self.config.reward.retries):
            with suppress(RewardError):
                return self.judging.judge(rolled)
        return self.judging.judge(rolled)


def _channel(present: Channel | None, seat: Seat) -> Channel:
    """The channel of this seat: the one that there is, or another."""
    return present if present is not None and present.seat == seat else Channel(seat)


def _settle(config: Config, role: str) -> None:
    import torch

    log_warnings(Run(config.run_dir).folder, f"align-{role}{os.getpid()}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
