"""Joining a process group: what a rank is told of its devices."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from oxyray.cluster.group import Rank


@pytest.mark.parametrize(
    ("devices", "told"),
    [(0, ("1", "2")), (1, ("0", "1")), (4, ("1", "2"))],
    ids=["no GPU", "Ray shows the actor its own GPU alone", "the actor sees the node's GPUs"],
)
def test_a_rank_names_its_device_by_what_it_can_see(monkeypatch: pytest.MonkeyPatch, devices: int, told: tuple[str, str]) -> None:
    joined: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **about: joined.update(about, backend=backend))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # brought back afterwards
    Rank().join(rank=5, world=8, local_rank=1, local_world=2, address="10.0.0.1", port=1234, seconds=3.0)
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == told
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("5", "8")
    assert joined["backend"] == ("nccl" if devices else "gloo")
