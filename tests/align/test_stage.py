"""The stage on a real Ray: whole runs, synchronous and one step off, more processes, killed and stopped ones, and a reward that fails."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oxyray.align.loop import Course
from oxyray.align.stage import align
from oxyray.config import Config, ObjectiveConfig, RewardConfig
from oxyray.errors import ClusterError, RewardError, Stopped, TrainingError
from oxyray.files import read_json
from oxyray.model.inputs import Inputs
from oxyray.model.saved import model_folder, read_model
from oxyray.reward.components import Candidates, Shop
from oxyray.run import Run
from oxyray.train import checkpoint
from tests.align.shop import copied, losses, ready_run
from tests.chaos.victims import ROLES, gone, kill, when_at, when_seen

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 12


class Broken:
    """A reward that cannot be computed."""

    def __init__(self, shop: Shop) -> None:
        del shop

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        return torch.full(candidates.item_BJ.shape, torch.nan)


@pytest.fixture(scope="module")
def config(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return ready_run(tmp_path_factory.mktemp("shop"), steps=STEPS, eval_every_steps=6, save_every_steps=3)


@pytest.fixture(scope="module")
def synchronous(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made, run = copied(config, tmp_path_factory.mktemp("synchronous") / "run")
    align(made, run)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy.safetensors") | load_file(folder / "tables.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_logs_and_leaves_the_best(config: Config, synchronous: Run) -> None:
    lines = synchronous.metrics("align")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert max(line["drift"] for line in steps) < 1e-4, "in synchronous mode trainer and rollout hold the same weights"
    assert {line["staleness"] for line in steps} == {0}
    told = {"reward/all/click", "reward/home/diversity", "entropy", "distinct", "filled", "gate_under_half", "ratio_q99", "advantage_std"}
    assert told | {"seconds/generate", "seconds/judge", "seconds/learn", "seconds/publish", "restarts/rollout"} <= steps[-1].keys()
    valid = [line for line in lines if "valid_hit" in line]
    assert [line["step"] for line in valid] == [0, 6, 12]
    outcome = read_json(synchronous.path("align", "outcome.json"))
    assert outcome["best"] == max(line["valid_hit"] for line in valid)
    assert outcome["start"] == valid[0]["valid_hit"]
    assert outcome["best_step"] in (0, 6, 12)
    about = read_json(synchronous.path("align", "model", "model.json"))
    assert about["aligned_steps"] == outcome["best_step"]
    assert model_folder(synchronous) == synchronous.path("align", "model")
    read_model(synchronous.path("align", "model"), Inputs.load(synchronous))
    if outcome["best_step"] == 0:
        assert equal(weights(synchronous.path("align", "model")), weights(synchronous.path("pretrain", "model")))
    assert not list(Path("/dev/shm").glob(f"oxyray-*-{os.getpid()}")), "published tables are taken away"


def restarts(run: Run) -> dict[str, int]:
    """The most that a line tells of each role."""
    lines = [line for line in run.metrics("align") if "loss" in line]
    return {role: max(line[f"restarts/{role}"] for line in lines) for role in ("rollout", "judge", "learners")}


def test_whoever_is_killed_the_run_learns_what_an_undisturbed_one_of_fewer_processes_learns(
    config: Config, synchronous: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands on one run: a learner that dies before it has joined, a death of every role, a stop on request; then the rest."""
    made, run = copied(config, tmp_path / "run", learners=2, rollouts=2, judges=2, max_restarts=2)
    events = [when_seen("learner", lambda: kill("learner"))]
    events += [when_at(run, step, lambda role=role: kill(role)) for step, role in ((2, "rollout"), (3, "judge"), (5, "learner"))]
    events.append(when_at(run, 9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match="align: stopped on request after step"):
        align(made, run)
    for event in events:
        event.join(timeout=10)
    told = capsys.readouterr().out
    assert "the learners were started anew and go on from step 0" in told
    assert "the learners were started anew and go on from step 3" in told
    assert restarts(run) == {"rollout": 1, "judge": 1, "learners": 2}
    assert all(gone(role) for role in ROLES), "nobody is left behind"
    found = checkpoint.latest(run.path("align", "checkpoints"))
    assert found is not None
    assert 9 <= found.step < STEPS
    assert not run.path("align", "model").exists()

    fewer = dataclasses.replace(made, align=dataclasses.replace(made.align, learners=1, rollouts=1, judges=1))
    align(fewer, run)
    assert losses(run) == pytest.approx(losses(synchronous), rel=1e-3), "no candidate was lost, counted twice, or made by other weights"
    assert read_json(run.path("align", "outcome.json"))["step"] == STEPS


def test_weights_that_are_broadcast_are_the_same_also_where_a_receiver_dies(
    config: Config, synchronous: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = copied(config, tmp_path / "run", dense="broadcast", rollouts=2, steps=8)
    death = when_at(run, 3, lambda: kill("rollout"))
    align(made, run)
    death.join(timeout=10)
    assert restarts(run) == {"rollout": 1, "judge": 0, "learners": 0}
    want = losses(synchronous)
    assert losses(run) == pytest.approx({step: want[step] for step in range(1, 9)}, rel=1e-3)
    assert "another takes its place" in capsys.readouterr().out


def test_one_step_off_is_bounded_and_seen_and_so_is_the_distance_from_the_start(config: Config, tmp_path: Path) -> None:
    """At its end the learner is killed: once too often."""
    made, run = copied(config, tmp_path / "run", staleness=1, objective=ObjectiveConfig(kl=0.1), max_restarts=0)
    death = when_at(run, STEPS - 4, lambda: kill("learner"))
    with pytest.raises(TrainingError, match=r"learners: .* lost .* 0 restarts of the learners"):
        align(made, run)
    death.join(timeout=10)
    lines = [line for line in run.metrics("align") if "loss" in line]
    assert len(lines) >= STEPS - 4
    assert [line["staleness"] for line in lines] == [0] + [1] * (len(lines) - 1)
    assert max(line["drift"] for line in lines[1:]) > 1e-3, "weights moved between generation and learning"
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5), "it starts at the supervised policy"
    assert lines[-1]["kl"] > 1e-3


def test_a_validation_that_is_no_better_leaves_the_best() -> None:
    course = Course()
    reached = []
    for course.step, hit in enumerate((0.3, 0.2, 0.3, 0.4, 0.1)):
        reached.append(course.reached(hit))
    assert reached == [True, False, False, True, False]
    assert (course.start, course.best, course.best_step) == (0.3, 0.4, 3)


def test_what_lies_in_best_is_known_after_going_back() -> None:
    course = Course(step=6, best=0.3, best_step=6, start=0.2)
    course.adopt({"step": 9, "valid_hit": 0.35})
    assert (course.best, course.best_step) == (0.35, 9)
    course.adopt({"step": 12, "valid_hit": 0.34})
    course.adopt({"step": 12})
    assert (course.best, course.best_step) == (0.35, 9)
    new = Course()
    new.adopt({"step": 9, "valid_hit": 0.35})
    assert new == Course(), "best/ is an earlier run's"


def test_a_reward_that_fails_is_an_error_and_no_number(config: Config, tmp_path: Path) -> None:
    made, run = copied(config, tmp_path / "run")
    own = RewardConfig(components={"own": f"{__name__}:Broken"}, weights={"default": {"own": 1.0}})
    with pytest.raises(RewardError, match="reward own: request 0, candidate 0"):
        align(dataclasses.replace(made, reward=own), run)
    assert not losses(run)


def test_too_few_places_are_named(config: Config, tmp_path: Path) -> None:
    made, run = copied(config, tmp_path / "run", rollouts=30, layout="split")
    with pytest.raises(ClusterError, match=r"\d+ CPUs are asked for, Ray has \d+: use fewer align.learners"):
        align(made, run)
