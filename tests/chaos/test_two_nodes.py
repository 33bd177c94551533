"""The stage on a Ray cluster of two nodes: what it learns there is what it learns on one, and it outlives the loss of the second.

Both nodes are of this machine and see the same shared memory; rows go by Ray's node ids all the same (`oxyray.cluster.rows`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oxyray.align import loop
from oxyray.align.crew import Crew
from oxyray.align.stage import align
from oxyray.cluster.fleet import Fleet
from oxyray.cluster.placement import Plan, options, reserved
from oxyray.cluster.publish import PublishedShard
from oxyray.cluster.rows import RowsLost, SpreadReader, dismiss, here, serve
from oxyray.cluster.wait import ProcessLost
from oxyray.config import Config
from oxyray.run import Run
from tests.align.shop import copied, losses, ready_run
from tests.chaos.nodes import Place, Worker, cluster_of_one

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
HEAD_CPUS, STEPS = 4, 4  # two learners, a rollout worker and a judge: the head alone has room for all


class Witness:
    """Stands in for the loop's `run`: notes where the crew is after each step, then calls `after` with the step."""

    def __init__(self, place: Place, after: Callable[[int], None]) -> None:
        self._run, self._place, self._after = loop.run, place, after
        self.crew: Crew | None = None
        self.learners: list[set[str]] = []
        self.rollouts: list[str] = []
        self.readers: list[set[str]] = []

    def run(self, crew: Crew, settings: Any, course: Any, log: Any, stopping: Any) -> None:
        self.crew = crew
        self._place.free()

        def logged(told: dict[str, Any], step: int) -> None:
            log(told, step)
            if "loss" in told:
                self._look(crew)
                self._after(step)

        self._run(crew, settings, course, logged, stopping)

    def _look(self, crew: Crew) -> None:
        import ray

        def about(worker: Any) -> tuple[str, set[str]]:
            return here(), {type(reader).__name__ for reader in worker.rollout._readers.values()}

        node, readers = ray.get(crew.rollouts.actors[0].apply.remote(about), timeout=120)
        self.learners.append(set(crew.learners.nodes))
        self.rollouts.append(node)
        self.readers.append(readers)


@pytest.fixture(scope="module")
def place(no_ray: None) -> Iterator[Place]:
    with cluster_of_one(HEAD_CPUS) as made:
        yield made


@pytest.fixture(scope="module")
def config(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Config:
    made = ready_run(tmp_path_factory.mktemp("shop"), steps=STEPS, layout="split", eval_every_steps=STEPS)
    return dataclasses.replace(made, cluster=dataclasses.replace(made.cluster, address=place.cluster.address))


def drift(run: Run) -> float:
    """By how much trainer and rollout differ on a probability: no wrong row would pass."""
    return float(max(line["drift"] for line in run.metrics("align") if "drift" in line))


@pytest.fixture(scope="module")
def away(place: Place, config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Witness, str]:
    """A run whose rollout worker is on the second node until that is lost; who saw it, and the node's id."""
    made, run = copied(config, tmp_path_factory.mktemp("away") / "run")
    witness = Witness(place, lambda step: place.lose() if step == 2 else None)
    with pytest.MonkeyPatch.context() as patch, place.second(cpus=2, left=1) as second:
        patch.setattr(loop, "run", witness.run)
        align(made, run)
    return run, witness, second


def test_a_rollout_worker_away_from_the_learner_reads_its_rows_and_moves_when_its_node_is_lost(away: tuple[Run, Witness, str]) -> None:
    run, witness, second = away
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert drift(run) < 1e-4
    assert witness.learners == [{here()}] * STEPS
    assert witness.rollouts == [second, second, here(), here()]
    assert witness.readers == [{"SpreadReader"}] * 2 + [{"TableReader"}] * 2
    last = [line for line in run.metrics("align") if "loss" in line][-1]
    assert (last["restarts/rollout"], last["restarts/learners"]) == (1, 0)
    assert witness.crew is not None
    assert not witness.crew.tables.exists()


def test_learners_on_two_nodes_serve_one_table_and_begin_again_on_one_when_a_node_is_lost(
    place: Place, config: Config, away: tuple[Run, Witness, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = copied(config, tmp_path / "run", learners=2)
    lost: list[int] = []

    def after(step: int) -> None:
        if step == 3 and not lost:
            lost.append(step)
            place.lose()

    witness = Witness(place, after)
    monkeypatch.setattr(loop, "run", witness.run)
    with place.second(cpus=3, left=1) as second:
        align(made, run)
    assert losses(run) == pytest.approx(losses(away[0]), rel=1e-3), "two learners add up in another order than one"
    assert drift(run) < 1e-4
    assert witness.learners == [{here(), second}] * 3 + [{here()}] * 2, "they began again from the checkpoint of step 2"
    assert witness.rollouts == [second] * 3 + [here()] * 2
    assert witness.readers == [{"SpreadReader"}] * 3 + [{"TableReader"}] * 2
    assert witness.crew is not None
    assert witness.crew.restarts == 1
    assert not witness.crew.tables.exists()


def test_real_servers_answer_come_back_and_are_told_from_those_that_never_will(place: Place, tmp_path: Path) -> None:
    import ray

    folder = tmp_path / "tables"
    with place.second(cpus=1, left=1) as second:
        for rank, node in enumerate((here(), second)):
            row_RD = np.arange(10 * rank, 10 * rank + 10, dtype=np.float32)[:, None].repeat(3, axis=1)
            PublishedShard(folder / node, "item", rank, 10 * rank, 10, 3).publish(7, np.arange(10), row_RD)
        servers = serve([here(), second, second], {}, 120.0)
        assert [node for node, _ in servers] == [here(), second]
        by_node, ids = dict(servers), np.array([19, 0, 10, 9, 9])
        readers = [SpreadReader(folder, "item", own, by_node) for own in (here(), "another")]
        for reader in readers:
            rows, version = reader.read(ids, seconds=60)
            assert (version, rows[:, 0].tolist()) == (7, ids.tolist())
        ray.kill(by_node[second], no_restart=False)
        for reader in readers:
            assert reader.read(ids, seconds=60)[0][:, 2].tolist() == ids.tolist(), "a server that died comes back"
        place.lose()
        assert readers[0].read(np.array([3]), seconds=60)[1] == 7, "rows at hand need nobody"
        began = time.monotonic()
        with pytest.raises(RowsLost, match="table item: its rows on several nodes could not be read in one version"):
            readers[0].read(ids, seconds=60)
        assert time.monotonic() - began < 50, "nobody waits for a node that is gone"
        dismiss(servers, folder)
        assert not folder.exists()


def test_a_lost_place_that_nobody_has_room_for_is_an_error_in_time(place: Place) -> None:
    plan = Plan(bundles=[{"CPU": 2.0}], places={"rollout": [0]}, gpus={})
    with place.second(cpus=2, left=1), reserved(plan, 60.0, "") as group:
        import ray

        made: Any = ray.remote(Worker).options(max_restarts=-1, **options(plan, group, "rollout", 0))
        workers = Fleet("rollout worker", [made.remote()], 4.0, 4)
        ray.get(workers.actors[0].ping.remote(), timeout=120)
        workers.enrol("load", version=1)
        place.lose()
        workers.submit("a", "work")
        began = time.monotonic()
        with pytest.raises(ProcessLost, match="generation: no rollout worker answered within 12 s; 1 jobs are missing"):
            workers.collect(["a"], "generation")
        assert time.monotonic() - began < 60
        workers.stop()


def _pid(worker: Any) -> int:
    del worker
    return os.getpid()


def test_a_worker_that_died_and_came_back_unseen_is_enrolled_before_it_serves(place: Place) -> None:
    import ray

    del place
    made: Any = ray.remote(Worker).options(max_restarts=-1, num_cpus=0)
    workers = Fleet("worker", [made.remote()], 60.0, 4)
    workers.enrol("load", version=5)
    first = ray.get(workers.actors[0].apply.remote(_pid), timeout=60)
    ray.kill(workers.actors[0], no_restart=False)  # it takes a while: the first answers may still be the old one's
    back = time.monotonic() + 60
    while True:
        assert time.monotonic() < back
        try:
            if ray.get(workers.actors[0].apply.remote(_pid), timeout=60) != first:
                break
        except ray.exceptions.RayActorError:
            pass
        time.sleep(0.1)
    workers.submit("a", "work")
    assert workers.collect(["a"], "a job") == [5]
    assert workers.restarts == 1
    workers.stop()
