"""The paper's loop (2.4, 3.1.3): sample requests, generate, reward, learn, publish, save.

With `staleness` 0 every step waits for the one before. With k, candidates of the next k steps are generated and judged while the learners
learn, by weights at most k versions old.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from oxyray.align.crew import Crew
from oxyray.config import AlignConfig
from oxyray.errors import TrainingError

Log = Callable[[dict[str, Any], int], None]  # figures, and the step that they are of


@dataclass
class Course:
    """How far the run is and what it has reached; saved with every checkpoint. The best weights so far lie in `best/`, at first those of
    the supervised model."""

    step: int = 0
    best_step: int = 0
    best: float | None = None
    start: float | None = None
    minutes: float = 0.0

    def adopt(self, about: dict[str, Any]) -> None:
        """Take over what `best/` tells of itself: a run that went back may have left there what its checkpoint does not know of."""
        if self.best is not None and about.get("valid_hit", self.best) > self.best:
            self.best, self.best_step = about["valid_hit"], about["step"]

    def reached(self, hit: float) -> bool:
        """Note a validation's hit rate; whether it is the best so far."""
        self.start = hit if self.start is None else self.start
        if self.best is not None and hit <= self.best:
            return False
        self.best, self.best_step = hit, self.step
        return True


def run(crew: Crew, settings: AlignConfig, course: Course, log: Log, stopping: Callable[[], bool]) -> None:
    """Go on from `course` to the last step, or until asked to stop. Leaves a checkpoint. Raises as the crew."""
    crew.publish(course.step)
    if course.best is None:
        validate(crew, course, log)
    while course.step < settings.steps and not stopping():
        began, step = time.monotonic(), course.step
        batch = crew.prepared(step)
        if step - batch.version > settings.staleness:
            raise TrainingError(
                f"candidates of step {step} are of version {batch.version}: staler than align.staleness={settings.staleness}"
            )
        learning = crew.learn(batch)
        for ahead in range(step + 1, min(step + settings.staleness, settings.steps - 1) + 1):
            crew.prepare(ahead)
        told = learning()
        course.step += 1
        crew.publish(course.step)
        course.minutes += (time.monotonic() - began) / 60
        log(told | batch.told | crew.times() | {"staleness": step - batch.version, "step_seconds": time.monotonic() - began}, course.step)
        if course.step % settings.eval_every_steps == 0 or course.step == settings.steps:
            validate(crew, course, log)
        if course.step % settings.save_every_steps == 0:
            crew.save(asdict(course))
    crew.save(asdict(course))


def validate(crew: Crew, course: Course, log: Log) -> None:
    """Measure the policy as it is; keep its weights when they are the best so far. Without validation requests the newest are the best."""
    found = crew.validate()
    better = course.reached(found.get("valid_hit", float(course.step)))
    log(found | {"best": course.best, "best_step": course.best_step}, course.step)
    if better:
        crew.keep_best(course.step, found)
        crew.save(asdict(course))  # so that who goes on from a checkpoint knows of these weights
