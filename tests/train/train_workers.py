"""Runs a function in several processes joined by gloo, and hands back what each returned."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """`body(*args)` on each of `world` ranks; its results by rank. A body that raises fails the test with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, args=(world, folder, body, args), nprocs=world)
        return [torch.load(Path(folder) / f"out{rank}", weights_only=True) for rank in range(world)]


def _enter(rank: int, world: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=600)
    )
    try:
        torch.save(body(*args), Path(folder) / f"out{rank}")
    finally:
        dist.destroy_process_group()
