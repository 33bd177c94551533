"""Beam search against brute-force scoring of the whole catalogue, and the laws that any result must keep."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.errors import GenerationError
from oxyray.generate.beam import Beams, beam_search
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.steps import PolicySteps
from oxyray.sid.prefix import PrefixIndex
from tests.generate.tiny import Tiny, catalogue
from tests.model.test_policy import sid_logprob
from tests.model.toys import Toy


def search(toy: Toy, events: np.ndarray, beams: int, pool: Pool | None = None, **asked) -> Beams:
    batch = toy.request_batch(np.asarray(events))
    steps = PolicySteps.begin(toy.policy, batch, toy.lookup(batch.lookups()))
    return beam_search(steps, Legal(toy.policy.tree, [pool] * len(events)), beams, **asked)


def brute_force(toy: Toy, event: int, leaves: np.ndarray) -> np.ndarray:
    """Log-probability of each leaf for one request, one SID at a time."""
    return np.array([sid_logprob(toy, toy.request_batch(np.array([event])), toy.index.node_path(np.array([leaf]))[0]) for leaf in leaves])


def test_a_full_beam_equals_scoring_the_catalogue():
    toy = Toy()
    events = np.array([3, 20, 41])
    found = search(toy, events, toy.index.leaves)
    for row, event in enumerate(events):
        want = brute_force(toy, event, np.arange(toy.index.leaves))
        order = np.argsort(-want)
        assert found.leaf_BK[row].tolist() == order.tolist()
        np.testing.assert_allclose(found.logprob_BK[row].numpy(), want[order], rtol=1e-9)
        assert np.exp(want).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("normalise", ["children", "vocabulary"])
def test_a_narrow_beam_equals_beam_search_written_out(normalise):
    """Beam search by its definition: keep the K best prefixes of each length, scored one at a time by a dense softmax."""
    toy = Toy(head="codes", items=60, width=6)
    for event in (0, 15, 40):
        batch = toy.request_batch(np.array([event]))
        rows = toy.lookup(batch.lookups())
        found = search(toy, [event], 4, normalise=normalise)
        live = [(0.0, ())]
        for level in range(3):
            grown = []
            for score, prefix in live:
                decoding = toy.policy.start(batch, rows)
                for above, node in enumerate(prefix):
                    toy.policy.advance(decoding, above, torch.tensor([[node]]), torch.zeros(1, 1, dtype=torch.long) if above else None)
                parent = toy.index.parent[level] if level else np.zeros(len(toy.index.code[0]), int)
                children = np.flatnonzero(parent == (prefix[-1] if prefix else 0))
                logits = toy.policy.head.own[level].detach() @ decoding.hidden_BKD[0, 0]
                codes = toy.index.code[level][children].astype(int)
                over = logits[codes] if normalise == "children" else logits
                grown += [(score + float(logits[c] - torch.logsumexp(over, 0)), (*prefix, n)) for c, n in zip(codes, children, strict=True)]
            live = sorted(grown, reverse=True)[:4]
        assert found.leaf_BK[0].tolist() == [prefix[-1] for _, prefix in live]
        np.testing.assert_allclose(found.logprob_BK[0].numpy(), [score for score, _ in live], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), beams=st.integers(1, 70), share=st.floats(0.02, 1.0))
def test_results_are_legal_sorted_distinct_and_capped_by_the_pool(seed, beams, share):
    toy = Toy(seed=seed % 7, items=60, width=4)
    allowed = np.random.default_rng(seed).random(60) < share
    allowed[seed % 60] = True
    pool = Pool.of_items(toy.policy.tree, torch.from_numpy(allowed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = search(toy, [1, 30, 50, 71], beams, pool)
    legal = set(toy.index.leaf_of(toy.codes_IL[allowed]).tolist())
    for leaves, scores in zip(found.leaf_BK.tolist(), found.logprob_BK.tolist(), strict=True):
        real = [leaf for leaf in leaves if leaf >= 0]
        assert set(real) <= legal
        assert len(set(real)) == len(real) >= 1
        assert scores == sorted(scores, reverse=True)
        if beams >= len(legal):
            assert set(real) == legal
            assert np.exp([s for s, leaf in zip(scores, leaves, strict=True) if leaf >= 0]).sum() == pytest.approx(1.0)


def test_batching_changes_nothing():
    toy = Toy()
    events = np.arange(0, 72, 5)
    found = search(toy, events, 8)
    for row, event in enumerate(events):
        alone = search(toy, [event], 8)
        assert alone.leaf_BK[0].tolist() == found.leaf_BK[row].tolist()
        torch.testing.assert_close(alone.logprob_BK[0], found.logprob_BK[row])


def test_a_short_pool_warns_and_gives_all_it_has():
    toy = Toy()
    pool = Pool.of_items(toy.policy.tree, torch.tensor([3, 4, 5]))
    with pytest.warns(UserWarning, match=rf"9 beams, but a request's pool holds {pool.leaves} SIDs"):
        found = search(toy, [0, 7], 9, pool)
    assert sorted(found.leaf_BK[0].tolist()) == sorted(set(toy.index.leaf_of(toy.codes_IL[[3, 4, 5]]).tolist()))


def test_a_pool_of_one_item():
    toy = Toy()
    found = search(toy, [0, 7], 1, Pool.of_items(toy.policy.tree, torch.tensor([8])))
    assert found.leaf_BK.tolist() == [[int(toy.index.leaf_of(toy.codes_IL[[8]])[0])]] * 2
    assert found.logprob_BK.tolist() == [[0.0]] * 2


def test_a_pool_that_excludes_every_likely_child():
    """The legal SIDs are those that the model finds least likely: they come back, in the right order."""
    toy = Toy(head="codes", items=60, width=6)
    worst = search(toy, [20], toy.index.leaves).leaf_BK[0, -4:].tolist()
    items = np.concatenate([toy.index.items_of(leaf) for leaf in worst])
    found = search(toy, [20], 4, Pool.of_items(toy.policy.tree, torch.from_numpy(items)), normalise="vocabulary")
    assert set(found.leaf_BK[0].tolist()) == set(worst)
    everything = search(toy, [20], toy.index.leaves, normalise="vocabulary")
    score = dict(zip(everything.leaf_BK[0].tolist(), everything.logprob_BK[0].tolist(), strict=True))
    np.testing.assert_allclose(found.logprob_BK[0].numpy(), [score[leaf] for leaf in found.leaf_BK[0].tolist()], rtol=1e-9)


@pytest.mark.parametrize("normalise", ["children", "vocabulary"])
@pytest.mark.parametrize(
    "codes",
    [[[0, 1, 2]], [[0, 1, 2], [1, 1, 0], [2, 1, 2]], [[0, 0, 0], [0, 0, 1], [0, 0, 2]], [[2], [0]], [[1, 0], [1, 2], [0, 0]]],
    ids=["one SID", "middle", "first two", "one level", "two levels"],
)
def test_levels_with_a_single_code(codes, normalise):
    index = PrefixIndex.from_codes(np.array(codes), 3)
    steps = Tiny(index, 2)
    found = beam_search(steps, Legal(steps.tree, [None, None]), index.leaves, normalise)
    for row in range(2):
        want = {
            leaf: tokens.sum() for leaf, tokens in steps.token_logprobs(row, set(range(index.leaves)), normalise == "vocabulary").items()
        }
        assert found.leaf_BK[row].tolist() == sorted(want, key=lambda leaf: -want[leaf])
        np.testing.assert_allclose(found.logprob_BK[row].numpy(), sorted(want.values(), reverse=True), atol=1e-12)


def test_only_children_skip_the_last_forward():
    """Nothing changes (the brute force above has such prefixes too); over the vocabulary they are not certain, so all are fed."""
    codes_IL, index = catalogue(0, 40, 5)
    several = np.diff(index.first_child[1].astype(int)) > 1
    assert 0 < several.sum() < len(several)
    fed = {}
    for normalise in ("children", "vocabulary"):
        steps = Tiny(index, 1)
        found = beam_search(steps, Legal(steps.tree, [None]), index.leaves, normalise)
        tokens = steps.token_logprobs(0, set(range(index.leaves)), normalise == "vocabulary")
        np.testing.assert_allclose(found.logprob_BK[0].numpy(), [tokens[leaf].sum() for leaf in found.leaf_BK[0].tolist()], rtol=1e-9)
        fed[normalise] = steps.fed
    assert fed == {"children": [len(index.code[0]), several.sum()], "vocabulary": [len(index.code[0]), len(several)]}
    alone = PrefixIndex.from_codes(codes_IL[:1], 5)
    steps = Tiny(alone, 3)
    beam_search(steps, Legal(steps.tree, [None] * 3), 1)
    assert steps.fed == [1]  # the last forward is left out altogether


def test_at_most_so_many_beams_under_one_first_code():
    toy = Toy()
    found = search(toy, [3, 20], 10, per_root=2)
    for leaves in found.leaf_BK.numpy():
        roots = toy.index.node_path(leaves[leaves >= 0])[:, 0]
        assert np.bincount(roots).max() == 2
        assert len(roots) == 10


def test_an_empty_pool_is_a_typed_error():
    toy = Toy()
    with pytest.raises(GenerationError, match="holds no item"):
        Pool.of_items(toy.policy.tree, torch.zeros(40, dtype=torch.bool))


def test_the_tied_head_refuses_vocabulary_normalisation():
    with pytest.raises(GenerationError, match="head=codes"):
        search(Toy(), [0], 3, normalise="vocabulary")
