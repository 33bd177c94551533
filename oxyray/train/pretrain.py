"""The stage `pretrain`: the training session on 1 to N workers of Ray Train.

The driver checks what can be known beforehand, starts Ray, shows progress and turns failures into one line; it imports neither
torch.distributed nor DeepSpeed nor TorchRec. Ray Train places the workers, joins them (NCCL or gloo) and starts them anew when one dies;
where they go on is the checkpoint's business (`oxyray.train.session`), not Ray's, because its checkpoints say what was reported, ours
what was trained.

An error of OxyRay's own (a loss that is not finite, a full disk) would come again after a restart. The worker leaves it in `error.json`,
its restarted successors leave at once, and the driver raises it. SIGTERM to the driver leaves `stop`: the workers save and end.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from oxyray import errors
from oxyray.cluster.start import ray_for
from oxyray.config import Config, from_dict, to_dict
from oxyray.errors import ConfigError, OxyrayError, RunError, TrainingError
from oxyray.files import read_json, write_json
from oxyray.model.inputs import Inputs, check_beams
from oxyray.progress import bar
from oxyray.run import Run

_POLL_S = 0.5


def pretrain(config: Config, run: Run) -> None:
    """Train the policy of RUN/data and RUN/sid; leave `RUN/pretrain/model`. Goes on from the latest checkpoint of the same data,
    catalogue and settings; a run that is over already trains nothing and says so.

    Raises RunError when an earlier stage is missing, ConfigError when the cluster is too small, TrainingError when training cannot go on
    or was stopped by SIGTERM (its checkpoint is whole then).
    """
    inputs = Inputs.load(run)
    check_beams(config, inputs)
    folder = run.path("pretrain")
    folder.mkdir(parents=True, exist_ok=True)
    if _already_over(config, run, inputs):
        return
    for name in ("stop", "error.json", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    del inputs  # the workers read their own
    with ray_for(config.cluster, config.train.workers), _Watch(folder) as watch, _stop_on_sigterm(folder / "stop"):
        _fit(config, run)
    _raise_left_error(folder)
    if (folder / "stop").exists():
        (folder / "stop").unlink()
        raise TrainingError(f"stopped on request after step {watch.step}; its checkpoint is saved: the same command goes on from there")
    print(_summary(folder), flush=True)


def _already_over(config: Config, run: Run, inputs: Inputs) -> bool:
    """Look at what is there: over, to be gone on from, or of other settings (set aside). Says which."""
    from oxyray.train import checkpoint
    from oxyray.train.course import begun_with, limits

    folder = run.path("pretrain")
    checkpoints = folder / "checkpoints"
    checkpoint.sweep(checkpoints)
    found = checkpoint.latest(checkpoints)
    if found is None:
        return False
    why = "force=true" if config.force else begun_with(found, config, inputs)
    if why is not None:
        aside = folder / "checkpoints.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoints.rename(aside)
        print(f"pretrain: begins anew ({why}); the earlier checkpoints are in {aside}", flush=True)
        return False
    course = found.meta["course"]
    if course["ended"] and found.meta["limits"] == limits(config) and (folder / "model" / "model.json").exists():
        print(f"pretrain: already over at step {found.step} ({course['ended']}): nothing is trained", flush=True)
        return True
    print(f"pretrain: goes on from step {found.step}, after {course['minutes']:.1f} minutes of training", flush=True)
    return False


def _fit(config: Config, run: Run) -> None:
    """One Ray Train run. Raises TrainingError when workers died too often."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    train = config.train
    have = ray.cluster_resources()
    gpu = train.gpu == "auto" and have.get("GPU", 0) > 0
    for kind in ("CPU", "GPU") if gpu else ("CPU",):
        if have.get(kind, 0) < train.workers:
            mend = "use fewer workers" + (" or train.gpu=never" if kind == "GPU" else " or a larger cluster")
            raise ConfigError(f"train.workers={train.workers}, but Ray has {have.get(kind, 0):g} {kind}s: {mend}")
    # A worker that cannot start in time is an error, not a wait.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(max(train.timeout_s, config.cluster.start_timeout_s))
    if config.cluster.address == "local":
        # Nothing preempts the own machine, and nobody reads the metrics: two processes less to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Ray Train wants a place for its own records; nothing in it is needed afterwards.
    records = tempfile.mkdtemp(prefix=".ray-", dir=run.path("pretrain"))
    settings = to_dict(config) | {"run_dir": str(run.folder)}
    resources = {"CPU": 1.0, **({"GPU": 1.0} if gpu else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(train.timeout_s)),
        scaling_config=ScalingConfig(num_workers=train.workers, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as Train's first version
            name="pretrain",
            storage_path=records,
            failure_config=FailureConfig(max_failures=train.max_restarts),
            worker_runtime_env={"env_vars": _environment(config)},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        _raise_left_error(run.path("pretrain"))
        raise TrainingError(_told(error, train.max_restarts, run)) from error
    finally:
        shutil.rmtree(records, ignore_errors=True)


def _environment(config: Config) -> dict[str, str]:
    """Of a worker. A local Ray's workers import the same oxyray as the driver; elsewhere it must be installed."""
    threads = config.train.threads_per_worker or max(1, (os.cpu_count() or 1) // config.train.workers)
    found = {"OMP_NUM_THREADS": str(threads)}
    if config.cluster.address == "local":
        here = str(Path(__file__).resolve().parents[2])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return found


def _worker(settings: dict[str, Any]) -> None:
    """One rank, in a process of Ray Train with the process group already made."""
    import torch
    from ray.train.torch import get_device

    config = from_dict(Config, settings)
    run = Run(config.run_dir)
    left = run.path("pretrain", "error.json")
    if left.exists():
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank = torch.distributed.get_rank()
    _log_to(run, rank)
    try:
        from oxyray.train.session import Session

        Session(config, run, get_device()).train()
    except OxyrayError as error:
        write_json(left, {"kind": type(error).__name__, "message": str(error), "rank": rank})
        raise
    except Exception:
        logging.getLogger(__name__).exception("worker %d failed", rank)
        raise


def _log_to(run: Run, rank: int) -> None:
    """A worker's warnings go to the attempt's log folder, where there is one."""
    folder = run.path("logs", "latest")
    if folder.is_dir():
        handler = logging.FileHandler(folder / f"pretrain-worker{rank}.log", delay=True)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)


def _raise_left_error(folder: Path) -> None:
    if (folder / "error.json").exists():
        left = read_json(folder / "error.json")
        (folder / "error.json").unlink()
        kind = getattr(errors, left["kind"], TrainingError)
        raise kind(left["message"])


def _told(error: Exception, restarts: int, run: Run) -> str:
    """Why training failed, in one line: rank, cause, mend."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    rank, cause = next(iter(failures.items()), (None, error))
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    # A remote traceback ends with the error itself; an actor's death begins with it.
    said = lines[-1] if "Traceback" in str(cause) else lines[0]
    return (
        f"worker {rank} failed and {restarts} restarts (train.max_restarts) did not help: {said}; the log is in "
        f"{run.path('logs', 'latest')}, and the same command goes on from the last checkpoint"
    )


def _summary(folder: Path) -> str:
    end = read_json(folder / "progress.json")
    best = "" if end["best"] is None else f"; best validation hit rate {end['best']:.4f}"
    return f"pretrain: {end['ended']} at step {end['step']}, {end['minutes']:.1f} minutes{best}; the model is of step {end['best_step']}"


@contextmanager
def _stop_on_sigterm(stop: Path) -> Iterator[None]:
    """SIGTERM asks the workers to save and end. Only the main thread can listen for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.touch()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Watch:
    """Follows `progress.json` with a bar; says when a restarted worker fell back to a checkpoint."""

    def __init__(self, folder: Path) -> None:
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
                shown = bar(now["total"], "pretrain", "step")
                shown.update(now["step"])
                shown.initial = now["step"]
            elif pids != now["pids"]:
                print(f"pretrain: workers were started anew and go on from step {now['step']}", flush=True)
            pids, self.step = now["pids"], now["step"]
            told = {"loss": f"{now['loss']:.3f}", "targets/s": f"{now['targets_per_second']:.0f}"} if "loss" in now else {}
            shown.set_postfix(told | ({} if now["best"] is None else {"hit": f"{now['best']:.4f}"}), refresh=False)
            shown.update(now["step"] - shown.n)
        if shown is not None:
            shown.close()
