"""A fleet and a group on a real Ray: members are killed, hang, and raise."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from oxyray.cluster.fleet import Fleet, Member
from oxyray.cluster.group import Group, Rank
from oxyray.cluster.placement import colocated, split
from oxyray.cluster.wait import GroupLost
from oxyray.errors import ClusterError, RewardError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]


class Worker(Member):
    """Notes who did what in a file, so that a test sees what a dead process did."""

    def __init__(self, notes: str) -> None:
        self.notes, self.version = Path(notes), -1

    def load(self, version: int) -> None:
        self.version = version

    def work(self, number: int, die_once: str = "", sleep: float = 0.0) -> tuple[int, int]:
        with open(self.notes, "a") as file:
            file.write(f"{number}\n")
        if die_once and not Path(die_once).exists():
            Path(die_once).touch()
            os._exit(1)
        time.sleep(sleep if not (die_once and Path(die_once).exists()) else 0)
        return number, self.version

    def hang_once(self, mark: str) -> int:
        if not Path(mark).exists():
            Path(mark).touch()
            time.sleep(600)
        return self.version

    def fail(self) -> None:
        raise RewardError("reward click: request 3 scored nan")


class Step(Rank):
    def __init__(self, die: bool = False, absent: bool = False) -> None:
        self.die, self.absent = die, absent

    def join(self, *places: Any) -> None:
        if self.absent:
            os._exit(1)
        super().join(*places)

    def total(self, value: float) -> float:
        import torch

        if self.die:
            os._exit(1)
        summed = torch.tensor(value)
        torch.distributed.all_reduce(summed)
        return float(summed)

    def fail(self, after_s: float) -> float:
        """As ranks do whose neighbour dies: those that live see a broken connection, and may be first to say so."""
        time.sleep(after_s)
        if self.die:
            os._exit(1)
        raise RuntimeError("connection closed by peer")


def fleet(tmp_path: Path, members: int, **limits: Any) -> Fleet:
    import ray

    made: Any = ray.remote(Worker).options(max_restarts=-1, num_cpus=0)
    return Fleet(
        "worker", [made.remote(str(tmp_path / "notes")) for _ in range(members)], **({"seconds": 60.0, "max_restarts": 3} | limits)
    )


def test_every_job_is_answered_once_and_a_newcomer_is_enrolled_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workers = fleet(tmp_path, 2)
    workers.enrol("load", version=7)
    for number in range(6):
        workers.submit(number, "work", number=number, die_once=str(tmp_path / "died") if number == 2 else "")
    answers = workers.collect(range(6), "six jobs")
    assert answers == [(number, 7) for number in range(6)], "the restarted worker had the version before it served"
    assert workers.restarts == 1
    assert capsys.readouterr().out.count("was lost") == 1, "told in one line"
    done = sorted(map(int, (tmp_path / "notes").read_text().split()))
    assert done == [0, 1, 2, 2, 3, 4, 5], "only the job of the dead worker was done again"
    assert workers.idle()
    workers.stop()


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    workers = fleet(tmp_path, 1, seconds=4.0)
    workers.enrol("load", version=3)
    workers.submit("a", "hang_once", mark=str(tmp_path / "mark"))
    assert workers.collect(["a"], "a job") == [3]
    assert workers.restarts == 1
    workers.stop()


def test_too_many_deaths_and_own_errors_end_it_with_their_reason(tmp_path: Path) -> None:
    workers = fleet(tmp_path, 1, max_restarts=0)
    workers.submit("a", "work", number=1, die_once=str(tmp_path / "once"))
    with pytest.raises(ClusterError, match=r"worker 0 was lost .* 0 restarts"):
        workers.collect(["a"], "a job")
    workers.stop()
    workers = fleet(tmp_path, 1)
    workers.submit("b", "fail")
    with pytest.raises(RewardError, match="request 3 scored nan"):
        workers.collect(["b"], "a job")
    workers.forget()
    workers.submit("c", "work", number=1)
    assert workers.collect(["c"], "a job") == [(1, -1)]
    assert workers.restarts == 0, "who raises an error of its own lives"
    workers.stop()


def test_a_death_while_idle_is_noticed_before_the_next_job(tmp_path: Path) -> None:
    import ray

    workers = fleet(tmp_path, 2)
    workers.enrol("load", version=1)
    ray.kill(workers.actors[0], no_restart=False)
    for number in range(4):
        workers.submit(number, "work", number=number)
    assert sorted(workers.collect(range(4), "jobs")) == [(number, 1) for number in range(4)]
    workers.stop()


def test_a_group_works_in_step_and_is_lost_together() -> None:
    import ray

    made: Any = ray.remote(Step).options(num_cpus=0)
    group = Group(lambda rank: made.remote(), 2, 60.0, "learner")
    group.form()
    assert group.call("total", [(1.0,), (2.5,)]) == [3.5, 3.5]
    group.stop()
    group = Group(lambda rank: made.remote(rank == 1), 2, 60.0, "learner")
    group.form()
    began = time.monotonic()
    with pytest.raises(GroupLost, match="learners: total: a process was lost"):
        group.call("total", [(1.0,), (2.0,)])
    assert time.monotonic() - began < 30, "nobody waits for the lost one"
    group.stop()
    group = Group(lambda rank: made.remote(absent=rank == 1), 2, 60.0, "learner")
    with pytest.raises(GroupLost, match="learners: join: a process was lost"):
        group.form()
    group.stop()


def test_a_group_is_lost_also_where_another_rank_speaks_before_the_death_is_known() -> None:
    import ray

    made: Any = ray.remote(Step).options(num_cpus=0)
    group = Group(lambda rank: made.remote(rank == 1), 2, 60.0, "learner")
    group.form()
    with pytest.raises(GroupLost, match="learners: fail: a process was lost"):
        group.call("fail", [(0.0,), (2.0,)])
    group.stop()
    group = Group(lambda rank: made.remote(), 2, 60.0, "learner")
    group.form()
    with pytest.raises(RuntimeError, match="connection closed by peer"):  # nobody died: an error of its own
        group.call("fail", [(0.0,), (1.0,)])
    group.stop()


def test_places() -> None:
    plan = colocated(2, 3, 1, gpu=True)
    assert [bundle["GPU"] for bundle in plan.bundles] == [1.0, 1.0, 1.0]
    assert [bundle["CPU"] for bundle in plan.bundles] == [3.0, 2.0, 1.0]
    many = [way(2, rollouts, judges, gpu=True) for way in (colocated, split) for rollouts in (1, 2, 3) for judges in range(1, 17)]
    for each in (plan, *many):
        used = [0] * len(each.bundles)
        for role, places in each.places.items():
            for place in places:
                used[place] += round(10_000 * each.gpus[role])  # as Ray counts
        assert max(used) <= 10_000, "no device is promised twice"
        assert min(each.gpus.values()) > 0
        assert sum(bundle["CPU"] for bundle in each.bundles) == sum(map(len, each.places.values()))
    assert split(2, 3, 1, gpu=False).bundles == [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0}, {"CPU": 1.0}]
    assert colocated(1, 1, 1, gpu=False).gpus == {}


def test_members_that_raise_while_they_are_enrolled_live_on(tmp_path: Path) -> None:
    made = fleet(tmp_path, 3, max_restarts=0)
    with pytest.raises(RewardError, match="request 3 scored nan"):
        made.enrol("fail")
    assert made.healthy() == [0, 1, 2]
    made.enrol("load", version=4)
    for number in range(3):
        made.submit(number, "work", number=number)
    assert made.collect(range(3), "work") == [(number, 4) for number in range(3)]
    assert made.restarts == 0
    made.stop()
