"""Processes of an alignment are killed while it runs, on a real Ray: the run goes on, and learns what an undisturbed one learns."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from oxyray.align.stage import align
from oxyray.cluster.start import ray_for
from oxyray.config import Config
from oxyray.errors import Stopped, TrainingError
from oxyray.files import read_json
from oxyray.run import Run
from oxyray.train import checkpoint
from tests.align.shop import copied, losses, ready_run
from tests.chaos.victims import ROLES, gone, kill, when_at

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    made = ready_run(tmp_path_factory.mktemp("shop"), steps=STEPS, eval_every_steps=6, save_every_steps=3)
    with ray_for(made.cluster, 6):
        yield made


@pytest.fixture(scope="module")
def calm(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made, run = copied(config, tmp_path_factory.mktemp("calm") / "run")
    align(made, run)
    return run


def restarts(run: Run) -> dict[str, int]:
    """The most that a line tells of each role."""
    lines = [line for line in run.metrics("align") if "loss" in line]
    return {role: max(line[f"restarts/{role}"] for line in lines) for role in ("rollout", "judge", "learners")}


def test_a_rollout_worker_and_a_judge_are_killed_again_and_again(config: Config, calm: Run, tmp_path: Path) -> None:
    made, run = copied(config, tmp_path / "run", rollouts=2, max_restarts=8)
    threads = [when_at(run, step, lambda role=role: kill(role)) for step, role in ((2, "rollout"), (5, "judge"), (8, "rollout"))]
    align(made, run)
    for thread in threads:
        thread.join(timeout=10)
    assert losses(run) == losses(calm), "no candidate was lost, counted twice, or made by other weights"
    assert restarts(run)["rollout"] >= 1
    assert restarts(run)["judge"] == 1
    assert restarts(run)["learners"] == 0


def test_learners_that_are_killed_begin_again_from_the_checkpoint_until_it_is_too_often(
    config: Config, calm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = copied(config, tmp_path / "run", learners=2, max_restarts=1)
    killers = [when_at(run, step, lambda: kill("learner")) for step in (4, 8)]
    with pytest.raises(TrainingError, match=r"learners: .* lost .* 1 restarts of the learners"):
        align(made, run)
    for killer in killers:
        killer.join(timeout=10)
    assert "the learners were started anew and go on from step 3" in capsys.readouterr().out
    assert restarts(run)["learners"] == 1
    assert sorted(losses(run)) == list(range(1, len(losses(run)) + 1))
    assert losses(run) == pytest.approx({step: loss for step, loss in losses(calm).items() if step in losses(run)}, rel=1e-3)
    assert all(gone(role) for role in ROLES), "nobody is left behind"


def test_sigterm_saves_and_the_same_command_goes_on(config: Config, calm: Run, tmp_path: Path) -> None:
    made, run = copied(config, tmp_path / "run", save_every_steps=1000)
    asked = when_at(run, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="align: stopped on request after step"):
        align(made, run)
    asked.join(timeout=10)
    found = checkpoint.latest(run.path("align", "checkpoints"))
    assert found is not None
    assert 4 <= found.step < STEPS
    assert not run.path("align", "model").exists()
    align(made, run)
    assert losses(run) == losses(calm)
    assert read_json(run.path("align", "outcome.json"))["step"] == STEPS
    for name in ("policy.safetensors", "tables.safetensors"):
        assert (run.path("align", "model") / name).read_bytes() == (calm.path("align", "model") / name).read_bytes()


def test_every_wait_has_a_limit() -> None:
    """No call that waits for another process is without one."""
    root = Path(__file__).parents[2] / "oxyray"
    for path in [*root.glob("align/*.py"), *root.glob("cluster/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "ray.get(" in line or "ray.wait(" in line:
                assert "timeout" in line, f"{path.name}:{number} waits without a limit"
