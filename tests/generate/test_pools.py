"""Pools, exclusions and their mixtures within a batch against sets of leaves; legality of very many generations."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.errors import GenerationError
from oxyray.generate.beam import beam_search
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.sample import Sampling, sample
from oxyray.model.head import Tree
from oxyray.sid.prefix import PrefixIndex
from tests.generate.tiny import Tiny, catalogue, leaves_of


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), beams=st.integers(1, 60), width=st.integers(1, 6), levels=st.integers(1, 4), share=st.floats(0.05, 1))
def test_each_request_gets_the_best_of_its_own_pool_less_its_own_exclusions(seed, beams, width, levels, share):
    random = np.random.default_rng(seed)
    codes_IL, index = catalogue(seed, 50, width, levels)
    steps = Tiny(index, 4, seed % 5)
    everything = np.arange(50)
    allowed = [everything, *(np.flatnonzero(random.random(50) < share) for _ in range(2))]
    allowed = [items if len(items) else everything for items in allowed]
    pools = [None, *(Pool.of_items(steps.tree, torch.from_numpy(items)) for items in allowed[1:])]
    which = [0, 1, 2, 1]
    exclude = [random.choice(50, random.integers(0, 50)) for _ in which]  # also outside the pool, also twice
    legal = [leaves_of(index, codes_IL, np.setdiff1d(allowed[j], exclude[b])) for b, j in enumerate(which)]
    rules = Legal(steps.tree, [pools[j] for j in which], exclude)
    assert rules.leaves_B == [len(leaves) for leaves in legal]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = beam_search(steps, rules, beams)
    for row, leaves in enumerate(legal):
        want = {leaf: tokens.sum() for leaf, tokens in steps.token_logprobs(row, leaves).items()}
        got = {leaf: score for leaf, score in zip(found.leaf_BK[row].tolist(), found.logprob_BK[row].tolist(), strict=True) if leaf >= 0}
        assert found.logprob_BK[row].tolist() == sorted(found.logprob_BK[row].tolist(), reverse=True)
        assert len(got) == int((found.leaf_BK[row] >= 0).sum()) == min(beams, len(leaves))
        assert got.keys() <= leaves
        np.testing.assert_allclose(list(got.values()), [want[leaf] for leaf in got], atol=1e-9)


def test_marks_and_lists_make_the_same_pool():
    _, index = catalogue(1, 50, 4)
    tree = Tree(index)
    items = np.array([3, 9, 9, 41])
    mask = np.zeros(50, dtype=bool)
    mask[items] = True
    one, two = Pool.of_items(tree, torch.from_numpy(mask)), Pool.of_items(tree, torch.from_numpy(items))
    assert one.leaves == two.leaves
    assert all(torch.equal(a, b) for a, b in zip((*one.node, one.item), (*two.node, two.item), strict=True))
    assert one.has(np.arange(50)).tolist() == mask.tolist()


def test_a_list_of_unknown_items_is_a_typed_error():
    tree = Tree(PrefixIndex.from_codes(np.array([[0, 1], [1, 0]]), 2, np.array([4, 7])))
    assert Pool.of_items(tree, torch.tensor([5, 7, 900])).leaves == 1
    with pytest.raises(GenerationError, match="holds no item"):
        Pool.of_items(tree, torch.tensor([-1, 5, 900]))


def test_a_pool_of_another_catalogue_is_refused():
    _, index = catalogue(1, 50, 4)
    with pytest.raises(GenerationError, match="another version"):
        Legal(Tree(index), [Pool.of_items(Tree(index), torch.tensor([1]))])


def test_where_everything_is_excluded_nothing_comes_back():
    codes_IL, index = catalogue(1, 50, 4)
    for excluding in ([np.arange(50)] * 2, [np.arange(50), np.array([1])]):
        steps = Tiny(index, 2)
        rules = Legal(steps.tree, [None, None], excluding)
        with pytest.warns(UserWarning, match="holds 0 SIDs"):
            found = beam_search(steps, rules, 4)
        assert found.leaf_BK.shape == found.logprob_BK.shape
        assert (found.leaf_BK[0] == -1).all()
        assert set(found.leaf_BK[1].tolist()) <= leaves_of(index, codes_IL, np.setdiff1d(np.arange(50), excluding[1])) | {-1}
        drawn = sample(Tiny(index, 2), rules, 4, Sampling(replacement=True))
        assert (drawn.leaf_BG[0] == -1).all()


def test_a_hundred_thousand_random_generations_over_changing_pools_are_all_legal():
    """Drawn, searched and drawn without replacement, whole catalogue and pools down to one item, exclusions; no wrong one among them."""
    random = np.random.default_rng(0)
    codes_IL, index = catalogue(0, 400, 8)
    leaf_I = index.leaf_of(codes_IL)
    tree, total = Tree(index), 0
    generator = torch.Generator().manual_seed(0)
    while total < 100_000:
        allowed = [np.flatnonzero(random.random(400) < random.choice([0.02, 0.2, 1.0])) for _ in range(8)]
        allowed = [items if len(items) else np.array([7]) for items in allowed]
        exclude = [random.choice(400, random.integers(0, 30)) for _ in allowed]
        rules = Legal(tree, [Pool.of_items(tree, torch.from_numpy(items)) for items in allowed], exclude)
        legal = [np.unique(leaf_I[np.setdiff1d(items, gone)]) for items, gone in zip(allowed, exclude, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = [
                beam_search(Tiny(index, 8, total, tree=tree), rules, 100).leaf_BK,
                sample(Tiny(index, 8, total, tree=tree), rules, 100, Sampling(top_k=5), generator).leaf_BG,
                sample(Tiny(index, 8, total, tree=tree), rules, 300, Sampling(top_p=0.9, replacement=True), generator).leaf_BG,
            ]
        for leaf_BK in made:
            for row, leaves in enumerate(legal):
                real = leaf_BK[row][leaf_BK[row] >= 0].numpy()
                assert np.isin(real, leaves).all()
                assert len(real) or not len(leaves)
                total += len(real)
