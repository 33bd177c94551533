"""The jobs of a sweep: each is one command with its own configuration and its own run folder, run here or as a Ray task.

A job's failure never ends a sweep: it becomes an `Outcome`, which is printed as soon as it is known; SIGTERM does. What the base run folder
(the configuration's `run_dir`), a job beside it or an ablation of the base run already holds and fits the job is linked into the job's
folder, so a sweep over the policy shares one catalogue.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oxyray import pipeline
from oxyray.cli.run import complain, known_error, log_hint, perform, rehearse
from oxyray.cluster.start import start
from oxyray.config import Config, from_dict
from oxyray.errors import ClusterError, Stopped
from oxyray.run import Run

_POLL_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """`words` are the overrides that the job does not share with the others, `values` its composed configuration.

    The `run_dir` in `values` is the sweep's base run; the job's own run folder is `folder`. What the stage merely uses, as evaluation uses
    alignment, is taken from others where `used`.
    """

    number: int
    stage: str
    words: str
    values: dict[str, Any]
    folder: str
    dry_run: bool = False
    used: bool = True

    def config(self) -> Config:
        return from_dict(Config, {**self.values, "run_dir": self.folder})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    number: int
    words: str
    folder: str
    seconds: float
    error: str | None = None


def run_job(job: Job) -> Outcome:
    """Run one job. Never raises, but for an interruption by the user and Stopped."""
    started = time.time()
    outcome = Outcome(number=job.number, words=job.words, folder=job.folder, seconds=0.0)
    try:
        config = job.config()
        base = Path(job.values["run_dir"])
        for holder in (base, *_beside(job.folder, base)):
            pipeline.borrow(Run(holder), Run(job.folder), config, job.stage, used=job.used)
        if not job.dry_run:
            Run(job.folder).write_config(config)  # also where all is borrowed, and no stage writes it
        (rehearse if job.dry_run else perform)(job.stage, config)
    except Stopped:
        raise
    except Exception as error:  # a job's failure is its outcome
        known = known_error(error)
        if known is None:
            traceback.print_exc()
        text = str(known) if known is not None else f"{type(error).__name__}: {error}; {log_hint(job.folder)}"
        outcome = replace(outcome, error=text)
    return replace(outcome, seconds=round(time.time() - started, 1))


def _beside(folder: str, base: Path) -> list[Path]:
    """The folders of the sweep's other jobs, and those of the base run's ablations: a policy is a row in several tables."""
    found = {*Path(folder).parent.glob("*"), *base.absolute().glob("ablation/*/*")}
    return sorted(other for other in found - {Path(folder)} if (other / "stages").is_dir())


def announce(outcome: Outcome) -> None:
    name = f"job {outcome.number} ({outcome.words})"
    if outcome.error is None:
        print(f"{name}: done in {outcome.seconds:.0f} s, in {outcome.folder}", flush=True)
    else:
        complain(f"{name}: {outcome.error}")


def run_on_ray(jobs: list[Job], *, jobs_at_once: int | None, max_hours: float) -> list[Outcome]:
    """Run the jobs as Ray tasks, some at a time, and announce each as it ends. Outcomes are in the order of `jobs`.

    A job's task holds no CPU itself, as the training workers that it starts ask for theirs; `jobs_at_once` keeps the sum within the cluster
    (null: as many as have CPUs for their training workers). Raises ClusterError when Ray cannot be had or `max_hours` pass.
    """
    import ray

    configs = [job.config() for job in jobs]
    print(start(configs[0].cluster, quiet=True), flush=True)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = max(config.train.workers for config in configs)
    at_once = min(jobs_at_once or max(1, cpus // workers), len(jobs))
    threads = max(1, cpus // (at_once * workers))
    print(f"{len(jobs)} jobs, {at_once} at a time", flush=True)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")(run_job)
    waiting = [_with_threads(job, threads) for job in reversed(jobs)]
    running: dict[Any, Job] = {}
    outcomes: dict[int, Outcome] = {}
    ends = time.time() + max_hours * 3600
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop()
            running[task.remote(job)] = job
            print(f"job {job.number} ({job.words}): starts; its log is {job.folder}/logs/latest/main.log", flush=True)
        done, _ = ray.wait(list(running), timeout=_POLL_S)
        for ref in done:
            job = running.pop(ref)
            outcomes[job.number] = _outcome_of(ref, job)
            announce(outcomes[job.number])
        if time.time() > ends and running:
            for ref in running:
                ray.cancel(ref, force=True)
            left = f"{len(running)} jobs running and {len(waiting)} waiting"
            raise ClusterError(f"the sweep passed hydra.launcher.max_hours={max_hours:g} with {left}: raise it")
    return [outcomes[job.number] for job in jobs]


def _outcome_of(ref: Any, job: Job) -> Outcome:
    import ray

    try:
        outcome: Outcome = ray.get(ref, timeout=60)
        return outcome
    except ray.exceptions.RayError as error:  # the job's process or its node died, so it could not say what happened
        first = (str(error).splitlines() or ["no message"])[0]
        return Outcome(number=job.number, words=job.words, folder=job.folder, seconds=0.0, error=f"its process ended: {first}")


def _with_threads(job: Job, threads: int) -> Job:
    """Jobs side by side share the cores: give each training worker its share, unless the job says otherwise. A job's stages follow each
    other."""
    train = {"threads_per_worker": None, **job.values.get("train", {})}
    if train["threads_per_worker"] is None:
        train["threads_per_worker"] = threads
    cluster = {**job.values.get("cluster", {}), "stages_at_once": 1}
    return replace(job, values={**job.values, "train": train, "cluster": cluster})
