"""A run that stops and goes on must equal one that never stopped: at the same size exactly, at another size within rounding."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oxyray.config import OptimConfig
from oxyray.errors import RunError
from oxyray.train import checkpoint
from oxyray.train.engine import TrainEngine
from tests.train.toy import SPECS, ToyPolicy, global_steps
from tests.train.train_workers import run

pytestmark = pytest.mark.slow
OPTIM = OptimConfig(lr=0.02, table_lr=0.1, clip=0.7, weight_decay=0.01, warmup_share=0.2)
STEPS, HALF, PIECES = 6, 3, 4
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def engine_for(stage: int, found: checkpoint.Checkpoint | None = None) -> TrainEngine:
    policy = ToyPolicy(seed=99 if found else 0)
    if found:
        policy.load_state_dict(found.weights())
    made = TrainEngine(
        policy,
        SPECS,
        dataclasses.replace(OPTIM, zero_stage=stage),
        total_steps=STEPS,
        micro_batches=PIECES // dist.get_world_size(),
        seed=5,
        moments=found.moments() if found else None,
        deepspeed=SPLIT_ALL,
    )
    if found:
        found.load_tables(made.tables)
    return made


def advance(engine: TrainEngine, until: int) -> list[float]:
    """The same global batches for any number of ranks."""
    data = global_steps(STEPS, 1, PIECES)
    return [engine.step(data[n][0][dist.get_rank() :: dist.get_world_size()]).loss for n in range(engine.step_count, until)]


def state(engine: TrainEngine) -> dict[str, Any]:
    parts = {f"{key}/{name}": value for name, values in engine.dense() for key, value in values.items()}
    return {"dense": parts, "tables": engine.tables.plain().tables, "policy": engine.gather_dense()}


def begin(folder: str) -> dict[str, Any]:
    """Train half, save, train the rest without a stop."""
    found = {}
    for stage in range(4):
        engine = engine_for(stage)
        losses = advance(engine, HALF)
        checkpoint.save(Path(folder) / f"stage{stage}", engine, {"position": {"epoch": 0, "step": HALF}}, keep=2)
        losses += advance(engine, STEPS)
        found[f"stage{stage}"] = {"losses": losses, **state(engine)}
        engine.close()
    return found


def go_on(folder: str, shift: int) -> dict[str, Any]:
    """Load what stage s saved at stage s + shift, train the rest."""
    found = {}
    for stage in range(4):
        saved = checkpoint.latest(Path(folder) / f"stage{stage}")
        assert saved is not None
        assert saved.step == HALF
        engine = engine_for((stage + shift) % 4, saved)
        losses = advance(engine, STEPS)
        found[f"stage{stage}"] = {"losses": losses, **state(engine)}
        engine.close()
    return found


def second_visit(two: str, one: str) -> dict[str, Any]:
    full = disk_full_on_one(Path(two) / "full")
    return {"same": go_on(two, 0), "grown": go_on(one, 0), "stages": go_on(two, 1), "full": full}


def first_visit(two: str, one: str) -> dict[str, Any]:
    return {"fresh": begin(one), "shrunk": go_on(two, 0), "same": go_on(one, 0), "faults": faults(Path(one) / "faults"),
            "behind": behind_others(Path(one) / "behind")}  # fmt: skip


def disk_full_on_one(folder: Path) -> dict[str, Any]:
    """One rank cannot write its tables: all must hear of it, and none may wait for the others in a gathering that these never enter."""
    engine = engine_for(1)
    checkpoint.save(folder, engine, {}, keep=1)
    real, told = checkpoint.save_file, ""

    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    advance(engine, 1)
    checkpoint.save_file = full if dist.get_rank() else real
    try:
        checkpoint.save(folder, engine, {}, keep=1)
    except RunError as error:
        told = str(error)
    checkpoint.save_file = real
    last = checkpoint.latest(folder)
    engine.close()
    return {"told": told, "kept": last.step if last else -1}


def behind_others(folder: Path) -> int:
    """The newest checkpoint after a run that begins anew in a folder with damaged ones of later steps."""
    for step in (400, 500):
        (folder / f"step_{step:08d}").mkdir(parents=True)
    engine = engine_for(1)
    advance(engine, 1)
    made = checkpoint.save(folder, engine, {}, keep=2)
    advance(engine, 2)
    checkpoint.save(folder, engine, {}, keep=2)
    assert made.is_dir()
    last = checkpoint.latest(folder)
    engine.close()
    return last.step if last else -1


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def faults(folder: Path) -> dict[str, Any]:
    """Die at every flush of a save in turn, then run out of disk: an older checkpoint must stay, and whatever is named a checkpoint must
    load."""
    engine = engine_for(1)
    advance(engine, 1)
    checkpoint.save(folder, engine, {}, keep=1)
    advance(engine, 2)
    real, deaths, steps = checkpoint._flush, 0, []
    for moment in range(1, 20):
        calls = 0

        def flush(path: Path, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Killed
            real(path)

        checkpoint._flush = flush
        try:
            checkpoint.save(folder, engine, {}, keep=1)
        except Killed:
            deaths += 1
        finally:
            checkpoint._flush = real
        found = checkpoint.latest(folder)
        assert found is not None
        assert torch.isfinite(found.weights()["first.weight"]).all()
        found.load_tables(engine_for(1, found).tables)
        steps.append(found.step)
        checkpoint.sweep(folder)
        if calls < moment:
            break

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint._flush = full
    try:
        advance(engine, 3)
        checkpoint.save(folder, engine, {}, keep=1)
        message = ""
    except RunError as error:
        message = str(error)
    finally:
        checkpoint._flush = real
    last = checkpoint.latest(folder)
    return {"deaths": deaths, "steps": steps, "message": message, "kept": last.step if last else -1}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    two, one = str(tmp_path_factory.mktemp("two")), str(tmp_path_factory.mktemp("one"))
    found: dict[str, Any] = {"two": run(2, begin, two)[0]}
    found["one"] = run(1, first_visit, two, one)[0]
    ranks = run(2, second_visit, two, one)
    torch.testing.assert_close(ranks[0]["same"]["stage1"]["losses"], ranks[1]["same"]["stage1"]["losses"])
    found["again"] = ranks[0]
    return found


def check(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    for stage in range(4):
        a, b = got[f"stage{stage}"], want[f"stage{stage}"]
        torch.testing.assert_close(a["losses"], b["losses"][-len(a["losses"]) :], atol=tolerance * 10, rtol=0)
        for part in ("dense", "tables", "policy"):
            assert a[part].keys() == b[part].keys()
            for name in a[part]:
                torch.testing.assert_close(a[part][name], b[part][name], atol=tolerance, rtol=0)


def test_same_size_goes_on_exactly(results: Any) -> None:
    check(results["again"]["same"], results["two"], 0.0)
    check(results["one"]["same"], results["one"]["fresh"], 0.0)


def test_two_to_one(results: Any) -> None:
    check(results["one"]["shrunk"], results["two"], 1e-6)


def test_one_to_two(results: Any) -> None:
    check(results["again"]["grown"], results["one"]["fresh"], 1e-6)


def test_another_zero_stage_goes_on(results: Any) -> None:
    check(results["again"]["stages"], results["two"], 1e-6)


def test_death_or_full_disk_while_saving_loses_nothing(results: Any) -> None:
    found = results["one"]["faults"]
    assert found["deaths"] >= 5
    assert set(found["steps"]) == {1, 2}
    assert found["steps"] == sorted(found["steps"])
    assert "no space left" in found["message"]
    assert found["kept"] == 2


def test_a_full_disk_of_one_worker_is_told_by_all(results: Any) -> None:
    assert "worker 1: no space left" in results["again"]["full"]["told"]
    assert results["again"]["full"]["kept"] == 0


def test_what_lies_ahead_of_a_run_does_not_crowd_out_its_own(results: Any) -> None:
    assert results["one"]["behind"] == 2


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        checkpoint._put(folder / "meta.json", f'{{"format": 1, "step": {step}}}')
        checkpoint._put(folder / "complete", f'{{"meta.json": {(folder / "meta.json").stat().st_size}}}')
    assert checkpoint.latest(tmp_path).step == 2  # type: ignore[union-attr]
    (tmp_path / "step_00000002" / "meta.json").write_text("{")
    assert checkpoint.latest(tmp_path).step == 1  # type: ignore[union-attr]
    (tmp_path / "step_00000001" / "complete").unlink()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
