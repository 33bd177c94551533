"""The stage `fuse`: the item encoder learns from pairs that belong together (paper 2.2.2, 4.2), and gives every item the vector that its
semantic ID is made of. Needed where sid.vectors=fused.

Legend: P pairs, U distinct items and W distinct query texts of a batch, A pairs of all processes, J width of an item's vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.files import files_under, marks, read_json, whole, write_json
from oxyray.model.layers import precise
from oxyray.model.losses import LossOut
from oxyray.model.retrieval import gathered
from oxyray.model.tables import TableSpec
from oxyray.run import Run
from oxyray.sid.encoder import TEXT_COLUMNS, encode, item_texts
from oxyray.sid.fusion import Fusion, ItemTokens, Tokens
from oxyray.sid.pairs import Mixture, sources
from oxyray.sid.pictures import item_tokens
from oxyray.sid.queries import distinct_queries
from oxyray.sid.swing import Pairs
from oxyray.train.course import deciding
from oxyray.train.driver import train
from oxyray.train.engine import TrainEngine

Array = np.ndarray
Tensor = torch.Tensor

HELD_OUT = 0.02  # share of the pairs that is kept for validation


def fuse(config: Config, run: Run) -> None:
    """Find the pairs, train, leave `RUN/fuse/model` and `RUN/fuse/vectors.npy`. Raises as `oxyray.train.driver.train`, ConfigError where
    there is nothing to learn from."""
    prepared = Prepared.load(run.need("data", stage="prepare"))
    gather_inputs(config, run, prepared)
    train("oxyray.train.fuse:FuseTask", config, run)
    inputs = FuseInputs(run)
    with whole(run.path("fuse", "vectors.npy")) as part, open(part, "wb") as file:
        np.save(file, Fusion.load(run.path("fuse", "model")).vectors(inputs.items))


def gather_inputs(config: Config, run: Run, prepared: Prepared) -> None:
    """`RUN/fuse/inputs`: what all workers read, made once."""
    settings, columns = config.fuse, prepared.item_columns("item_id", *TEXT_COLUMNS, "image")
    wanted = {"data": prepared.meta.fingerprint, "encoder": config.sid.encoder, "text": settings.text, "pictures": settings.pictures,
              "size": settings.picture_size, "given": marks(files_under(config.sid.given)) if settings.given and config.sid.given else None,
              "rates": settings.rates, "neighbours": settings.neighbours}  # fmt: skip
    folder = run.path("fuse", "inputs")
    if not config.force and (folder / "about.json").exists() and read_json(folder / "about.json") == wanted:
        return
    asked_W = distinct_queries(prepared, shown=False)
    found = sources(config, prepared, asked_W, lambda: encode(item_texts(columns), config.sid, config.cluster))
    arrays: dict[str, Array] = {f"{name}_{side}": value for name, pairs in found.items() for side, value in vars(pairs).items()}
    items = item_tokens(columns, settings, config.sid, config.cluster)
    with whole(folder) as part:
        part.mkdir(parents=True)
        np.savez(part / "pairs.npz", **arrays)  # type: ignore[arg-type]
        held = {"text": items.text_IF, "vision": items.vision_I, "seen": items.seen_I, "given": items.given_IW}
        if settings.text:
            held["query"] = encode(asked_W.to_pylist(), config.sid, config.cluster)
        for name, values in held.items():
            if values is not None:
                np.save(part / f"{name}.npy", values)
        write_json(part / "about.json", wanted)


class FuseInputs:
    """`RUN/fuse/inputs`, read: large arrays as maps of their files."""

    def __init__(self, run: Run) -> None:
        folder = run.need("fuse", "inputs", stage="fuse")

        def held(name: str) -> Array | None:
            path = folder / f"{name}.npy"
            return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None

        self.items, self.query_WF = ItemTokens(*map(held, ("text", "vision", "seen", "given"))), held("query")
        with np.load(folder / "pairs.npz", allow_pickle=False) as file:
            names = sorted({name.rsplit("_", 2)[0] for name in file.files})
            self.pairs = {name: Pairs(*(file[f"{name}_{side}"] for side in ("left_P", "right_P", "weight_P"))) for name in names}

    def split(self, seed: int) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
        """To learn from, and held out. The loss looks both ways, so two items are on one side whichever of them stands left, and whatever
        source pairs them."""
        names, items = sorted(self.pairs), len(self.items)
        keys = []
        for name, pairs in ((name, self.pairs[name]) for name in names):
            left_P, right_P = pairs.left_P.astype(np.int64), pairs.right_P.astype(np.int64)
            if name == "query":
                keys.append((items + left_P) * items + right_P)
            else:
                keys.append(np.minimum(left_P, right_P) * items + np.maximum(left_P, right_P))
        distinct, place_P = np.unique(np.concatenate(keys), return_inverse=True)
        held_P = (np.random.default_rng(seed).random(len(distinct)) < HELD_OUT)[place_P]
        held = dict(zip(names, np.split(held_P, np.cumsum([len(key) for key in keys])[:-1]), strict=True))

        def those(keep: dict[str, Array]) -> dict[str, Pairs]:
            return {name: Pairs(*(value[keep[name]] for value in vars(self.pairs[name]).values())) for name in keep if keep[name].any()}

        return those({name: ~mask for name, mask in held.items()}), those(held)

    def batch(self, drawn: Mapping[str, tuple[Array, Array]], weight: float = 1.0) -> PairBatch:
        """Of pairs by source, as (left, right). What the source `query` has on the left are query texts."""
        lefts = [(-1 - pair[0] if name == "query" else pair[0]) for name, pair in drawn.items()]
        left_P, right_P = np.concatenate(lefts), np.concatenate([pair[1] for pair in drawn.values()])
        item_U = np.unique(np.concatenate([left_P[left_P >= 0], right_P]))
        query_W = np.unique(left_P[left_P < 0])
        query_WF = None if self.query_WF is None else torch.from_numpy(np.ascontiguousarray(self.query_WF[-1 - query_W]))
        place_P = np.where(left_P >= 0, np.searchsorted(item_U, left_P), len(item_U) + np.searchsorted(query_W, left_P))
        left_id, right_id, left, right = (
            torch.from_numpy(each.astype(np.int64)) for each in (left_P, right_P, place_P, np.searchsorted(item_U, right_P))
        )
        return PairBatch(self.items.take(item_U), query_WF, left_id, right_id, left, right, torch.full((len(left_P),), weight))


@dataclass
class PairBatch:
    """Distinct items and query texts, and pairs of them. `left_id_P` are items, or query texts as -1, -2, …; `left_P` and `right_P` point
    into the items with the query texts behind them."""

    items: Tokens
    query_WF: Tensor | None
    left_id_P: Tensor
    right_id_P: Tensor
    left_P: Tensor
    right_P: Tensor
    weight_P: Tensor

    def lookups(self) -> dict[str, Tensor]:
        return {}

    def to(self, device: torch.device | str) -> PairBatch:
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return PairBatch(**moved)

    def weight(self) -> float:
        return float(self.weight_P.sum())


class Contrast(nn.Module):
    """The item encoder under its loss."""

    def __init__(self, fusion: Fusion, temperature: float) -> None:
        super().__init__()
        self.fusion, self.temperature = fusion, temperature

    def sides(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Vectors of both sides of the pairs: (P, J) each."""
        table = [self.fusion(batch.items)]
        if batch.query_WF is not None:  # also where no query was drawn: every weight takes part in every step
            table.append(self.fusion.asked(batch.query_WF))
        vector = torch.cat(table)
        return vector[batch.left_P], vector[batch.right_P]

    def loss(self, batch: PairBatch, rows: dict[str, Tensor]) -> LossOut:
        """InfoNCE both ways against the other pairs of the batch, in training those of all processes (all must call). What belongs to
        either side of a pair is no negative of it."""
        del rows
        left_PJ, right_PJ = self.sides(batch)
        live_P = batch.weight_P > 0
        id_P2 = torch.stack([batch.left_id_P, batch.right_id_P], dim=1)
        left_AJ, right_AJ, id_A2, live_A, first = left_PJ, right_PJ, id_P2, live_P, 0
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            both_AJ, count = gathered(torch.cat([left_PJ, right_PJ], dim=1))
            left_AJ, right_AJ = both_AJ.chunk(2, dim=1)
            told_A3, _ = gathered(torch.cat([id_P2, live_P[:, None]], dim=1))
            id_A2, live_A, first = told_A3[:, :2], told_A3[:, 2] > 0, sum(count[: dist.get_rank()])
        own_P = first + torch.arange(len(id_P2), device=id_P2.device)
        forth_P = self._nll(left_PJ, right_AJ, id_P2, id_A2[:, 1], live_A, own_P)
        back_P = self._nll(right_PJ, left_AJ, id_P2, id_A2[:, 0], live_A, own_P)
        total = ((forth_P + back_P) / 2 * batch.weight_P).sum()
        return LossOut(total, {"contrast": total.detach()})

    forward = loss

    def _nll(self, mine_PJ: Tensor, other_AJ: Tensor, id_P2: Tensor, id_A: Tensor, live_A: Tensor, own_P: Tensor) -> Tensor:
        with torch.autocast(mine_PJ.device.type, enabled=False):
            logit_PA = precise(mine_PJ) @ precise(other_AJ).T / self.temperature
            left_out_PA = (id_P2[:, :1] == id_A) | (id_P2[:, 1:] == id_A) | ~live_A
            left_out_PA[torch.arange(len(own_P), device=own_P.device), own_P] = False
            return F.cross_entropy(logit_PA.masked_fill(left_out_PA, -torch.inf), own_P, reduction="none")


class PairStream:
    """Steps of `pairs_per_step` pairs, drawn anew in every epoch; what a step holds depends on seed, epoch and step alone."""

    def __init__(self, inputs: FuseInputs, pairs: Mapping[str, Pairs], rates: Mapping[str, float], pairs_per_step: int, seed: int) -> None:
        self.inputs, self.pairs, self.mixture = inputs, pairs, Mixture(pairs, rates)
        self.pairs_per_step, self.seed = pairs_per_step, seed
        self.position = {"epoch": 0, "step": 0}

    def steps_per_epoch(self) -> int:
        return max(1, sum(map(len, self.pairs.values())) // self.pairs_per_step)

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = {"epoch": int(state["epoch"]), "step": int(state["step"])}

    def batches(self, rank: int = 0, world: int = 1, micro_batches: int = 1) -> Iterator[list[PairBatch]]:
        while True:
            step = self.position["step"]
            drawn = self.mixture.draw(self.pairs_per_step, np.random.default_rng([self.seed, self.position["epoch"], step]))
            over = step + 1 >= self.steps_per_epoch()
            self.position = {"epoch": self.position["epoch"] + over, "step": 0 if over else step + 1}
            yield [self._piece(drawn, rank + world * m, world * micro_batches) for m in range(micro_batches)]

    def _piece(self, drawn: dict[str, Array], first: int, every: int) -> PairBatch:
        """Every `every`-th pair of each source; a piece without any has one pair that counts nothing."""
        mine = {name: self._sides(name, rows[first::every]) for name, rows in drawn.items()}
        if any(len(left) for left, _ in mine.values()):
            return self.inputs.batch(mine)
        return self.inputs.batch({name: self._sides(name, rows[:1]) for name, rows in drawn.items()}, weight=0.0)

    def _sides(self, name: str, rows: Array) -> tuple[Array, Array]:
        return self.pairs[name].left_P[rows], self.pairs[name].right_P[rows]


class FuseTask:
    """Raises RunError when an earlier stage is missing."""

    stage, key, counted, chosen_by = "fuse", "fuse", "pairs", "valid_match"

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run, self.settings = config, run, config.fuse

    @cached_property
    def inputs(self) -> FuseInputs:
        return FuseInputs(self.run)

    def identity(self) -> dict[str, Any]:
        return {
            "fuse": deciding(self.settings),
            "inputs": read_json(self.run.path("fuse", "inputs", "about.json")),
            "micro_batches": self.settings.micro_batches,  # a pair is compared with the others of its micro-batch
        }

    def module(self) -> Contrast:
        items, settings = self.inputs.items, self.settings
        text = 0 if items.text_IF is None else int(items.text_IF.shape[1])
        small = settings.pictures == "small"
        vision = 0 if items.vision_I is None or small else int(items.vision_I.shape[2])
        given = 0 if items.given_IW is None else int(items.given_IW.shape[1])
        return Contrast(Fusion(settings.model, text, vision, small, given), settings.model.temperature)

    def tables(self) -> list[TableSpec]:
        return []

    def stream(self) -> PairStream:
        learned, _ = self.inputs.split(self.settings.seed)
        return PairStream(self.inputs, learned, self.settings.rates, self.settings.pairs_per_step, self.settings.seed)

    def validation(self, rank: int, world: int) -> Validation:
        return Validation(self, rank, world)

    def count(self, batch: PairBatch) -> int:
        return int(batch.weight())

    def flops(self, module: Contrast, batch: PairBatch) -> float:
        del module, batch
        return 0.0

    def write(self, folder: Path, weights: Mapping[str, Tensor], **about: Any) -> None:
        module = self.module()
        module.fusion.save(folder, {name.removeprefix("fusion."): weight for name, weight in weights.items()}, **about)


class Validation:
    """Held-out pairs, drawn once by the seed in batches of a step's size, dealt out to the ranks."""

    def __init__(self, task: FuseTask, rank: int, world: int) -> None:
        settings, (_, held) = task.settings, task.inputs.split(task.settings.seed)
        size = min(settings.pairs_per_step, settings.eval_requests)
        count = settings.eval_requests // size if held and size else 0
        self.requests = count * size
        mixture, random = Mixture(held, settings.rates), np.random.default_rng(settings.seed)
        drawn = [mixture.draw(size, random) for _ in range(count)]
        self._batches = [
            task.inputs.batch({name: (held[name].left_P[rows], held[name].right_P[rows]) for name, rows in each.items()})
            for each in drawn[rank::world]
        ]

    @torch.no_grad()
    def measure(self, engine: TrainEngine, module: Contrast) -> dict[str, float]:
        """`valid_match`: the share of pairs whose right side is the likest to their left side in its batch. `valid_loss`. Collective."""
        training = module.training
        module.eval()
        told = torch.zeros(3, dtype=torch.float64, device=engine.device)
        for batch in (batch.to(engine.device) for batch in self._batches):
            left_PJ, right_PJ = module.sides(batch)
            id_P2 = torch.stack([batch.left_id_P, batch.right_id_P], dim=1)
            own_P = torch.arange(len(id_P2), device=engine.device)
            like_PP = (left_PJ @ right_PJ.T).masked_fill(
                (id_P2[:, :1] == batch.right_id_P) | (id_P2[:, 1:] == batch.right_id_P), -torch.inf
            )
            found_P = (left_PJ * right_PJ).sum(-1) > like_PP.max(1).values
            sums = [float(found_P.sum()), float(module.loss(batch, {}).total), len(own_P)]
            told += torch.tensor(sums, dtype=torch.float64, device=told.device)
        module.train(training)
        dist.all_reduce(told)
        return {"valid_match": float(told[0] / told[2]), "valid_loss": float(told[1] / told[2])}
