"""The second opinion on the order: against plain loops over the log."""

from __future__ import annotations

import numpy as np
import pytest

from oxyray.data.covisits import CoVisits
from oxyray.generate.engine import Cap, Generator
from oxyray.generate.rerank import DECAY, FLOOR, LATEST, Followers
from tests.model.toys import Toy


def visits(items: int, seed: int = 0) -> CoVisits:
    from scipy import sparse

    similar_II = sparse.random(items, items, density=0.2, random_state=seed, format="lil", dtype=np.float32)
    similar_II.setdiag(0)
    similar_II = sparse.csr_matrix(similar_II)
    similar_II.eliminate_zeros()
    return CoVisits(similar_II, np.ones(items), np.ones(items))


@pytest.mark.parametrize("head", ["tied", "codes"])  # a batch of the whole catalogue, and one of its own items
@pytest.mark.parametrize("weight", [0.3, 4.0])
def test_items_stand_by_probability_and_followers(head: str, weight: float) -> None:
    toy = Toy(head=head)
    held = visits(40)
    batch = toy.request_batch(np.arange(0, len(toy.timeline.item_E), 5))
    beams = Generator(toy.policy, toy.lookup, toy.index, np.arange(40), beams=30)
    ranked = Generator(toy.policy, toy.lookup, toy.index, np.arange(40), beams=30, opinions=[Followers(held, weight)])
    plain, found = beams.generate(batch, 40), ranked.generate(batch, 7)
    similar_II = held.similar_II.toarray()
    changed = 0
    for b in range(batch.segments):
        first, seen = int(batch.history_offset[b]), int(batch.visible_Q[b])
        latest = batch.items.ids_U[batch.item_N[first : first + seen]].tolist()[::-1][:LATEST]
        strength_I = sum((DECAY**age * similar_II[item] for age, item in enumerate(latest)), np.zeros(40))
        real = plain.item_BR[b] >= 0
        items = plain.item_BR[b][real]
        score = plain.score_BR[b][real] + weight * np.log(strength_I[items] + FLOOR)
        order = np.argsort(-score, kind="stable")[:7]
        np.testing.assert_allclose(found.score_BR[b], score[order], rtol=1e-4)
        assert found.item_BR[b].tolist() == items[order].tolist()
        changed += found.item_BR[b].tolist() != items[:7].tolist()
    assert changed > batch.segments / 2
    assert (found.leaf_BK == plain.leaf_BK).all()


def test_nobody_is_moved_for_a_newcomer_and_a_cap_counts_in_the_new_order() -> None:
    toy = Toy()
    batch = toy.request_batch(np.arange(0, len(toy.timeline.item_E), 7))
    ranked = Generator(toy.policy, toy.lookup, toy.index, np.arange(40), beams=30, opinions=[Followers(visits(40), 2.0)])
    plain = Generator(toy.policy, toy.lookup, toy.index, np.arange(40), beams=30)
    new = int((batch.visible_Q == 0).nonzero()[0])
    assert ranked.generate(batch, 10).item_BR[new].tolist() == plain.generate(batch, 10).item_BR[new].tolist()
    cap = Cap(np.arange(40) % 3, 1)
    whole, capped = ranked.generate(batch, 40), ranked.generate(batch, 10, cap=cap)
    for b in range(batch.segments):
        order = [item for item in whole.item_BR[b].tolist() if item >= 0]
        firsts = [next(item for item in order if item % 3 == rest) for rest in {item % 3 for item in order}]
        assert capped.item_BR[b][: len(firsts)].tolist() == sorted(firsts, key=order.index)


def test_items_that_the_log_does_not_know_have_no_followers() -> None:
    toy = Toy()
    few = visits(25)  # the catalogue has grown since
    batch = toy.request_batch(np.arange(0, len(toy.timeline.item_E), 5))
    bonus_QI = Followers(few, 1.0)(batch, np.tile(np.arange(40), (batch.segments, 1)))
    late_Q = np.array(
        [bool((batch.item_N[int(o) : int(o) + int(v)] >= 25).all()) for o, v in zip(batch.history_offset, batch.visible_Q, strict=False)]
    )
    assert late_Q.any()
    assert (bonus_QI[late_Q] == np.log(FLOOR)).all()
    assert (bonus_QI[:, 25:] == np.log(FLOOR)).all()
    assert (bonus_QI > np.log(FLOOR)).any()
