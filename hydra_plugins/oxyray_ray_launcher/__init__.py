"""Hydra's door to `oxyray.cli.jobs.run_on_ray`: `hydra/launcher=ray` runs a sweep's jobs as Ray tasks.

Hydra finds launchers only in the namespace package `hydra_plugins`, so this one stands here. It hands plain values to Ray, never Hydra's
own objects: a job's process needs neither Hydra nor the YAML files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:
    from oxyray.cli.jobs import Job


class OxyrayRayLauncher(Launcher):
    """`jobs_at_once` null: as many as the cluster's CPUs allow. `max_hours` bounds the whole sweep."""

    def __init__(self, jobs_at_once: int | None, max_hours: float) -> None:
        self.jobs_at_once, self.max_hours = jobs_at_once, max_hours
        self.context: HydraContext | None = None
        self.task: TaskFunction | None = None
        self.base: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.base = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from oxyray.cli.jobs import run_on_ray

        jobs = [self._job(list(overrides), number) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        outcomes = run_on_ray(jobs, jobs_at_once=self.jobs_at_once, max_hours=self.max_hours)
        return [_returned(list(overrides), outcome) for overrides, outcome in zip(job_overrides, outcomes, strict=True)]

    def _job(self, overrides: list[str], number: int) -> Job:
        from hydra.core.hydra_config import HydraConfig

        from oxyray.cli.sweep import SweepTask

        assert self.context is not None
        assert self.base is not None
        assert isinstance(self.task, SweepTask)
        config = self.context.config_loader.load_sweep_config(self.base, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return self.task.job(config, config.hydra)


def _returned(overrides: list[str], outcome: object) -> JobReturn:
    returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    returned.return_value = outcome
    return returned
