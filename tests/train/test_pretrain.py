"""The stage on a real Ray: a killed worker, an error that must not be retried, SIGTERM, a run that is over."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oxyray.config import ClusterConfig, Config, OptimConfig, TrainConfig, to_dict
from oxyray.errors import RunError, Stopped, TrainingError
from oxyray.files import read_json, write_json
from oxyray.run import Run
from oxyray.train import checkpoint
from oxyray.train.driver import _worker, published, raise_left_error
from oxyray.train.pretrain import pretrain
from tests.chaos.victims import kill as kill_newest
from tests.chaos.victims import when_seen
from tests.evaluate.shop import prepared_run
from tests.train.test_session import two_workers
from tests.train.train_workers import run as spawn

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def config(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    made, _ = prepared_run(tmp_path_factory.mktemp("shop"))
    train = TrainConfig(
        epochs=6, targets_per_step=40, workers=2, eval_requests=20, eval_every_epochs=3, save_every_minutes=0.005, max_restarts=2,
        optim=OptimConfig(zero_stage=2),
    )  # fmt: skip
    return dataclasses.replace(made, train=train, cluster=ClusterConfig(object_store_gb=0.1, start_timeout_s=300))


def copy(config: Config, folder: Path) -> Config:
    """The same run in a folder of its own, without what was trained."""
    shutil.copytree(config.run_dir, folder, ignore=shutil.ignore_patterns("pretrain"))
    return dataclasses.replace(config, run_dir=str(folder))


def when_at(folder: Path, step: int, act: Any, limit_s: float = 400) -> threading.Thread:
    """Call `act(progress)` once training has passed `step`."""

    def wait() -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            try:
                progress = read_json(folder / "pretrain" / "progress.json")
            except RunError:
                progress = {"step": 0}
            if progress["step"] >= step:
                return act(progress)
            time.sleep(0.02)
        return None

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = folder / "pretrain" / "model"
    return load_file(model / "policy.safetensors") | load_file(model / "tables.safetensors")


def test_a_killed_worker_repeats_no_batch_and_loses_none(config: Config, tmp_path: Path, capsys: Any) -> None:
    calm, hit = copy(config, tmp_path / "calm"), copy(config, tmp_path / "hit")
    spawn(2, two_workers, {"calm": to_dict(calm)})
    killed: list[int] = []

    def kill(progress: dict[str, Any]) -> None:
        os.kill(progress["pids"][1], signal.SIGKILL)
        killed.append(progress["step"])

    early, killer = when_seen("RayTrainWorker", lambda: kill_newest("RayTrainWorker")), when_at(tmp_path / "hit", 6, kill)
    run = Run(hit.run_dir)
    pretrain(hit, run)
    for thread in (early, killer):
        thread.join(timeout=10)
    total = read_json(run.path("pretrain", "progress.json"))["total"]
    assert killed
    assert killed[0] < total
    assert any(line.get("resumed") for line in run.metrics("pretrain"))
    a, b = weights(tmp_path / "calm"), weights(tmp_path / "hit")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(run.path("pretrain").glob(".ray-*"))

    assert f"pretrain: {total} steps are few; a smaller train.targets_per_step" in capsys.readouterr().out
    pretrain(hit, run)
    assert "already over" in capsys.readouterr().out

    optim = OptimConfig(lr=1e30, clip=1e30, warmup_share=0.0)
    wild = dataclasses.replace(hit, train=dataclasses.replace(hit.train, optim=optim, workers=1, max_restarts=0))
    with pytest.raises(TrainingError, match="not finite"):
        pretrain(wild, run)
    assert "begins anew" in capsys.readouterr().out
    assert all(torch.equal(a[name], b) for name, b in weights(tmp_path / "hit").items())  # the earlier model stands


def test_who_is_restarted_after_an_error_that_would_come_again_leaves_at_once(config: Config, tmp_path: Path) -> None:
    made = copy(config, tmp_path / "run")
    folder = tmp_path / "run" / "pretrain"
    folder.mkdir()
    write_json(folder / "error.json", {"kind": "TrainingError", "message": "the disk is full", "rank": 1})
    _worker({"task": "oxyray.train.pretrain:PolicyTask", "config": to_dict(made)})
    assert [path.name for path in folder.iterdir()] == ["error.json"]
    with pytest.raises(TrainingError, match="^the disk is full$"):
        raise_left_error(folder)
    assert not list(folder.iterdir())


def test_a_model_of_an_earlier_end_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    assert not published(tmp_path)
    for folder, step in (("best", 2), ("model", 1)):
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder / "model.json", {"step": step})
    assert not published(tmp_path)
    write_json(tmp_path / "model" / "model.json", {"step": 2})
    assert published(tmp_path)


def test_sigterm_leaves_a_checkpoint(config: Config, tmp_path: Path) -> None:
    long = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3000, workers=1, save_every_minutes=60))
    made = copy(long, tmp_path / "run")
    asked, ctrl_c = when_at(tmp_path / "run", 5, lambda progress: os.kill(os.getpid(), signal.SIGTERM)), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="pretrain: stopped on request"):
        pretrain(made, Run(made.run_dir))
    asked.join(timeout=10)
    found = checkpoint.latest(tmp_path / "run" / "pretrain" / "checkpoints")
    assert found is not None
    assert found.step >= 5
    assert found.meta["course"]["ended"] == ""
    assert not (tmp_path / "run" / "pretrain" / "model").exists()
    assert signal.getsignal(signal.SIGINT) == ctrl_c, "Ray Train's own handler would end a later Ctrl-C with success"
