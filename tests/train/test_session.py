"""Whole training sessions of the real policy, without Ray: any number of workers trains the same model, and a run that stops goes on as
if it had not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from oxyray.config import Config, OptimConfig, TrainConfig, from_dict, to_dict
from oxyray.data.requests import request_segments, timeline
from oxyray.generate.engine import Generator
from oxyray.model.inputs import Inputs
from oxyray.model.saved import read_model
from oxyray.run import Run
from oxyray.train import checkpoint
from tests.evaluate.shop import prepared_run
from tests.train.train_workers import run as spawn

pytestmark = pytest.mark.slow
HEADS = {"tied": 1, "codes": 3}  # a head and the ZeRO stage that it is tried with


def session(config: dict[str, Any]) -> None:
    from oxyray.train.pretrain import PolicyTask
    from oxyray.train.session import Session

    made = from_dict(Config, config)
    run = Run(made.run_dir)
    Session(PolicyTask(made, run), run).train()


def two_workers(configs: dict[str, Any]) -> dict[str, Any]:
    for config in configs.values():
        session(config)
    return {}


def one_worker(configs: dict[str, Any]) -> dict[str, Any]:
    """All that one worker is enough for, in one process: starting one takes longer than the work."""
    for name in HEADS:
        session(configs[name])
    finished = Path(configs["tied"]["run_dir"])
    steps = sorted(int(path.name.removeprefix("step_")) for path in (finished / "pretrain" / "checkpoints").glob("step_*"))
    for name, kept in (("middle", steps[len(steps) // 3]), ("boundary", _boundary(finished)), ("stopped", steps[1])):
        config = configs[name]
        shutil.copytree(finished / "pretrain", Path(config["run_dir"]) / "pretrain")
        for step in steps:
            if step > kept:
                shutil.rmtree(Path(config["run_dir"]) / "pretrain" / "checkpoints" / f"step_{step:08d}")
        shutil.rmtree(Path(config["run_dir"]) / "pretrain" / "model")
        if name == "stopped":  # asked to stop at once: saves, leaves no model, and is not over
            stop = Path(config["run_dir"]) / "pretrain" / "stop"
            stop.touch()
            session(config)
            assert not (stop.parent / "model").exists()
            stop.unlink()
        session(config)
    for name in ("patience", "minutes", "longer"):
        session(configs[name])
    return {}


def _boundary(folder: Path) -> int:
    """A step at which an epoch ends."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return int(next(line["step"] for line in lines if line.get("epoch") == 1.0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("shop")
    config, _ = prepared_run(base)
    model = dataclasses.replace(config.model, dropout=0.0)
    optim = OptimConfig(lr=0.01, warmup_share=0.1)
    train = TrainConfig(
        epochs=2.5, targets_per_step=40, micro_batches=2, eval_requests=40, save_every_minutes=1e-9, keep_checkpoints=99, optim=optim
    )
    configs: dict[str, dict[str, Any]] = {}

    def add(name: str, head: str = "tied", **changes: Any) -> None:
        folder = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(Path(config.run_dir), folder)
        made = dataclasses.replace(
            config, run_dir=str(folder), model=dataclasses.replace(model, head=head), train=dataclasses.replace(train, **changes)
        )
        configs[name] = to_dict(made)

    for head, stage in HEADS.items():
        add(head, head, micro_batches=2 if head == "tied" else 1)  # the same cut of a step, and another one
        add(f"two {head}", head, workers=2, micro_batches=1, optim=dataclasses.replace(optim, zero_stage=stage))
    for name in ("middle", "boundary", "stopped"):
        add(name)
    add("patience", patience=2, eval_every_epochs=0.5, optim=dataclasses.replace(optim, lr=0.0, table_lr=0.0))
    add("minutes", max_minutes=1e-7)
    add("longer", epochs=1.0)
    spawn(2, two_workers, {name: values for name, values in configs.items() if name.startswith("two")})
    spawn(1, one_worker, configs)
    configs["longer"]["train"]["epochs"] = 2.0
    spawn(1, two_workers, {"longer": configs["longer"]})
    return {name: Path(values["run_dir"]) for name, values in configs.items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in Run(folder).metrics("pretrain") if "step" in line]


def losses(folder: Path) -> dict[int, float]:
    """The last line of a step counts: a run that went on tells some steps twice."""
    return {line["step"]: line["loss"] for line in lines(folder) if "loss" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = folder / "pretrain" / "model"
    return load_file(model / "policy.safetensors") | load_file(model / "tables.safetensors")


@pytest.mark.parametrize("head", HEADS)
def test_two_workers_train_the_model_of_one(runs: dict[str, Path], head: str) -> None:
    one, two = losses(runs[head]), losses(runs[f"two {head}"])
    assert len(one) >= 15
    assert one.keys() == two.keys()
    torch.testing.assert_close(list(two.values()), list(one.values()), atol=2e-5, rtol=0)
    a, b = weights(runs[head]), weights(runs[f"two {head}"])
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=1e-4, rtol=1e-3)


def test_training_learns(runs: dict[str, Path]) -> None:
    values = list(losses(runs["tied"]).values())
    assert np.mean(values[-4:]) < np.mean(values[:4]) - 0.1


@pytest.mark.parametrize("name", ["middle", "boundary", "stopped"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(runs: dict[str, Path], name: str) -> None:
    whole, resumed = losses(runs["tied"]), losses(runs[name])
    assert resumed == {step: loss for step, loss in whole.items() if step in resumed}
    assert max(resumed) == max(whole)
    a, b = weights(runs["tied"]), weights(runs[name])
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_no_gain_ends_training(runs: dict[str, Path]) -> None:
    found = checkpoint.latest(runs["patience"] / "pretrain" / "checkpoints")
    assert found is not None
    assert found.meta["course"]["ended"] == "no gain in 2 validations"
    hits = [line["valid_hit"] for line in lines(runs["patience"]) if "valid_hit" in line]
    assert len(hits) == 3


def test_time_ends_training_with_a_model(runs: dict[str, Path]) -> None:
    found = checkpoint.latest(runs["minutes"] / "pretrain" / "checkpoints")
    assert found is not None
    assert "max_minutes" in found.meta["course"]["ended"]
    assert (runs["minutes"] / "pretrain" / "model" / "model.json").exists()


def test_more_epochs_train_on_from_the_boundary(runs: dict[str, Path]) -> None:
    steps = [line["step"] for line in lines(runs["longer"]) if "loss" in line]
    epoch = _boundary(runs["longer"])
    assert steps == list(range(1, 2 * epoch + 1))


def test_what_is_logged(runs: dict[str, Path]) -> None:
    line = next(line for line in lines(runs["tied"]) if "loss" in line)
    assert {"loss", "ntp", "lr", "grad_norm", "epoch", "targets_per_second"} <= line.keys()
    assert sum(line[f"share_{part}"] for part in ("data", "sparse", "forward", "backward", "optimizer")) == pytest.approx(1, abs=1e-4)


def test_hit_rate_equals_asking_one_request_at_a_time(runs: dict[str, Path]) -> None:
    run = Run(runs["codes"])
    inputs = Inputs.load(run)
    about = json.loads(run.path("pretrain", "model", "model.json").read_text())
    policy, tables = read_model(run.path("pretrain", "model"), inputs)
    generator = Generator(policy, tables.lookup, inputs.catalog.index, inputs.prepared.train_counts_I(), beams=12)
    collate = inputs.collator(policy.config)
    time = timeline(inputs.prepared.events(0), splits=(0, 1))
    rows = np.flatnonzero(time.split_E == 1)
    chosen = rows[np.sort(np.random.default_rng(7).permutation(len(rows))[:40])]
    hits = 0
    for row in chosen:
        name = inputs.prepared.meta.scenarios[time.scenario_E[row]]
        batch = collate(time, request_segments(time, np.array([row]), policy.config.history))
        found = generator.generate(batch, 10, generator.pool(name, inputs.prepared.pools[name]))
        hits += int(time.item_E[row] in found.item_BR[0])
    assert about["valid_hit"] == pytest.approx(hits / len(chosen), abs=1e-6)
