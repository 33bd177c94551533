"""The walk in fixed shapes against the ragged one, whose own tests are brute force: the same beams, the same probabilities; and draws
against the distribution written out. On a GPU too, where there is one."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.peers_generate import T5Steps, t5
from oxyray.errors import GenerationError
from oxyray.generate.beam import beam_search
from oxyray.generate.fixed import Best, GumbelTopK, products, walk_fixed
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.steps import Outputs, PolicySteps
from oxyray.generate.walk import Walked
from oxyray.model.head import Tree
from oxyray.sid.prefix import PrefixIndex
from tests.generate.tiny import Tiny, catalogue, leaves_of
from tests.model.toys import Toy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def same(found: Walked, want, atol: float = 1e-9) -> None:
    """Beams rank by rank; the ragged walk may give fewer columns where no request has more."""
    leaf_BK, total_BK = found.leaf_BK.cpu(), found.logprob_BKL.sum(-1).cpu()
    width = want.leaf_BK.shape[1]
    assert (leaf_BK[:, width:] == -1).all()
    assert torch.equal(leaf_BK[:, :width], want.leaf_BK.cpu())
    real_BK = want.leaf_BK.cpu() >= 0
    torch.testing.assert_close(total_BK[:, :width][real_BK], want.logprob_BK.cpu()[real_BK], atol=atol, rtol=0)
    assert (total_BK[leaf_BK < 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), items=st.integers(1, 60), width=st.integers(1, 7), levels=st.integers(1, 4), beams=st.integers(1, 40),
    normalise=st.sampled_from(["children", "vocabulary"]),
)  # fmt: skip
def test_beams_are_those_of_the_ragged_walk(seed, items, width, levels, beams, normalise):
    _, index = catalogue(seed, items, width, levels)
    random = np.random.default_rng(seed)
    tree, requests = Tree(index), 3
    pools = [
        None if random.random() < 0.3 else Pool.of_items(tree, torch.from_numpy(random.permutation(items)[: 1 + items // 2]))
        for _ in range(requests)
    ]
    exclude = [random.integers(0, items, int(random.integers(0, 4))) for _ in range(requests)] if seed % 2 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = beam_search(Tiny(index, requests, tree=tree), Legal(tree, pools, exclude), beams, normalise)
    found = walk_fixed(Tiny(index, requests, tree=tree), Legal(tree, pools, exclude), Best(beams), normalise)
    same(found, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("toy", [{}, {"head": "codes"}, {"repeats": True}, {"backbone": "lazy"}], ids=str)
def test_the_policys_beams_are_the_same(toy, device):
    made = Toy(items=60, width=4, **toy)
    batch = made.request_batch(np.array([1, 30, 50, 71]))
    rows = made.lookup(batch.lookups())
    allowed = torch.from_numpy(np.random.default_rng(1).random(60) < 0.6)
    want = beam_search(
        PolicySteps.begin(made.policy, batch, rows), Legal(made.policy.tree, [Pool.of_items(made.policy.tree, allowed), None] * 2), 9
    )
    policy, on = made.policy.to(device), batch.to(device)
    steps = PolicySteps.begin(policy, on, {name: value.to(device) for name, value in rows.items()})
    legal = Legal(policy.tree, [Pool.of_items(policy.tree, allowed.to(device)), None] * 2)
    same(walk_fixed(steps, legal, Best(9)), want, 1e-6)


@pytest.mark.parametrize("normalise", ["children", "vocabulary"])
def test_t5s_beams_are_the_same(normalise):
    model = t5(codes=24, width=32, layers=2, heads=4)
    _, index = catalogue(0, 1500, 24)
    memory_BSD, visible_BS = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(2)), torch.ones(3, 11, dtype=torch.bool)
    tree = Tree(index)
    want, found = (
        search(T5Steps(model, memory_BSD, visible_BS, tree), Legal(tree, [None] * 3))
        for search in (
            lambda steps, legal: beam_search(steps, legal, 64, normalise),
            lambda steps, legal: walk_fixed(steps, legal, Best(64), normalise),
        )
    )
    torch.testing.assert_close(found.logprob_BKL.sum(-1), want.logprob_BK, atol=1e-5, rtol=0)
    assert (found.leaf_BK == want.leaf_BK).float().mean() > 0.98, "but for ties"


def test_first_draws_follow_the_distribution_and_know_their_probability():
    allowed = np.array([0, 1, 2, 4, 5, 7, 8, 10, 11])
    codes_IL, index = catalogue(3, 12, 3)
    steps = Tiny(index, 1, 1, sharp=1.0)
    want = steps.token_logprobs(0, leaves_of(index, codes_IL, allowed), temperature=0.7)
    many = Tiny(index, 20_000, 1, sharp=1.0, tree=steps.tree)
    many.hidden_BKD = steps.first_BD[:, None].expand(20_000, 1, -1)
    pool = Pool.of_items(steps.tree, torch.from_numpy(allowed))
    rule = GumbelTopK(1, torch.Generator().manual_seed(5))
    found = walk_fixed(many, Legal(steps.tree, [pool] * 20_000), rule, temperature=0.7)
    leaves = found.leaf_BK[:, 0].tolist()
    np.testing.assert_allclose(found.logprob_BKL[:, 0].numpy(), np.stack([want[leaf] for leaf in leaves]), atol=1e-9)
    counts = [leaves.count(leaf) for leaf in want]
    assert stats.chisquare(counts, [20_000 * math.exp(tokens.sum()) for tokens in want.values()]).pvalue > 1e-3


def test_draws_are_distributed_as_if_drawn_one_after_another():
    index = PrefixIndex.from_codes(np.array([[0, 0], [0, 1], [0, 2], [1, 1], [2, 0], [2, 2]]), 3)
    steps = Tiny(index, 1, 2, sharp=0.7)
    prob = {leaf: math.exp(tokens.sum()) for leaf, tokens in steps.token_logprobs(0, set(range(6))).items()}
    many = Tiny(index, 30_000, 2, sharp=0.7, tree=steps.tree)
    many.hidden_BKD = steps.first_BD[:, None].expand(30_000, 1, -1)
    rule = GumbelTopK(2, torch.Generator().manual_seed(1))
    drawn = walk_fixed(many, Legal(steps.tree, [None] * 30_000), rule).leaf_BK
    assert (rule.key_BK[:, 0] >= rule.key_BK[:, 1]).all()
    pairs = [(a, b) for a in prob for b in prob if a != b]
    counts = [int(((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum()) for a, b in pairs]
    assert sum(counts) == 30_000
    assert stats.chisquare(counts, [30_000 * prob[a] * prob[b] / (1 - prob[a]) for a, b in pairs]).pvalue > 1e-3


def test_all_sids_come_once_when_more_are_asked_for():
    _, index = catalogue(3, 12, 3)
    steps = Tiny(index, 2)
    for rule in (GumbelTopK(50, None), Best(50)):
        for row in walk_fixed(Tiny(index, 2), Legal(steps.tree, [None, None]), rule).leaf_BK.tolist():
            assert sorted(leaf for leaf in row if leaf >= 0) == list(range(index.leaves))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("by_code", "room"), [(True, 3), (True, 40), (False, 7)])
def test_products_against_the_dense_product(by_code, room, device, monkeypatch):
    monkeypatch.setattr("oxyray.generate.fixed._SLICE", 100)
    random = torch.Generator().manual_seed(room)
    hidden_MD, vector_VD = torch.randn(11, 20, generator=random).to(device), torch.randn(50, 20, generator=random).to(device)
    row_MF = torch.randint(0, 50, (11, room), generator=random).to(device)
    found = products(hidden_MD, Outputs(vector_VD, by_code), row_MF)
    torch.testing.assert_close(found, (hidden_MD @ vector_VD.T).gather(1, row_MF), atol=1e-4, rtol=1e-4)


def test_the_tied_head_refuses_vocabulary_normalisation():
    toy = Toy()
    batch = toy.request_batch(np.array([0]))
    with pytest.raises(GenerationError, match="head=codes"):
        walk_fixed(PolicySteps.begin(toy.policy, batch, toy.lookup(batch.lookups())), Legal(toy.policy.tree, [None]), Best(3), "vocabulary")
