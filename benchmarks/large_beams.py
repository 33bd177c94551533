"""Large beams on one GPU: the policy's decoder of width 1,024 and 8 layers in bfloat16, 512 beams, captured as a CUDA graph; its time
beside the least that the device's arithmetic and memory allow. Part of `benchmarks.generate`; torch alone is needed.

The floor counts what cannot be left out: each pass of the decoder reads its weights once and multiplies them with every beam's state, each
level's head likewise; of the two, whichever takes longer. The encoder and the keys of the history are not part of it, as in the other
tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Cell, Report
from oxyray.config import ModelConfig
from oxyray.data.requests import request_segments, timeline
from oxyray.data.stream import Collator, ItemFeatures
from oxyray.generate.fixed import Best, walk_fixed
from oxyray.generate.graphs import Graphs
from oxyray.generate.pools import Legal
from oxyray.generate.steps import PolicySteps
from oxyray.model.flops import peak
from oxyray.model.items import Vocab
from oxyray.model.policy import Decoding, Policy
from oxyray.sid.prefix import PrefixIndex

# Bytes a second of the device's memory, by a word of its name.
MEMORY = {"H200": 4.8e12, "H100": 3.35e12, "H800": 3.35e12, "A100": 2.0e12, "A800": 2.0e12, "L40S": 0.86e12}
SEED = 7


def large_beams(report: Report, index: PrefixIndex, codes_IL: np.ndarray, quick: bool, rounds: int) -> None:
    """On the GPU; in a quick run also without one, to show that it works."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        return
    shapes = [(1, 16), (2, 8)] if quick else [(1, 512), (1, 256), (8, 128)]
    sizes = (
        {"width": 32, "heads": 2, "decoder_layers": 2, "hidden": 64}
        if quick
        else {"width": 1024, "heads": 16, "decoder_layers": 8, "hidden": 2816}
    )
    policy = _policy(index, codes_IL, **sizes).to(device, torch.bfloat16)
    rows: list[list[Cell]] = []
    for requests, beams in shapes:
        decoding, legal = _started(policy, codes_IL, requests, 20 if quick else 200, device), Legal(policy.tree, [None] * requests)
        graphs = Graphs(policy, lambda beams=beams: Best(beams))  # type: ignore[misc]
        ways: dict[str, Callable[[], object]] = {
            "graph": lambda graphs=graphs, decoding=decoding, legal=legal: graphs.walk(decoding, legal),  # type: ignore[misc]
            "sent": lambda beams=beams, decoding=decoding, legal=legal: walk_fixed(
                PolicySteps(policy, decoding.fork()), legal, Best(beams)
            ),  # type: ignore[misc]
        }
        seconds = {name: _median(way, rounds, device) for name, way in ways.items()}
        floor, flops = _floor(policy, requests * beams, device)
        share = flops / seconds["graph"] / (peak(device, "bf16") or float("nan"))
        rows.append(
            [f"{requests} × {beams}", 1e3 * seconds["graph"], 1e3 * seconds["sent"], 1e3 * floor, seconds["graph"] / floor, 100 * share]
        )
        if not quick:
            report.claim(f"{requests} × {beams} on a GPU against its floor: time", seconds["graph"] / floor, 3, "×", better="lower")
    columns = ["batch", "as a CUDA graph, ms", "not captured, ms", "floor, ms", "against the floor", "MFU %"]
    report.table(
        f"Width {policy.config.width}, {policy.config.decoder_layers} layers on {_name(device)} (medians of {rounds})", columns, rows
    )


def _policy(index: PrefixIndex, codes_IL: np.ndarray, **sizes: Any) -> Policy:
    torch.manual_seed(SEED)
    vocab = Vocab(
        items=len(codes_IL),
        users=1,
        scenarios=1,
        actions=1,
        side=(),
        profile=(),
        levels=index.levels,
        width=index.width,
        text=0,
        query=0,
        clock=False,
    )
    config = ModelConfig(
        head="codes", repeats=False, user_table=False, text_input=False, encoder_layers=1, row_dim=64, dropout=0.0, history=1000, **sizes
    )  # type: ignore[arg-type]
    return Policy(config, vocab, index).eval()


@torch.no_grad()
def _started(policy: Policy, codes_IL: np.ndarray, requests: int, events: int, device: torch.device) -> Decoding:
    """Requests of users with so many events each."""
    random = np.random.default_rng(SEED)
    count = requests * (events + 1)
    time = timeline(
        {
            "user": np.repeat(np.arange(requests), events + 1), "item": random.integers(0, len(codes_IL), count),
            "time": np.tile(np.arange(events + 1), requests), "action": np.zeros(count, int), "scenario": np.zeros(count, int),
            "request": np.arange(count), "trigger": np.full(count, -1), "split": np.zeros(count, int),
        }
    )  # fmt: skip
    features = ItemFeatures(torch.from_numpy(codes_IL.astype(np.int64)), torch.zeros(len(codes_IL), 0, dtype=torch.long), None)
    collate = Collator(features, np.zeros((requests, 0), int), np.ones((1, 1)), whole_catalogue=False)
    batch = collate(time, request_segments(time, np.arange(events, count, events + 1), events), targets=False).to(device)
    rows = {"item": torch.randn(len(batch.items.ids_U), policy.config.row_dim, device=device, dtype=policy.level.dtype)}
    return policy.start(batch, rows)


def _floor(policy: Policy, states: int, device: torch.device) -> tuple[float, float]:
    """Seconds, and operations, of the passes of a whole search."""
    passes, levels = policy.vocab.levels - 1, policy.vocab.levels
    layers = sum(weight.numel() for weight in policy.decoder.parameters())
    head = policy.vocab.width * policy.config.width
    size, speed = policy.level.element_size(), peak(device, "bf16") or 1e11
    memory = next((value for word, value in MEMORY.items() if word in _name(device)), 2e10)

    def least(weights: int, columns: int) -> float:
        return max(weights * size / memory, 2 * weights * columns / speed)

    seconds = passes * (least(layers, states) + least(head, states)) + least(head, 1)
    return seconds, 2.0 * states * passes * (layers + head) + 2 * head * (levels - passes)


def _median(way: Callable[[], object], rounds: int, device: torch.device) -> float:
    for _ in range(3):
        way()
    seconds = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
