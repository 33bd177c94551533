"""The stage `rank`: the unified ranker learns from the log what users do with what they are shown (paper 2.4.2), and is then measured on
the test split beside a point-wise model and boosted trees."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oxyray.config import Config
from oxyray.errors import Stopped
from oxyray.files import write_json
from oxyray.model.inputs import Inputs
from oxyray.model.tables import TableSpec
from oxyray.reward.compare import compare, text
from oxyray.reward.log import Log
from oxyray.reward.packing import RankBatch
from oxyray.reward.pages import stretches
from oxyray.reward.quality import auc, gauc
from oxyray.reward.ranker import HEADS, Ranker
from oxyray.reward.saved import packer_of, ranker_tables, write_ranker
from oxyray.reward.stream import RankStream
from oxyray.run import Run
from oxyray.stopping import asked_to_stop
from oxyray.train.course import deciding
from oxyray.train.driver import train
from oxyray.train.engine import TrainEngine

Array = np.ndarray
VALID = (1,)


def rank(config: Config, run: Run) -> None:
    """Train the ranker on the log of RUN/data (or its exposures); leave `RUN/rank/model` and `metrics.json`, and print the table.
    Raises as `oxyray.train.driver.train`."""
    inputs = Inputs.load(run)
    log = Log.of(config, run, inputs.prepared)
    train("oxyray.train.rank:RankTask", config, run)
    run.stamp("rank").unlink(missing_ok=True)  # of the ranker before, should the comparison be interrupted
    if asked_to_stop():
        raise Stopped("rank: stopped on request; the ranker is trained, and the same command goes on to compare it")
    found = compare(config, run, inputs, log)
    write_json(run.path("rank", "metrics.json"), found)
    for line in found["table"]:
        if line["scenario"] is None:
            run.log("rank", {name: value for name, value in line.items() if name != "scenario"})
    print(text(found), flush=True)


class RankTask:
    """Raises RunError when an earlier stage is missing."""

    stage, key, counted, chosen_by = "rank", "rank", "items", "valid_likelihood"

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run, self.settings = config, run, config.rank

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs.load(self.run)

    @cached_property
    def log(self) -> Log:
        return Log.of(self.config, self.run, self.inputs.prepared)

    def identity(self) -> dict[str, Any]:
        settings = {name: value for name, value in deciding(self.settings).items() if name not in ("baselines", "eval_items")}
        return {"rank": settings, **self.inputs.made_of}

    def module(self) -> Ranker:
        return Ranker(self.settings.model, self.inputs.vocab)

    def tables(self) -> list[TableSpec]:
        return ranker_tables(self.settings.model, self.inputs)

    def stream(self) -> RankStream:
        settings = self.settings
        packer, history = packer_of(self.inputs), settings.model.history
        return RankStream(self.log, packer, history=history, items_per_step=settings.items_per_step, seed=settings.seed)

    def validation(self, rank: int, world: int) -> Validation:
        return Validation(self, rank, world)

    def count(self, batch: RankBatch) -> int:
        return int(batch.weight())

    def flops(self, module: Ranker, batch: RankBatch) -> float:
        del module, batch
        return 0.0

    def write(self, folder: Path, weights: Mapping[str, torch.Tensor], **about: Any) -> None:
        write_ranker(folder, self.settings.model, self.inputs, weights, **about)


class Validation:
    """Pages of the validation split, drawn once by the seed and dealt out to the ranks."""

    def __init__(self, task: RankTask, rank: int, world: int) -> None:
        settings, packer = task.settings, packer_of(task.inputs)
        batches: list[RankBatch] = []
        self.requests, random = 0, np.random.default_rng(settings.seed)
        share = -(-settings.eval_requests // task.log.parts)
        for part in range(task.log.parts):
            pages = task.log.pages(part)
            taken = stretches(pages, settings.model.history, VALID)
            taken = taken.take(random.permutation(len(taken)))
            asked_B = np.cumsum(taken.stop_B - taken.asked_B)
            enough = 1 + int(np.searchsorted(asked_B, share)) if share else 0
            taken = taken.take(np.arange(min(len(taken), enough)))
            self.requests += int((taken.stop_B - taken.asked_B).sum())
            batches += packer.batches(pages, taken, settings.items_per_step)
        mine: list[RankBatch | None] = list(batches[rank::world])
        self._batches = mine + [None] * (-(-len(batches) // world) - len(mine))

    def measure(self, engine: TrainEngine, module: Ranker) -> dict[str, float]:
        """`valid_likelihood` (mean log-likelihood of what was done with a shown item), and of clicks `valid_auc` and `valid_gauc` (by
        page). Collective."""
        training = module.training
        module.eval()
        try:
            found = [self._one(engine, module, batch) for batch in self._batches]
        finally:
            module.train(training)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, [piece for piece in found if piece is not None])
        pieces = [piece for rank in everywhere for piece in rank]
        loss = sum(piece[0] for piece in pieces)
        page_Q = np.concatenate([np.full(len(piece[1]), number) * 1_000_000 + piece[3] for number, piece in enumerate(pieces)])
        chance_Q, click_Q = (np.concatenate([piece[place] for piece in pieces]) for place in (1, 2))
        return {
            "valid_likelihood": -loss / len(chance_Q),
            "valid_auc": auc(chance_Q, click_Q),
            "valid_gauc": gauc(chance_Q, click_Q, page_Q),
        }

    @torch.no_grad()
    def _one(self, engine: TrainEngine, module: Ranker, batch: RankBatch | None) -> tuple[float, Array, Array, Array] | None:
        """Loss, chance of a click, clicks, pages. A rank without a batch takes part in the lookup."""
        if batch is None:
            engine.lookup({})
            return None
        batch = batch.to(engine.device)
        rows = engine.lookup(batch.lookups())
        loss = float(module.loss(batch, rows).total)
        chance_Q = module.chances(batch, rows)[:, HEADS.index("click")].cpu().numpy()
        page_C = batch.page_C()
        asked_C = batch.asked_R[page_C]
        return loss, chance_Q, (batch.done_C[asked_C] > 0).cpu().numpy(), page_C[asked_C].cpu().numpy()
