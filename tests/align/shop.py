"""A run folder that is ready to be aligned: the evaluation's tiny shop with an untrained policy and an untrained ranker."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from oxyray.config import AlignConfig, ClusterConfig, Config, OptimConfig, RankConfig, RankerConfig, RewardConfig
from oxyray.model.inputs import Inputs
from oxyray.model.tables import PlainTables
from oxyray.reward.ranker import Ranker
from oxyray.reward.saved import ranker_tables, write_ranker
from oxyray.run import Run
from tests.evaluate.shop import whole_run

RANKER = RankerConfig(width=8, heads=2, layers=1, hidden=8, row_dim=4, history=6, text_input=False)
REWARDS = {"format": 1.0, "relative": 0.0, "click": 1.0, "conversion": 1.0, "gmv": 0.1, "diversity": 0.5}


def ready_run(base: Path, **align: Any) -> Config:
    made, run = whole_run(base)
    inputs = Inputs.load(run)
    torch.manual_seed(1)
    ranker = Ranker(RANKER, inputs.vocab)
    write_ranker(run.path("rank", "model"), RANKER, inputs, ranker.state_dict())
    PlainTables.fresh(ranker_tables(RANKER, inputs), 1).save(run.path("rank", "model", "tables.safetensors"))
    settings: dict[str, Any] = {
        "steps": 6, "requests_per_step": 24, "pieces": 2, "group": 4, "supervised_targets": 30, "synthetic_share": 0.3, "staleness": 0,
        "eval_every_steps": 3, "eval_requests": 40, "save_every_steps": 2, "timeout_s": 120.0,
        "optim": OptimConfig(lr=0.03, table_lr=0.02, warmup_share=0.0, schedule="constant"),
    }  # fmt: skip
    return dataclasses.replace(
        made,
        rank=RankConfig(model=RANKER),
        reward=RewardConfig(weights={"default": REWARDS}),
        align=AlignConfig(**(settings | align)),
        cluster=ClusterConfig(object_store_gb=0.1, start_timeout_s=300),
    )


def copied(config: Config, folder: Path, **align: Any) -> tuple[Config, Run]:
    """The same run in a folder of its own, with other settings of `align`."""
    shutil.copytree(config.run_dir, folder, ignore=shutil.ignore_patterns("align", "metrics.jsonl"))
    made = dataclasses.replace(config, run_dir=str(folder), align=dataclasses.replace(config.align, **align))
    return made, Run(folder)


def losses(run: Run) -> dict[int, float]:
    """The last line of a step counts: a run that went on tells some steps twice."""
    return {line["step"]: line["loss"] for line in run.metrics("align") if "loss" in line}
