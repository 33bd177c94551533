"""Runs a function in several processes joined by gloo, and hands back what each returned.

The processes are forked from a server that has torch, DeepSpeed and TorchRec imported already: importing them takes ten seconds, the
tests' work one.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

HEAVY = ["torch", "torch.distributed", "deepspeed", "torchrec", "torchrec.distributed.embedding", "torchrec.distributed.sharding_plan"]
HEAVY += ["oxyray.train.session", "oxyray.align.learner", "oxyray.align.rollout"]


def run(world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """`body(*args)` on each of `world` ranks; its results by rank. A body that raises fails the test with its traceback."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    multiprocessing.set_forkserver_preload(HEAVY)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_enter, args=(world, folder, body, args), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"out{rank}", weights_only=True) for rank in range(world)]


def _enter(rank: int, world: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    try:
        torch.save(body(*args), Path(folder) / f"out{rank}")
    finally:
        dist.destroy_process_group()
