"""Handing a sparse table to a rollout worker: publication in shared memory beside Ray's object store.

The table is handed over after a step that touched 5% of its rows: published and 4,096 of its rows read by another process, against
`ray.put` and `ray.get` of the torch tensor and of the numpy array, after which the same rows are taken. All forms take turns. Attaching to
a published table is measured at each size.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Cell, Report, arguments
from oxyray.cluster.publish import PublishedShard, TableReader

SEED, WIDTH, TOUCHED, ASKED = 7, 128, 0.05, 4096


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    sizes = [0.02, 0.05] if options.quick else [0.1, 0.5, 1.0, 2.0]
    repeats = 2 if options.quick else 5
    import ray

    ray.init(address="local", num_cpus=1, object_store_memory=int(max(max(sizes) * 2.2, 0.2) * 2**30), include_dashboard=False)
    folder = Path("/dev/shm") / f"oxyray-bench-{os.getpid()}"
    report = Report("publish", {"width": WIDTH, "touched": TOUCHED, "asked": ASKED, "repeats": repeats}, [SEED])
    try:
        rows: list[list[Cell]] = []
        attach: dict[float, float] = {}
        for size in sizes:
            times, attach[size] = hand_over(ray, folder, size, repeats)
            rows.append([f"{size:g} GB", *(1e3 * times[form] for form in ("published", "numpy", "torch")), 1e3 * attach[size]])
            print(f"{size:g} GB done", flush=True)
            last = times
    finally:
        for file in folder.glob("*"):
            file.unlink()
        folder.rmdir()
    columns = ["table", "published, ms", "numpy put + get, ms", "torch put + get, ms", "attach, ms"]
    report.table("Table to a reader after a step that touched 5% of the rows (medians)", columns, rows)
    report.claim(f"against ray.put and ray.get of the tensor, {sizes[-1]:g} GB", last["torch"] / last["published"], 50, "×")
    report.claim(f"against ray.put and ray.get of the numpy array, {sizes[-1]:g} GB", last["numpy"] / last["published"], 3, "×")
    report.claim(f"attach time, {sizes[-1]:g} GB against {sizes[0]:g} GB", attach[sizes[-1]] / attach[sizes[0]], 2, "×", better="lower")
    report.finish(options.quick)


class Rollout:
    """A reader in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def attach(self) -> float:
        begin = time.perf_counter()
        self.reader = TableReader(self.folder, "item")
        self.reader.read(np.arange(1))
        return time.perf_counter() - begin

    def rows(self, ids_N: np.ndarray) -> float:
        return float(self.reader.read(ids_N)[0][0, 0])

    def taken(self, table_RD: Any, ids_N: Any) -> float:
        return float(table_RD[ids_N][0, 0])


def hand_over(ray: Any, folder: Path, size: float, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each form, and of attaching."""
    import torch

    random = np.random.default_rng(SEED)
    count = int(size * 2**30 / 4 / WIDTH)
    table_RD = random.random((count, WIDTH), dtype=np.float32)
    shard = PublishedShard(folder, "item", 0, 0, count, WIDTH)
    shard.publish_from(0, np.arange(count), table_RD)
    rollout: Any = ray.remote(Rollout).remote(folder)
    attach = statistics.median(ray.get([rollout.attach.remote() for _ in range(repeats + 2)]))
    ids_N = random.integers(0, count, ASKED)
    times: dict[str, list[float]] = {"published": [], "numpy": [], "torch": []}
    for turn in range(repeats + 1):
        touched_T = np.sort(random.choice(count, int(TOUCHED * count), replace=False))
        table_RD[touched_T] += 1

        def published(version: int = turn + 1, touched_T: np.ndarray = touched_T) -> Any:
            shard.publish_from(version, touched_T, table_RD)
            return rollout.rows.remote(ids_N)

        forms: dict[str, Callable[[], Any]] = {
            "published": published,
            "numpy": lambda: rollout.taken.remote(ray.put(table_RD), ids_N),
            "torch": lambda: rollout.taken.remote(ray.put(torch.from_numpy(table_RD)), torch.from_numpy(ids_N)),
        }
        for form, handed in forms.items():
            time.sleep(1.0)  # what the form before left to be freed is freed
            begin = time.perf_counter()
            value = ray.get(handed())
            if turn:  # the first turn warms up
                times[form].append(time.perf_counter() - begin)
            assert value == table_RD[ids_N[0], 0], form
    ray.kill(rollout)
    shard.close()
    return {form: statistics.median(values) for form, values in times.items()}, attach


if __name__ == "__main__":
    main()
