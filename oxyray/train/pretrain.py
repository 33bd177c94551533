"""The stage `pretrain`: the policy learns from the users' histories, to predict every event from what was before it (paper 2.3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oxyray.config import Config, to_dict
from oxyray.data.batch import Batch
from oxyray.data.stream import SegmentStream
from oxyray.model.flops import training_flops
from oxyray.model.inputs import Inputs, check_beams
from oxyray.model.policy import Policy
from oxyray.model.saved import about_model, write_model
from oxyray.model.tables import TableSpec
from oxyray.run import Run
from oxyray.train.course import deciding
from oxyray.train.driver import train
from oxyray.train.validate import Validation


def pretrain(config: Config, run: Run) -> None:
    """Train the policy of RUN/data and RUN/sid; leave `RUN/pretrain/model`. Raises as `oxyray.train.driver.train`."""
    train("oxyray.train.pretrain:PolicyTask", config, run)


class PolicyTask:
    """Raises RunError when an earlier stage is missing, ConfigError when more beams are asked for than there are SIDs."""

    stage, key, counted, chosen_by = "pretrain", "train", "targets", "valid_hit"

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run, self.settings = config, run, config.train
        check_beams(config, self.inputs)

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs.load(self.run)

    def identity(self) -> dict[str, Any]:
        data = self.inputs.made_of
        if self.config.model.retrieval.q2i:  # it compares requests with the others of their micro-batch
            data["micro_batches"] = str(self.settings.micro_batches)
        return {"model": to_dict(self.config.model), "train": deciding(self.settings), **data}

    def module(self) -> nn.Module:
        return self.inputs.policy(self.config.model)

    def tables(self) -> list[TableSpec]:
        return self.inputs.tables(self.config.model)

    def stream(self) -> SegmentStream:
        model, settings = self.config.model, self.settings
        return SegmentStream(
            self.inputs.prepared,
            self.inputs.collator(model, settings),
            history=model.history,
            targets_per_step=settings.targets_per_step,
            seed=settings.seed,
            one_query=not model.causal_encoder,
            overfit_steps=settings.overfit_batches,
            held_back=settings.hold_back,
            which="earlier",
        )

    def validation(self, rank: int, world: int) -> Validation:
        return Validation(self.config, self.inputs, rank, world, self.settings.eval_requests)

    def count(self, batch: Batch) -> int:
        return int((batch.weight_Q > 0).sum())

    def flops(self, module: Policy, batch: Batch) -> float:
        return training_flops(module, batch)

    def write(self, folder: Path, weights: Mapping[str, torch.Tensor], **about: Any) -> None:
        write_model(folder, weights, about_model(self.config.model, self.inputs, **about))
