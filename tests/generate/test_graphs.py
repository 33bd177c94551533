"""Searches in buckets against searches of the batch itself: whatever sizes follow one another, whatever requests may get, after new
weights. On a GPU the graphs are captured and replayed; elsewhere the same steps run as they are."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch

from oxyray.generate.beam import beam_search
from oxyray.generate.fixed import Best, GumbelTopK, walk_fixed
from oxyray.generate.graphs import Graphs, _captured_if_possible, _power
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.steps import PolicySteps
from tests.generate.test_fixed import DEVICES, same
from tests.model.toys import Toy

ITEMS, BEAMS = 60, 9


def legal_of(toy: Toy, random: np.random.Generator, requests: int) -> Legal:
    tree = toy.policy.tree
    pools = [
        None if random.random() < 0.4 else Pool.of_items(tree, torch.from_numpy(random.permutation(ITEMS)[:30]).to(tree.device))
        for _ in range(requests)
    ]
    some = random.random() < 0.5
    return Legal(tree, pools if random.random() < 0.7 else [None] * requests, [random.integers(0, ITEMS, 3)] * requests if some else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [{}, {"head": "codes"}, {"repeats": True}, {"backbone": "lazy"}], ids=str)
def test_whatever_batches_follow_one_another(kind, device):
    toy = Toy(items=ITEMS, width=4, **kind)
    policy = toy.policy.to(device)
    graphs = Graphs(policy, lambda: Best(BEAMS), most=3)
    random = np.random.default_rng(5)
    seen = set()
    for turn in range(14):
        if turn in (6, 10):
            with torch.no_grad():
                for weight in policy.parameters():
                    weight.add_(0.3 * torch.randn_like(weight))
        requests = int(random.integers(1, 7))
        batch = toy.request_batch(random.choice(np.arange(1, 72), requests, replace=False)).to(device)
        rows = {name: value.to(device) for name, value in toy.lookup(batch.lookups()).items()}
        legal = legal_of(toy, random, requests)
        with torch.no_grad():
            decoding = policy.start(batch, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = beam_search(PolicySteps(policy, decoding.fork()), legal, BEAMS)
        same(graphs.walk(decoding, legal), want, 1e-5)
        assert len(graphs._captured) <= 3
        seen |= set(graphs._captured)
    assert len(seen) > 3


def test_graphs_are_shared_by_batches_of_like_size():
    toy = Toy(items=ITEMS, width=4)
    graphs = Graphs(toy.policy, lambda: Best(BEAMS))
    for requests in (5, 6, 7, 8):
        batch = toy.request_batch(np.arange(1, 1 + requests))
        with torch.no_grad():
            decoding = toy.policy.start(batch, toy.lookup(batch.lookups()))
        graphs.walk(decoding, Legal(toy.policy.tree, [None] * requests))
    assert len({(bucket.requests, bucket.slots) for bucket in graphs._captured}) == 1
    assert [_power(count) for count in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


def test_a_search_that_cannot_be_captured_runs_without(monkeypatch, caplog):
    def refused(search, memory):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("oxyray.generate.graphs._capture", refused)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    search = _captured_if_possible(lambda: "found", None)
    assert search() == "found"
    assert "runs without, which is slower: operation not permitted" in caplog.text


def test_draws_are_those_of_the_walk_itself():
    toy = Toy(items=ITEMS, width=4)
    batch = toy.request_batch(np.array([3, 9, 20, 30]))
    with torch.no_grad():
        decoding = toy.policy.start(batch, toy.lookup(batch.lookups()))
    legal = Legal(toy.policy.tree, [None] * 4)
    graphs = Graphs(toy.policy, lambda: GumbelTopK(6, None), temperature=1.3)
    torch.manual_seed(4)
    found = graphs.walk(decoding, legal)
    torch.manual_seed(4)
    want = walk_fixed(PolicySteps(toy.policy, decoding.fork()), legal, GumbelTopK(6, None), temperature=1.3)
    assert torch.equal(found.leaf_BK, want.leaf_BK)
    torch.testing.assert_close(found.logprob_BKL, want.logprob_BKL)
