"""How a training run goes, what ends it, and whether a checkpoint is of the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oxyray.config import CourseConfig, to_dict
from oxyray.train.checkpoint import Checkpoint

# A run goes on from its checkpoint when these change; any other change of what is trained and how begins anew.
MAY_CHANGE = (
    *("epochs", "max_minutes", "max_steps", "patience", "eval_every_epochs", "eval_requests", "workers", "threads_per_worker", "gpu"),
    *("micro_batches", "save_every_minutes", "keep_checkpoints", "max_restarts", "timeout_s", "profile_steps"),
)
ALL_DONE = "all steps done"
LIMITS = ("epochs", "max_minutes", "max_steps", "patience")


@dataclass
class Course:
    """How the run goes: saved with each checkpoint. `ended` says why it is over, and is empty while it is not."""

    minutes: float = 0.0
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0
    validated_at: int = -1
    ended: str = ""

    def adopt(self, about: dict[str, Any], chosen_by: str) -> None:
        """Take over what `best/` tells of itself: a run that went back may have left there what its checkpoint does not know of."""
        if self.best is not None and about.get(chosen_by, self.best) > self.best:
            self.best, self.best_step, self.without_gain = about[chosen_by], about["step"], 0


def deciding(settings: CourseConfig) -> dict[str, Any]:
    """The settings that decide what is trained: part of a task's identity."""
    found = {name: value for name, value in to_dict(settings).items() if name not in MAY_CHANGE}
    found["optim"] = {name: value for name, value in found["optim"].items() if name != "zero_stage"}
    return found


def limits(settings: CourseConfig) -> dict[str, Any]:
    """What ends a run."""
    return {name: value for name, value in to_dict(settings).items() if name in LIMITS}


def begun_with(found: Checkpoint, wanted_identity: dict[str, Any]) -> str | None:
    """The first thing in which a checkpoint differs from what this run would make, or None when it can be gone on from."""
    saved, wanted = _flat({name: found.meta[name] for name in wanted_identity if name in found.meta}), _flat(wanted_identity)
    absent = object()  # what was set then and is not now differs too
    for name in wanted | saved:
        if saved.get(name, absent) != wanted.get(name, absent):
            return f"{name} was {saved.get(name)} and is now {wanted.get(name)}"
    return None


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {f"{where}{name}": value}
    return found
