"""What is trained: all that a training session must be told, since the session itself knows neither policy nor ranker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from oxyray.config import CourseConfig
from oxyray.model.tables import TableSpec
from oxyray.train.engine import TrainEngine


class Stream(Protocol):
    """Training data as a stream of optimizer steps, the same steps for any number of workers."""

    def steps_per_epoch(self) -> int: ...

    def batches(self, rank: int, world: int, micro_batches: int) -> Iterator[list[Any]]:
        """From the position on, this rank's micro-batches of each step, without end."""
        ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Measure(Protocol):
    """Validation on a fixed sample. `requests` is its size over all ranks; with 0 there is nothing to measure."""

    requests: int

    def measure(self, engine: TrainEngine, module: Any) -> dict[str, float]:
        """The same numbers on every rank. Collective. `module` has whole weights: the engine's own, or under ZeRO-3 a copy."""
        ...


class Task(Protocol):
    """`stage` names the folder and the lines of the log, `key` the group of its settings, `counted` what its throughput counts. The weights
    with the highest `chosen_by` of the validation are kept."""

    stage: str
    key: str
    counted: str
    chosen_by: str
    settings: CourseConfig

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on from."""
        ...

    def module(self) -> nn.Module:
        """With first weights, drawn by torch's global generator."""
        ...

    def tables(self) -> list[TableSpec]: ...

    def stream(self) -> Stream: ...

    def validation(self, rank: int, world: int) -> Measure: ...

    def count(self, batch: Any) -> int:
        """How many training examples a batch holds."""
        ...

    def flops(self, module: Any, batch: Any) -> float:
        """Floating-point operations that training on a batch takes; 0 where nobody counts them."""
        ...

    def write(self, folder: Path, weights: Mapping[str, torch.Tensor], **about: Any) -> None:
        """Export the dense weights and what they were trained for; the tables' file is the session's business."""
        ...
