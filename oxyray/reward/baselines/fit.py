"""Training of the point-wise baseline: one process, plain torch. Standing beside the ranker, it gets the ranker's data, sizes and passes,
and none of its machinery."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from oxyray.config import RankConfig
from oxyray.model.items import Vocab
from oxyray.model.tables import PlainTables, TableSpec
from oxyray.progress import bar
from oxyray.reward.baselines.pointwise import PointWise
from oxyray.reward.log import Log
from oxyray.reward.packing import Packer
from oxyray.reward.stream import RankStream

Tensor = torch.Tensor


def fit_pointwise(
    log: Log, packer: Packer, settings: RankConfig, vocab: Vocab, tables: list[TableSpec]
) -> tuple[PointWise, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """The trained model in eval mode and the lookup of its rows. As many passes as `rank.epochs`, within `rank.max_minutes`; AdamW, and
    Adagrad on the rows that a step touches."""
    torch.manual_seed(settings.seed)
    model = PointWise(settings.model, vocab)
    rows = {name: value.requires_grad_() for name, value in PlainTables.fresh(tables, settings.seed).tables.items()}
    dense = torch.optim.AdamW(model.parameters(), lr=settings.optim.lr, betas=settings.optim.betas)
    sparse = torch.optim.Adagrad(rows.values(), lr=settings.optim.table_lr)
    stream = RankStream(log, packer, history=settings.model.history, items_per_step=settings.items_per_step, seed=settings.seed)
    steps = max(1, round(settings.epochs * stream.steps_per_epoch()))
    steps = min(steps, settings.max_steps or steps)
    ends = time.monotonic() + 60 * (settings.max_minutes or 1e9)

    def lookup(ids: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {name: ids_n for name, ids_n in ids.items() if name in rows}
        return {name: torch.nn.functional.embedding(ids_n, rows[name], sparse=True) for name, ids_n in known.items()}

    model.train()
    with bar(steps, "point-wise model learns", "step") as progress:
        for (batch,) in itertools.islice(stream.batches(), steps):
            loss = model.loss(batch, lookup(batch.lookups())).total / max(batch.weight(), 1.0)
            dense.zero_grad()
            sparse.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip)
            dense.step()
            sparse.step()
            progress.update(1)
            if time.monotonic() > ends:
                break
    return model.eval(), lookup
