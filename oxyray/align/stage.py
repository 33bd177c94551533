"""The stage `align`: the supervised policy is aligned to the shop's goals by rewards (paper 2.4), on Ray actors, one machine or many.

The driver reserves places, makes the crew and runs the loop. A lost learner ends the others: they begin again from the last whole
checkpoint, `align.max_restarts` times at most. The result is `RUN/align/model`: the weights of the best validation, which are those of the
supervised model where nothing was better, so aligning never makes a policy worse by its own measure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from oxyray.align import loop
from oxyray.align.crew import Crew
from oxyray.align.loop import Course
from oxyray.cluster.placement import colocated, reserved, split
from oxyray.cluster.start import ray_for
from oxyray.cluster.wait import GroupLost
from oxyray.config import Config, to_dict
from oxyray.errors import ConfigError, Stopped, TrainingError
from oxyray.files import clear_leftovers, read_json, whole, write_json
from oxyray.model.inputs import Inputs
from oxyray.progress import bar
from oxyray.run import Run
from oxyray.stopping import stop_on_sigterm
from oxyray.train import checkpoint
from oxyray.train.driver import environment, resumable


def align(config: Config, run: Run) -> None:
    """Align RUN/pretrain/model by the rewards of RUN/rank/model; leave `RUN/align/model`. Goes on from the latest checkpoint.

    Raises RunError when an earlier stage is missing, RewardError when a reward cannot be computed, ClusterError when the places cannot be
    had or too many processes died, TrainingError when learning cannot go on, Stopped after SIGTERM.
    """
    run.need("pretrain", "model", stage="pretrain")
    settings, folder = config.align, run.path("align")
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    (folder / "stop").unlink(missing_ok=True)
    identity = _identity(config, run)
    course = _begin(config, run, identity)
    count = settings.learners + settings.rollouts + settings.judges
    with ray_for(config.cluster, count), stop_on_sigterm(folder / "stop"):
        import ray

        gpu = settings.gpu == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        if gpu and settings.layout == "colocated" and settings.dense == "broadcast":
            raise ConfigError("align.dense: a collective joins no two processes of one GPU: set align.layout=split, or align.dense=store")
        plan = (colocated if settings.layout == "colocated" else split)(settings.learners, settings.rollouts, settings.judges, gpu)
        with reserved(plan, config.cluster.start_timeout_s, "use fewer align.learners, align.rollouts or align.judges") as group:
            variables = environment(config, settings.threads_per_process, count)
            absolute = dataclasses.replace(config, run_dir=str(run.folder))
            crew = Crew(absolute, plan, group, folder, _tables(settings.shared_memory, run), variables, identity)
            try:
                _go(crew, config, run, course)
            finally:
                crew.stop()
    _finish(run, course, settings.steps)


def _go(crew: Crew, config: Config, run: Run, course: Course) -> None:
    """The loop, begun again from the last checkpoint when learners are lost."""
    settings, stop = config.align, run.path("align", "stop")
    with bar(settings.steps, "align", "step") as shown:

        def log(told: dict[str, Any], step: int) -> None:
            run.log("align", {name: round(value, 6) if isinstance(value, float) else value for name, value in told.items()}, step)
            if "loss" in told:
                shown.set_postfix(
                    reward=f"{told.get('reward/all/reward', float('nan')):.3f}", best=f"{course.best or 0:.4f}", refresh=False
                )
            shown.update(step - shown.n)
            write_json(run.path("align", "progress.json"), {"step": step, "total": settings.steps, **vars(course)})

        lost: GroupLost | None = None
        while True:
            try:
                crew.form()
                if lost is not None:  # only now nobody of the former ones can still finish a checkpoint
                    clear_leftovers(run.path("align"))
                    vars(course).update(vars(_course(checkpoint.latest(run.path("align", "checkpoints")), run)))
                    print(f"align: {lost}: the learners were started anew and go on from step {course.step}", flush=True)
                return loop.run(crew, settings, course, log, stop.exists)
            except GroupLost as error:
                if crew.restarts >= settings.max_restarts:
                    raise TrainingError(
                        f"{error}; {crew.restarts} restarts of the learners (align.max_restarts={settings.max_restarts}) did not help: the "
                        f"logs are in {run.path('logs', 'latest')}, and the same command goes on from the last checkpoint"
                    ) from error
                crew.replace_learners()
                lost = error


def _begin(config: Config, run: Run, identity: dict[str, Any]) -> Course:
    """From the checkpoint to go on from, else from the start. Says which."""
    found = resumable("align", run, {"identity": identity}, config.force)
    course = _course(found, run)
    if found:
        print(f"align: goes on from step {course.step}, after {course.minutes:.1f} minutes", flush=True)
    return course


def _course(found: checkpoint.Checkpoint | None, run: Run) -> Course:
    course = Course(**found.meta["course"]) if found else Course()
    if run.path("align", "best", "model.json").exists():
        course.adopt(read_json(run.path("align", "best", "model.json")))
    return course


def _identity(config: Config, run: Run) -> dict[str, Any]:
    """What a checkpoint must have been made with to be gone on from: what decides the weights, and not how fast."""
    speed = (
        "learners",
        "rollouts",
        "judges",
        "dense",
        "layout",
        "threads_per_process",
        "gpu",
        "shared_memory",
        "save_every_steps",
        "steps",
    )
    settings = {name: value for name, value in to_dict(config.align).items() if name not in (*speed, "max_restarts", "timeout_s")}
    settings["optim"] = {name: value for name, value in settings["optim"].items() if name != "zero_stage"}
    start, ranker = (read_json(run.path(stage, "model", "model.json")) for stage in ("pretrain", "rank"))
    inputs = Inputs.load(run)
    return {
        "align": settings,
        "reward": {name: value for name, value in to_dict(config.reward).items() if name != "retries"},
        "start": {name: value for name, value in start.items() if name not in ("catalogue", "data")},
        "ranker": ranker,
        "generate": {name: value for name, value in to_dict(config.generate).items() if name in ("beams", "normalise")},
        "held_back": config.train.hold_back,
        "catalogue": inputs.catalog.version,
        "data": inputs.prepared.meta.fingerprint,
    }


def _tables(shared_memory: str, run: Run) -> Path:
    """A folder of this run's own in shared memory; what a killed command of the same run left there is removed."""
    name = "oxyray-" + hashlib.blake2b(str(run.folder).encode(), digest_size=6).hexdigest()
    for left in Path(shared_memory).glob(f"{name}-*"):
        if not Path(f"/proc/{left.name.rpartition('-')[2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(shared_memory) / f"{name}-{os.getpid()}"


def _finish(run: Run, course: Course, steps: int) -> None:
    """`best/` becomes `model/` (files are shared, not copied)."""
    stop = run.path("align", "stop")
    if stop.exists():
        stop.unlink()
        raise Stopped(f"align: stopped on request after step {course.step}; its checkpoint is saved: the same command goes on from there")
    with whole(run.path("align", "model")) as part:
        shutil.copytree(run.path("align", "best"), part, copy_function=os.link)
    outcome = (
        "the supervised model stays: no validation was better" if course.best_step == 0 else f"the model is of step {course.best_step}"
    )
    write_json(run.path("align", "outcome.json"), vars(course) | {"finished": round(time.time(), 3)})
    print(
        f"align: {steps} steps in {course.minutes:.1f} minutes; validation hit rate {course.start or 0:.4f} before, {course.best or 0:.4f} "
        f"after; {outcome}",
        flush=True,
    )
