"""A channel between real processes: what is sent is what is received, beside other groups, and a member that dies or stays away is an error
within the limit."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import time
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import pytest
import torch

from oxyray.cluster import channel
from oxyray.cluster.channel import Channel, ChannelLost, Seat, forms

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"a.weight": (7, 3), "b.bias": (), "c.table": (40, 9), "d.empty": (0, 4), "e.last": (1,)}
    made: dict[str, Any] = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {
        "f.count": random.integers(0, 9, 5),
        "g.flag": random.random(3) < 0.5,
        "h.half": np.float16(random.normal(size=(3, 3))),
        "k.turned": made["c.table"].T,
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def member(seat: Seat, behave: str, told: Queue[Any]) -> None:
    torch.set_num_threads(1)
    if behave == "beside":  # members are in a group of their own already
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    channel._BUCKET = 512  # several of them
    began = time.monotonic()
    try:
        opened = Channel(seat)
        for seed in (1, 2):
            if behave == "dies" and seed == 2:
                os._exit(1)
            if seat.rank == 0:
                time.sleep(0.3)
                opened.send(arrays(seed))
            else:
                found = opened.receive(forms(arrays(seed)))
                same = all(
                    torch.equal(found[name], torch.from_numpy(np.array(value)))
                    and found[name].dtype == torch.from_numpy(np.array(value)).dtype
                    for name, value in arrays(seed).items()
                )
                told.put((seat.rank, "same" if same and len(found) == len(arrays(seed)) else "other"))
    except ChannelLost as error:
        told.put((seat.rank, f"{type(error).__name__} after {time.monotonic() - began < 3 * seat.seconds}: {error}"))


def run(behave: list[str], seconds: float) -> list[tuple[int, str]]:
    context, port = mp.get_context("spawn"), free_port()
    told: Any = context.Queue()
    seats = [Seat("127.0.0.1", port, rank, len(behave), seconds) for rank in range(len(behave))]
    live = [context.Process(target=member, args=(seat, how, told)) for seat, how in zip(seats, behave, strict=True) if how != "absent"]
    for process in live:
        process.start()
    for process in live:
        process.join(timeout=60)
        assert process.exitcode is not None, "it hangs"
    found = []
    while not told.empty():
        found.append(told.get())
    return sorted(found)


def test_all_receive_what_is_sent_beside_other_groups() -> None:
    assert run(["beside", "", "beside"], 30) == [(1, "same"), (1, "same"), (2, "same"), (2, "same")]


def test_a_member_that_dies_is_an_error_of_all_others() -> None:
    found = run(["", "", "dies"], 5)
    lost = {rank: said for rank, said in found if said.startswith("ChannelLost after True: ")}
    assert 0 in lost
    assert "member 0 of 3 did not reach the others within 5 s" in lost[0]
    assert (1, "same") in found


def test_a_member_that_stays_away_is_an_error() -> None:
    found = run(["", "absent"], 3)
    assert [(rank, said.split(":")[0]) for rank, said in found] == [(0, "ChannelLost after True")]


def test_arrays_larger_than_a_bucket_have_one_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_BUCKET", 64)
    found = list(channel._buckets(forms({"a": np.zeros(3), "b": np.zeros(100), "c": np.zeros(1), "d": np.zeros(2)})))
    assert [[form.name for form, _ in bucket] for bucket, _ in found] == [["a"], ["b"], ["c", "d"]]
    assert [size for _, size in found] == [32, 800, 32]
    assert [first for bucket, _ in found for _, first in bucket] == [0, 0, 0, 16]
