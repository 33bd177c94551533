"""Pre-training speed: targets per second and where a step's time goes, for ZeRO 0, 1 and 2 and for one and two workers; and the table
lookup's peers.

The policy has the sizes that the review data is trained with, on a synthetic shop with 12,101 items whose whole catalogue is looked up in
every step (tied head). All ZeRO stages live in the same processes and take turns, a few steps each; worlds of one and two workers take
turns as whole rounds. Workers have one thread each, and one worker with two threads stands beside two workers as their peer.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.harness import Cell, Report, arguments
from oxyray.config import Config, OptimConfig, from_dict, to_dict
from oxyray.run import Run

SEED = 7
ITEMS = 12_101
STAGES = (0, 1, 2)
PARTS = ("data", "sparse", "forward", "backward", "optimizer")


def main() -> None:
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    rounds, steps = (1, 2) if options.quick else (3, 8)
    with tempfile.TemporaryDirectory(prefix="oxyray-bench-") as folder:
        config = shop(Path(folder), users=300 if options.quick else 3000)
        report = Report("pretrain", to_dict(config) | {"rounds": rounds, "steps": steps, "items": ITEMS}, [SEED])
        found: dict[str, list[dict[str, Any]]] = {}
        worlds = [(1, 1), (2, 1), (1, 2)]
        for turn in range(rounds):
            for workers, threads in worlds:
                stages = STAGES if (workers, threads) != (1, 2) else (1,)
                for stage, rows in run(workers, threads, train, to_dict(config), stages, steps)[0].items():
                    found.setdefault(f"{workers} {threads} {stage}", []).extend(rows)
            print(f"round {turn + 1} of {rounds} done", flush=True)
        show_training(report, found)
        for workers in (1, 2):
            show_lookup(report, workers, run(workers, 1, lookups, 3 if options.quick else 20)[0])
    report.finish(options.quick)


def show_training(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over all timed steps."""
    rows: list[list[Cell]] = []
    speed: dict[str, float] = {}
    sparse: dict[str, float] = {}
    for key in sorted(found):
        workers, threads, stage = map(int, key.split())
        steps = found[key]
        speed[key] = _median(s["targets"] / s["seconds"] for s in steps)
        shares = [100 * sum(s["parts"][part] for s in steps) / sum(s["seconds"] for s in steps) for part in PARTS]
        sparse[key] = shares[PARTS.index("sparse")]
        milliseconds = 1e3 * _median(s["seconds"] for s in steps)
        rows.append([f"{workers} × {threads}", f"ZeRO {stage}", speed[key], milliseconds, *shares])
    columns = ["workers × threads", "stage", "targets/s", "step ms", *(f"{part} %" for part in PARTS)]
    report.table("Training steps (medians; shares of rank 0's time)", columns, rows)
    report.claim("ZeRO 1 against ZeRO 0, 2 workers: targets per second", speed["2 1 1"] / speed["2 1 0"], 0.9, "×")
    report.claim("ZeRO 2 against ZeRO 0, 2 workers: targets per second", speed["2 1 2"] / speed["2 1 0"], 0.9, "×")
    report.claim("2 workers against 1, one thread each, ZeRO 1: targets per second", speed["2 1 1"] / speed["1 1 1"], 1.5, "×")
    report.claim("2 workers against 1 worker with 2 threads, ZeRO 1: targets per second", speed["2 1 1"] / speed["1 2 1"], 1.0, "×")
    report.claim("sparse share of a step, 1 worker, ZeRO 1", sparse["1 1 1"], 15.0, "%", better="lower")


def show_lookup(report: Report, workers: int, found: dict[str, dict[str, float]]) -> None:
    rows: list[list[Cell]] = [
        [name, 1e3 * times["forward"], 1e3 * times["backward"], 1e3 * (times["forward"] + times["backward"])]
        for name, times in found.items()
    ]
    title = (
        f"Lookup and fused update of all {ITEMS:,} items and 256 users, width 64, {workers} worker{'s' if workers > 1 else ''} (medians)"
    )
    report.table(title, ["form", "forward ms", "backward ms", "both ms"], rows)
    both = {name: sum(times.values()) for name, times in found.items()}
    report.claim(
        f"EmbeddingCollection against one-id bags, {workers} worker(s): time",
        both["EmbeddingCollection"] / both["one-id bags"],
        1.1,
        "×",
        better="lower",
    )


def shop(folder: Path, users: int) -> Config:
    """Synthetic tables with a long-tailed choice of items, prepared; random SIDs, random text vectors."""
    from oxyray.data.prepare import prepare
    from oxyray.sid.catalog import Catalog

    random = np.random.default_rng(SEED)
    tables = folder / "tables"
    tables.mkdir()
    ids = [f"i{n:06d}" for n in range(ITEMS)]
    pq.write_table(pa.table({"item_id": ids, "title": ids}), tables / "items.parquet")
    counts = 5 + random.geometric(0.25, users)
    items = (ITEMS * random.random(counts.sum()) ** 2.5).astype(int)
    who = np.repeat(np.arange(users), counts)
    events = {
        "user_id": [f"u{n:06d}" for n in who],
        "item_id": [ids[n] for n in items],
        "event_time": np.arange(len(who)) * 600 + 1_600_000_000,
    }
    pq.write_table(pa.table(events | {"action": ["purchase"] * len(who), "scenario": ["home"] * len(who)}), tables / "events.parquet")
    settings = {
        "run_dir": str(folder / "run"),
        "data": {"name": "bench", "source": "tables", "path": str(tables), "split": "leave_one_out"},
        "train": {"targets_per_step": 3500},
    }
    config = from_dict(Config, settings)
    made = Run(config.run_dir)
    prepare(config, made)
    order = pq.read_table(made.path("data", "items.parquet"))["item_id"].to_pylist()
    made.path("sid").mkdir()
    Catalog.of(order, random.integers(0, 256, (len(order), 3)), 256).save(made.path("sid", "catalog"))
    np.save(made.path("sid", "vectors.npy"), random.normal(size=(len(order), 384)).astype(np.float16))
    return config


def train(settings: dict[str, Any], stages: tuple[int, ...], steps: int) -> dict[int, list[dict[str, Any]]]:
    """Timed steps of each stage's engine, taking turns on the same batches."""
    from oxyray.data.stream import SegmentStream
    from oxyray.model.inputs import Inputs
    from oxyray.train.engine import TrainEngine

    config = from_dict(Config, settings)
    inputs, rank, world = Inputs.load(Run(config.run_dir)), dist.get_rank(), dist.get_world_size()
    engines = {}
    for stage in stages:
        torch.manual_seed(SEED)
        optim = dataclasses.replace(config.train.optim, zero_stage=stage)
        engines[stage] = TrainEngine(inputs.policy(config.model), inputs.tables(config.model), optim, total_steps=1000, seed=SEED)
    stream = SegmentStream(
        inputs.prepared,
        inputs.collator(config.model, config.train),
        history=config.model.history,
        targets_per_step=config.train.targets_per_step,
        seed=SEED,
    )
    found: dict[int, list[dict[str, Any]]] = {stage: [] for stage in stages}
    data = stream.batches(rank, world)
    for number in range(steps + 1):
        waited = time.perf_counter()
        batches = next(data)
        waited = time.perf_counter() - waited
        targets = _sum(sum(batch.queries for batch in batches))
        for stage, engine in engines.items():
            dist.barrier()
            begin = time.perf_counter()
            stats = engine.step(batches)
            dist.barrier()
            seconds = time.perf_counter() - begin + waited
            parts = stats.seconds | {"data": stats.seconds["data"] + waited}
            if number:  # the first step warms up
                found[stage].append({"targets": targets, "seconds": seconds, "parts": parts})
    return found


def lookups(repeats: int) -> dict[str, dict[str, float]]:
    """Forward and backward of the sharded tables' two forms, taking turns."""
    from oxyray.model.tables import TableSpec
    from oxyray.train.sparse import Leaves, ShardedTables

    specs = [TableSpec(name="item", rows=ITEMS, dim=64), TableSpec(name="user", rows=22_363, dim=64)]
    tables = ShardedTables(specs, OptimConfig(), torch.device("cpu"), SEED)
    bags = OneIdBags(specs)
    random = torch.Generator().manual_seed(SEED + dist.get_rank())
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in ("EmbeddingCollection", "one-id bags")}
    for number in range(repeats + 1):
        ids = {"item": torch.arange(ITEMS), "user": torch.randperm(22_363, generator=random)[:256]}
        for name, look_up in (
            ("EmbeddingCollection", lambda ids=ids: Leaves.look_up(tables, [ids]).rows),
            ("one-id bags", lambda ids=ids: bags.lookup(ids)),
        ):
            dist.barrier()
            begin = time.perf_counter()
            rows = look_up()
            middle = time.perf_counter()
            torch.autograd.backward(list(rows.values()), [torch.ones_like(row) for row in rows.values()])
            end = time.perf_counter()
            if number:
                times[name]["forward"].append(middle - begin)
                times[name]["backward"].append(end - middle)
    return {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()}


class OneIdBags:
    """The peer of EmbeddingCollection: an EmbeddingBagCollection, each id a bag of its own, the shorter table padded with empty bags."""

    def __init__(self, specs: list[Any]) -> None:
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv
        from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
        from torchrec.modules.embedding_modules import EmbeddingBagCollection
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
        from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

        configs = [
            EmbeddingBagConfig(name=s.name, num_embeddings=s.rows, embedding_dim=s.dim, feature_names=[s.name], pooling=PoolingType.SUM)
            for s in specs
        ]
        module = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.05, "eps": 1e-8})
        sharder, world = EmbeddingBagCollectionSharder(), dist.get_world_size()
        plan = construct_module_sharding_plan(
            module, {s.name: row_wise() for s in specs}, sharder=sharder, local_size=world, world_size=world, device_type="cpu"
        )
        self.module = sharder.shard(module, plan, ShardingEnv.from_process_group(dist.group.WORLD), device=torch.device("cpu"))

    def lookup(self, ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        size = max(map(len, ids.values()))
        lengths = torch.cat([(torch.arange(size) < len(part)).long() for part in ids.values()])
        found = self.module(KeyedJaggedTensor(keys=list(ids), values=torch.cat(list(ids.values())), lengths=lengths))
        found = found.wait() if hasattr(found, "wait") else found
        return {name: found[name][: len(part)] for name, part in ids.items()}


def run(workers: int, threads: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """`body(*args)` on each of `workers` processes joined by gloo; its results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, args=(workers, threads, folder, body, args), nprocs=workers)
        return [_keys(json.loads((Path(folder) / f"out{rank}.json").read_text())) for rank in range(workers)]


def _enter(rank: int, workers: int, threads: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(OMP_NUM_THREADS=str(threads), RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    torch.set_num_threads(threads)
    limit = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers, timeout=limit)
    try:
        (Path(folder) / f"out{rank}.json").write_text(json.dumps(body(*args)))
    finally:
        dist.destroy_process_group()


def _keys(found: Any) -> Any:
    """JSON makes every key a string."""
    return {int(key) if key.isdigit() else key: value for key, value in found.items()}


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def _sum(value: int) -> int:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return int(total)


if __name__ == "__main__":
    main()
