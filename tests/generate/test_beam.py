"""Beam search against brute-force scoring of the whole catalogue, and the laws that any result must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.errors import GenerationError
from oxyray.generate.beam import Pool, beam_search
from oxyray.generate.engine import Generator
from tests.model.test_policy import sid_logprob
from tests.model.toys import Toy


def brute_force(toy: Toy, event: int, leaves: np.ndarray) -> np.ndarray:
    """Log-probability of each leaf for one request, one SID at a time."""
    return np.array([sid_logprob(toy, toy.request_batch(np.array([event])), toy.index.node_path(np.array([leaf]))[0]) for leaf in leaves])


def test_a_full_beam_equals_scoring_the_catalogue():
    toy = Toy()
    events = np.array([3, 20, 41])
    batch = toy.request_batch(events)
    found = beam_search(toy.policy, batch, toy.lookup(batch.lookups()), beams=toy.index.leaves)
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
        found = beam_search(toy.policy, batch, rows, beams=4, normalise=normalise)
        live = [(0.0, ())]
        for level in range(3):
            grown = []
            for score, prefix in live:
                decoding = toy.policy.start(batch, rows)
                for above, node in enumerate(prefix):
                    toy.policy.advance(decoding, above, torch.tensor([[node]]), torch.zeros(1, 1, dtype=torch.long) if above else None)
                parent = toy.index.parent[level] if level else np.zeros(len(toy.index.code[0]), int)
                children = np.flatnonzero(parent == (prefix[-1] if prefix else 0))
                logits = toy.policy.head.own[level] @ decoding.hidden_BKD[0, 0]
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
    batch = toy.request_batch(np.array([1, 30, 50, 71]))
    found = beam_search(toy.policy, batch, toy.lookup(batch.lookups()), beams, pool)
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
    together = toy.request_batch(events)
    found = beam_search(toy.policy, together, toy.lookup(together.lookups()), 8)
    for row, event in enumerate(events):
        one = toy.request_batch(np.array([event]))
        alone = beam_search(toy.policy, one, toy.lookup(one.lookups()), 8)
        assert alone.leaf_BK[0].tolist() == found.leaf_BK[row].tolist()
        torch.testing.assert_close(alone.logprob_BK[0], found.logprob_BK[row])


def test_shared_sids_resolve_by_the_stated_rule_and_exclusions_hold():
    toy = Toy(items=60, width=2)  # 8 SIDs for 60 items
    order_I = np.random.default_rng(0).integers(0, 5, 60)
    generator = Generator(toy.policy, toy.lookup, toy.index, order_I, beams=8)
    found = generator.generate(toy.request_batch(np.array([5])), items=60, exclude=[np.array([7, 8])])
    items = found.item_BR[0][found.item_BR[0] >= 0].tolist()
    want = []
    for leaf in found.leaf_BK[0]:
        below = [i for i in toy.index.items_of(int(leaf)).tolist() if i not in (7, 8)]
        want += sorted(below, key=lambda i: (-order_I[i], i))
    assert items == want
    assert len(items) == 58


def test_items_outside_the_pool_are_left_out_of_shared_sids():
    toy = Toy(items=60, width=2)
    allowed = np.arange(60) % 3 == 0
    generator = Generator(toy.policy, toy.lookup, toy.index, np.zeros(60), beams=8)
    found = generator.generate(toy.request_batch(np.array([5])), items=60, pool=generator.pool("thirds", allowed))
    assert sorted(found.item_BR[0][found.item_BR[0] >= 0].tolist()) == np.flatnonzero(allowed).tolist()


def test_an_empty_pool_is_a_typed_error():
    toy = Toy()
    with pytest.raises(GenerationError, match="holds no item"):
        Pool.of_items(toy.policy.tree, torch.zeros(40, dtype=torch.bool))


def test_the_tied_head_refuses_vocabulary_normalisation():
    toy = Toy()
    batch = toy.request_batch(np.array([0]))
    with pytest.raises(GenerationError, match="head=codes"):
        beam_search(toy.policy, batch, toy.lookup(batch.lookups()), 3, normalise="vocabulary")
