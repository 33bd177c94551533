"""A training stage on 1 to N workers of Ray Train, whatever is trained.

The driver checks what can be known beforehand, starts Ray, shows progress and turns failures into one line; it runs no training itself. Ray
Train places the workers, joins them (NCCL or gloo) and starts them anew when one dies; where they go on is the checkpoint's business
(`oxyray.train.session`), not Ray's, because its checkpoints say what was reported, ours what was trained.

An error of OxyRay's own (a loss that is not finite, a full disk) would come again after a restart. The worker leaves it in `error.json`,
its restarted successors leave at once, and the driver raises it. SIGTERM to the driver leaves `stop`: the workers save and end.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oxyray import errors
from oxyray.cluster.start import ray_for
from oxyray.config import Config, from_dict, to_dict
from oxyray.errors import ConfigError, OxyrayError, RunError, Stopped, TrainingError
from oxyray.files import clear_leftovers, read_json, write_json
from oxyray.logs import log_warnings
from oxyray.progress import bar
from oxyray.run import Run
from oxyray.stopping import stop_on_sigterm
from oxyray.train import checkpoint
from oxyray.train.course import ALL_DONE, begun_with, limits
from oxyray.train.task import Task

_POLL_S = 0.5
_FEW_STEPS = 500


def make(task: str, config: Config, run: Run) -> Task:
    """The task of this name, `module:Class`, made of the configuration and the run folder."""
    module, _, name = task.partition(":")
    made: Task = getattr(importlib.import_module(module), name)(config, run)
    return made


def train(task: str, config: Config, run: Run) -> None:
    """Train the task (see `make`) in its stage's folder; leave `model/` there. Goes on from the latest checkpoint of the same data,
    catalogue and settings; a run that is over already trains nothing and says so.

    Raises RunError when an earlier stage is missing, ConfigError when the cluster is too small, TrainingError when training cannot go on,
    Stopped after SIGTERM (its checkpoint is whole then).
    """
    made = make(task, config, run)
    stage, workers = made.stage, made.settings.workers
    folder = run.path(stage)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    if _already_over(made, run, config.force):
        return
    for name in ("stop", "error.json", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    with ray_for(config.cluster, workers), _ctrl_c_as_before(), _Watch(made, folder) as watch, stop_on_sigterm(folder / "stop"):
        _fit(task, made, config, run)
    raise_left_error(folder)
    if (folder / "stop").exists():
        (folder / "stop").unlink()
        raise Stopped(f"{stage}: stopped on request after step {watch.step}; its checkpoint is saved: the same command goes on from there")
    print(_summary(made, folder), flush=True)


def resumable(stage: str, run: Run, identity: dict[str, Any], force: bool) -> checkpoint.Checkpoint | None:
    """The stage's latest checkpoint, if it can be gone on from. One of other settings is set aside, and that is said."""
    checkpoints = run.path(stage, "checkpoints")
    checkpoint.sweep(checkpoints)
    found = checkpoint.latest(checkpoints)
    if found is None:
        return None
    why = "force=true" if force else begun_with(found, identity)
    if why is None:
        return found
    aside = run.path(stage, "checkpoints.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoints.rename(aside)
    print(f"{stage}: begins anew ({why}); the earlier checkpoints are in {aside}", flush=True)
    return None


def _already_over(task: Task, run: Run, force: bool) -> bool:
    """Look at what is there: over, or to be gone on from. Says which."""
    stage = task.stage
    found = resumable(stage, run, task.identity(), force)
    if found is None:
        return False
    course = found.meta["course"]
    if course["ended"] and found.meta["limits"] == limits(task.settings) and published(run.path(stage)):
        print(f"{stage}: already over at step {found.step} ({course['ended']}): nothing is trained", flush=True)
        return True
    print(f"{stage}: goes on from step {found.step}, after {course['minutes']:.1f} minutes of training", flush=True)
    return False


def published(folder: Path) -> bool:
    """Whether `model/` is what `best/` is; a run that was killed at its very end may have left an earlier one."""
    made, best = folder / "model" / "model.json", folder / "best" / "model.json"
    return made.exists() and (not best.exists() or made.read_bytes() == best.read_bytes())


def _fit(name: str, task: Task, config: Config, run: Run) -> None:
    """One Ray Train run. Raises TrainingError when workers died too often."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    settings, stage = task.settings, task.stage
    have = ray.cluster_resources()
    gpu = settings.gpu == "auto" and have.get("GPU", 0) > 0
    for kind in ("CPU", "GPU") if gpu else ("CPU",):
        if have.get(kind, 0) < settings.workers:
            mend = "use fewer workers" + (f" or {task.key}.gpu=never" if kind == "GPU" else " or a larger cluster")
            raise ConfigError(f"{task.key}.workers={settings.workers}, but Ray has {have.get(kind, 0):g} {kind}s: {mend}")
    # A worker that cannot start in time is an error, not a wait.
    longest = max(config.train.timeout_s, config.rank.timeout_s, config.fuse.timeout_s, config.cluster.start_timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(longest)  # one value for stages side by side: they share the environment
    if config.cluster.address == "local":
        # Nothing preempts the own machine, and nobody reads the metrics: two processes less to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    told = {"task": name, "config": to_dict(config) | {"run_dir": str(run.folder)}}
    resources = {"CPU": 1.0, **({"GPU": 1.0} if gpu else {})}
    variables = environment(config, settings.threads_per_worker, settings.workers * config.cluster.stages_at_once)
    most = settings.max_restarts

    def fit(records: str) -> None:
        (_local_trainer() if config.cluster.address == "local" else TorchTrainer)(
            _worker,
            train_loop_config=told,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(settings.timeout_s)),
            scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as Train's first version
                name=stage,
                storage_path=records,
                failure_config=FailureConfig(max_failures=most, controller_failure_limit=most),  # type: ignore[call-arg]
                worker_runtime_env={"env_vars": variables},
            ),
        ).fit()

    for left in range(most, -1, -1):
        # Ray Train wants a place for its own records; nothing in it is needed afterwards.
        with tempfile.TemporaryDirectory(prefix=".ray-", dir=run.path(stage), ignore_cleanup_errors=True) as records:
            try:
                return fit(records)
            except TrainingFailedError as error:
                raise_left_error(run.path(stage))
                # Whoever dies while the group forms ends Train's run as a failure of its controller, which it does not try again.
                if left == 0 or not isinstance(getattr(error, "controller_failure", None), ray.exceptions.RayError):
                    raise TrainingError(_told(error, task, run)) from error


def _local_trainer() -> Any:
    """Train's trainer without two actors. The one that frees places after a dead controller: on a Ray of our own nothing outlives the
    driver, and it asks a dashboard, which is not there, for ten seconds before it ends. And the one that deals out Ray Data, of which there
    is none: workers would wait seconds for it. Private API of Ray 2.60."""
    from ray.train.torch import TorchTrainer

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in made if type(callback).__name__ not in ("PlacementGroupCleanerCallback", "DatasetsCallback")]

    return LocalTrainer


def environment(config: Config, threads: int | None, processes: int) -> dict[str, str]:
    """Of a worker, one of so many that share the cores of a machine. A local Ray's workers import the same oxyray as the driver; elsewhere
    it must be installed."""
    import ray

    local = config.cluster.address == "local"
    nodes = [] if local else [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = {"OMP_NUM_THREADS": str(threads or threads_of(nodes or [{"CPU": os.cpu_count() or 1}], processes))}
    if local:
        here = str(Path(__file__).resolve().parents[2])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return found


def threads_of(nodes: Sequence[Mapping[str, float]], processes: int) -> int:
    """Threads for each of `processes`, which Ray puts onto as few nodes as hold them: as many to a node as it has GPUs, or cores where
    there are none, and no fewer than their share of the nodes."""
    largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
    cores = int(largest.get("CPU", 1))
    together = max(-(-processes // len(nodes)), min(processes, int(largest.get("GPU", 0)) or cores))
    return max(1, cores // max(1, together))


def _worker(told: dict[str, Any]) -> None:
    """One rank, in a process of Ray Train with the process group already made."""
    import torch
    from ray.train.torch import get_device

    config = from_dict(Config, told["config"])
    run = Run(config.run_dir)
    task = make(told["task"], config, run)
    left = run.path(task.stage, "error.json")
    if left.exists():
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank = torch.distributed.get_rank()
    log_warnings(run.folder, f"{task.stage}-worker{rank}")
    try:
        from oxyray.train.session import Session

        Session(task, run, get_device()).train()
    except OxyrayError as error:
        write_json(left, {"kind": type(error).__name__, "message": str(error), "rank": rank})
        raise
    except Exception:
        logging.getLogger(__name__).exception("worker %d failed", rank)
        raise


def raise_left_error(folder: Path) -> None:
    if (folder / "error.json").exists():
        left = read_json(folder / "error.json")
        (folder / "error.json").unlink()
        kind = getattr(errors, left["kind"], TrainingError)
        raise kind(left["message"])


def _told(error: Exception, task: Task, run: Run) -> str:
    """Why training failed, in one line: rank, cause, mend."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    rank, cause = next(iter(failures.items()), (None, getattr(error, "controller_failure", error)))
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    # A remote traceback ends with the error itself; an actor's death begins with it.
    said = lines[-1] if "Traceback" in str(cause) else lines[0]
    failed = "the workers did not start" if rank is None else f"worker {rank} failed"
    return (
        f"{failed} and {task.settings.max_restarts} restarts ({task.key}.max_restarts) did not help: {said}; the log is in "
        f"{run.path('logs', 'latest')}, and the same command goes on from the last checkpoint"
    )


def _summary(task: Task, folder: Path) -> str:
    end = read_json(folder / "progress.json")
    name = task.chosen_by.removeprefix("valid_")
    best = "" if end["best"] is None else f"; best validation {name} {end['best']:.4f}"
    spent = f"{end['ended']} at step {end['step']}, {end['minutes']:.1f} minutes"
    told = f"{task.stage}: {spent}{best}; the model is of step {end['best_step']}"
    if task.stage == "pretrain" and end["step"] < _FEW_STEPS and end["ended"] == ALL_DONE and not task.settings.max_steps:
        told += (
            f"\n{task.stage}: {end['step']} steps are few; a smaller train.targets_per_step or more train.epochs may make more of this log "
            "(docs/policy.md)"
        )
    return told


@contextmanager
def _ctrl_c_as_before() -> Iterator[None]:
    """Ray Train leaves its own handler behind, for which a later Ctrl-C would be a success."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Watch:
    """Follows `progress.json` with a bar; says when a restarted worker fell back to a checkpoint."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        self.path, self.step = folder / "progress.json", 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        shown, pids = None, None
        over = False
        while not over:
            over = self._over.wait(_POLL_S)
            try:
                now = read_json(self.path)
            except RunError:
                continue
            if shown is None:
                shown = bar(now["total"], self.task.stage, "step")
                shown.update(now["step"])
                shown.initial = now["step"]
            elif pids != now["pids"]:
                print(f"{self.task.stage}: workers were started anew and go on from step {now['step']}", flush=True)
            pids, self.step = now["pids"], now["step"]
            counted, chosen = self.task.counted, self.task.chosen_by.removeprefix("valid_")
            told = {"loss": f"{now['loss']:.3f}", f"{counted}/s": f"{now[f'{counted}_per_second']:.0f}"} if "loss" in now else {}
            shown.set_postfix(told | ({} if now["best"] is None else {chosen: f"{now['best']:.4f}"}), refresh=False)
            shown.update(now["step"] - shown.n)
        if shown is not None:
            shown.close()
