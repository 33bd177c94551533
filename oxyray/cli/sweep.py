"""`oxyray STAGE -m key=a,b`: Hydra's sweeper and launchers, with every job checked before the first one starts.

The launcher is Hydra's basic one (jobs one after the other, in this process) or, with `hydra/launcher=ray`, the one in
`hydra_plugins/oxyray_ray_launcher`. A failed job is printed when it fails, the others go on, and the sweep ends with a table and
`sweep.json`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from oxyray.cli.compose import Words, compose_config, hydra_here, parse, refuse_code, translated
from oxyray.cli.jobs import Job, Outcome, announce, run_job
from oxyray.errors import ConfigError, Stopped
from oxyray.files import write_json


class SweepTask:
    """Hydra's task function. A launcher calls it, or takes `job` and runs the job elsewhere."""

    def __init__(self, stage: str, dry_run: bool, swept: set[str], used: bool) -> None:
        self.stage, self.dry_run, self.swept, self.used = stage, dry_run, swept, used
        self.stopped: Stopped | None = None  # by SIGTERM: Hydra would go on with the next job

    def __call__(self, config: DictConfig) -> Outcome:
        job = self.job(config, HydraConfig.get())
        outcome = Outcome(number=job.number, words=job.words, folder=job.folder, seconds=0.0, error="not started, as the sweep was stopped")
        if self.stopped is None:
            print(f"job {job.number} ({job.words}): starts, in {job.folder}", flush=True)
            try:
                outcome = run_job(job)
                announce(outcome)
            except Stopped as stopped:
                self.stopped, outcome = stopped, replace(outcome, error=f"stopped: {stopped}")
        return outcome

    def job(self, config: DictConfig, hydra: Any) -> Job:
        """The job of one composed configuration; `hydra` is the job's own Hydra node."""
        values = OmegaConf.to_container(config, resolve=True)
        assert isinstance(values, dict)
        plain = {str(key): value for key, value in values.items() if key != "hydra"}
        refuse_code(plain)
        plain["run_dir"] = str(Path(plain["run_dir"]).expanduser().absolute())  # a job may run in another folder, or on another machine
        words = _only(hydra.overrides.task, self.swept)
        folder = Path(hydra.sweep.dir).absolute() / str(hydra.sweep.subdir)
        place = str(folder)
        return Job(number=hydra.job.num, stage=self.stage, words=words, values=plain, folder=place, dry_run=self.dry_run, used=self.used)


def sweep(stage: str, words: Words, dry_run: bool = False, used: bool = True) -> int:
    """Run the sweep; gives the exit code: 0 when every job went well. `used`: see `Job`. Raises ConfigError before any job starts when one
    cannot work, Stopped after SIGTERM."""
    places = [word for word in words.values if word.startswith("hydra.searchpath=")]
    overrides = parse([word for word in words.values if not word.startswith(("hydra.", "hydra/"))])
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    combinations = _combinations(overrides)
    for number, job_words in enumerate(combinations):
        try:
            compose_config(Words((*job_words, *places), {}, words.config_dir))
        except ConfigError as error:
            raise ConfigError(f"job {number} ({_only(job_words, swept)}): {error}") from None
    with hydra_here(), translated():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        task = SweepTask(stage, dry_run, swept, used)
        returns = hydra.multirun("config", task, list(words.values), with_log_configuration=False)
    code = _end([job_return.return_value for batch in returns for job_return in batch])
    if task.stopped is not None:
        raise task.stopped
    return code


def _combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Each job's overrides, in the order in which Hydra's basic sweeper numbers them."""
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            axes[key] = [override.input_line or key]
    return [list(job) for job in itertools.product(*axes.values())]


def _only(words: Sequence[str], keys: set[str]) -> str:
    """Those of the overrides that set one of `keys`, as a person wrote them."""
    return " ".join(word.lstrip("+") for word in words if word.lstrip("+").partition("=")[0] in keys)


def _end(outcomes: list[Outcome]) -> int:
    folder = Path(outcomes[0].folder).parent
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} jobs done, in {folder}")
    for outcome in outcomes:
        print(f"  {outcome.number:>3}  {outcome.seconds:>7.0f} s  {'failed' if outcome.error else 'done  '}  {outcome.words}")
    if folder.is_dir():
        write_json(folder / "sweep.json", [asdict(outcome) for outcome in outcomes])
    return 1 if failed else 0
