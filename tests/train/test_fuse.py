"""Training of the item encoder: the loss against loops, two processes against one, the stage for real on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from oxyray.cli.compose import check, compose_config
from oxyray.config import FusionConfig
from oxyray.data.prepared import Prepared
from oxyray.pipeline import STAGES, run_all
from oxyray.run import Run
from oxyray.sid.fusion import Fusion, Tokens
from oxyray.sid.tokenizer import Tokenizer
from oxyray.train.fuse import Contrast, FuseInputs, PairBatch
from tests.train.train_workers import run as spawn

SMALL = FusionConfig(width=16, queries=2, layers=1, heads=2, out=8, temperature=0.2)
PAIRS = [(0, 1), (2, 3), (-1, 2), (4, 1), (-2, 0), (5, 3)]  # negative: the query text -1 - n


def module() -> Contrast:
    torch.manual_seed(3)
    return Contrast(Fusion(SMALL, 6, 0, False), SMALL.temperature).double().train()


def batch(rows: list[int], dead: int | None = None) -> PairBatch:
    """The rows of PAIRS, `dead` with weight 0."""
    random = np.random.default_rng(1)
    text_UF, query_WF = (torch.from_numpy(random.normal(size=(count, 6))) for count in (6, 2))
    left, right = (torch.tensor([PAIRS[row][side] for row in rows]) for side in (0, 1))
    weight = torch.tensor([0.0 if row == dead else 1.0 for row in rows])
    return PairBatch(Tokens(text_UF), query_WF, left, right, torch.where(left >= 0, left, 5 - left), right, weight)


def slow(rows: list[int], dead: int | None = None) -> torch.Tensor:
    """Pair by pair: its own partner against those of the live pairs that have nothing to do with it."""
    made, given = module(), batch(rows, dead)
    left, right = made.sides(given)
    total = torch.zeros((), dtype=torch.float64)
    for one, (mine, theirs) in ((one, sides) for one in range(len(rows)) for sides in ((left, right), (right, left))):
        if rows[one] == dead:
            continue
        column = 1 if mine is left else 0
        others = [
            other
            for other in range(len(rows))
            if other == one or (rows[other] != dead and PAIRS[rows[other]][column] not in PAIRS[rows[one]])
        ]
        logits = torch.stack([mine[one] @ theirs[other] for other in others]) / SMALL.temperature
        total = total + (logits.logsumexp(0) - logits[others.index(one)]) / 2
    return total


@pytest.mark.parametrize("dead", [None, 3])
def test_the_loss_is_as_pair_by_pair(dead: int | None) -> None:
    rows = list(range(len(PAIRS)))
    torch.testing.assert_close(module().loss(batch(rows, dead), {}).total, slow(rows, dead))


def _two(rows_of: list[list[int]]) -> dict[str, torch.Tensor]:
    made = module()
    loss = made.loss(batch(rows_of[torch.distributed.get_rank()], dead=3), {}).total
    loss.backward()
    for weight in made.parameters():
        if weight.grad is not None:
            torch.distributed.all_reduce(weight.grad)
    torch.distributed.all_reduce(loss)
    return {"loss": loss.detach()} | {name: weight.grad for name, weight in made.named_parameters() if weight.grad is not None}


@pytest.mark.slow
def test_two_processes_compare_with_the_pairs_of_both() -> None:
    alone = module()
    loss = alone.loss(batch([0, 1, 3, 2, 4, 5], dead=3), {}).total
    loss.backward()
    for found in spawn(2, _two, [[0, 1, 3], [2, 4, 5]]):
        torch.testing.assert_close(found["loss"], loss.detach())
        for name, weight in alone.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(found[name], weight.grad, msg=name)


@pytest.mark.slow
def test_the_stage_learns_from_all_sources(shared_ray: None, tmp_path: Path) -> None:
    words = ["data=mall", "data.mall.size=tiny", "sid=fused", "sid.width=32", "sid.iterations=5", "sid.collisions=extra_level",
             "fuse=sources", "fuse.pictures=small", "fuse.epochs=1", "fuse.pairs_per_step=64",
             "fuse.threads_per_worker=1", "fuse.model.width=32", "fuse.model.out=32",
             f"run_dir={tmp_path / 'run'}", f"sid.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    words += ["fuse.given=true", f"sid.given={tmp_path / 'own.parquet'}"]
    config = compose_config(check(words))
    run_all(config, [stage for stage in STAGES if stage.name == "prepare"])
    ids = Prepared.load(tmp_path / "run" / "data").item_columns("item_id")["item_id"].to_pylist()
    own_IW = (0.05 * np.random.default_rng(4).normal(size=(len(ids), 5))).astype(np.float32)
    pq.write_table(pa.table({"item_id": [*ids, "n1", "n2", "n3"], "vector": [*own_IW, *own_IW[:3]]}), tmp_path / "own.parquet")
    run_all(config, [stage for stage in STAGES if stage.name in ("fuse", "sid")])
    run = Run(config.run_dir)
    inputs = FuseInputs(run)
    np.testing.assert_array_equal(inputs.items.given_IW, own_IW)
    assert set(inputs.pairs) == {"swing", "query", "peers"}
    learned, held = inputs.split(config.fuse.seed)
    assert sum(map(len, learned.values())) + sum(map(len, held.values())) == sum(map(len, inputs.pairs.values()))
    learned_of, held_of = (
        {frozenset(pair) for name in {"swing", "peers"} & set(side) for pair in zip(side[name].left_P, side[name].right_P, strict=True)}
        for side in (learned, held)
    )
    assert held_of
    assert not learned_of & held_of, "the loss looks both ways: a pair that is mirrored, or in two sources, is learned or held out as one"
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    match = [line["valid_match"] for line in lines if "valid_match" in line]
    assert max(match) > 0.1, "one of 64 by chance"
    vectors = np.load(run.path("fuse", "vectors.npy"))
    assert vectors.shape == (len(inputs.items), 32)
    tokenizer = Tokenizer.load(run.folder)
    assert tokenizer.catalog.levels == 4
    assert tokenizer.catalog.index.leaves == len(tokenizer.catalog), "an extra level leaves no two items with one SID"
    twin = pq.read_table(tokenizer.run.path("source", "items.parquet")).slice(0, 3)
    twin = twin.set_column(twin.column_names.index("item_id"), "item_id", pa.array(["n1", "n2", "n3"], pa.large_string()))
    encoded = tokenizer.encode(twin)
    assert (encoded.codes_NL[:, :3] == tokenizer.catalog.codes_IL[:3, :3]).all(), "the same text, picture and vector: the same codes"
    assert (encoded.codes_NL[:, 3] > tokenizer.catalog.codes_IL[:3, 3]).all()
