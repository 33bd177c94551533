"""Requests to items: shared SIDs, pools and exclusions, caps, samples, and swaps of the catalogue while it is asked."""

import threading

import numpy as np
import pytest
import torch

from oxyray.errors import CatalogueError, GenerationError
from oxyray.generate.engine import Cap, Generator
from oxyray.generate.sample import Sampling
from oxyray.sid.prefix import PrefixIndex
from tests.model.toys import Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*a request's pool holds")


def made(toy: Toy, order_I: np.ndarray | None = None, beams: int = 8) -> Generator:
    return Generator(toy.policy, toy.lookup, toy.index, np.zeros(len(toy.codes_IL)) if order_I is None else order_I, beams)


def items_of(item_R: np.ndarray) -> list[int]:
    return item_R[item_R >= 0].tolist()


def test_shared_sids_resolve_by_the_stated_rule_and_exclusions_hold():
    toy = Toy(items=60, width=2)  # 8 SIDs for 60 items
    order_I = np.random.default_rng(0).integers(0, 5, 60)
    found = made(toy, order_I).generate(toy.request_batch(np.array([5])), items=60, exclude=[np.array([7, 8])])
    want = []
    for leaf in found.leaf_BK[0]:
        below = [i for i in toy.index.items_of(int(leaf)).tolist() if i not in (7, 8)]
        want += sorted(below, key=lambda i: (-order_I[i], i))
    assert items_of(found.item_BR[0]) == want
    assert len(want) == 58


def test_items_outside_the_pool_are_left_out_of_shared_sids():
    toy = Toy(items=60, width=2)
    allowed = np.arange(60) % 3 == 0
    generator = made(toy)
    found = generator.generate(toy.request_batch(np.array([5])), items=60, pool=generator.pool("thirds", allowed))
    assert sorted(items_of(found.item_BR[0])) == np.flatnonzero(allowed).tolist()
    assert generator.pool("all", np.ones(60, dtype=bool)) is None


def test_excluded_items_leave_their_beams_to_others():
    toy = Toy(items=60, width=6)
    generator = made(toy, beams=5)
    first = generator.generate(toy.request_batch(np.array([5])), items=5)
    bought = first.item_BR[0]
    second = generator.generate(toy.request_batch(np.array([5])), items=5, exclude=[bought])
    assert (second.item_BR >= 0).all()
    assert not np.isin(second.item_BR, bought).any()


def test_one_batch_mixes_pools():
    toy = Toy(items=60, width=6)
    generator = made(toy, beams=60)
    lists = [np.array([1, 2, 3]), np.array([50, 2])]
    found = generator.generate(toy.request_batch(np.array([5, 5, 9])), 60, [generator.listed(lists[0]), generator.listed(lists[1]), None])
    assert [sorted(items_of(row)) for row in found.item_BR] == [[1, 2, 3], [2, 50], list(range(60))]
    with pytest.raises(GenerationError, match="the list of items"):
        generator.listed(np.array([60]))


def test_a_cap_keeps_the_best_of_each_category():
    toy = Toy(items=60, width=6)
    category_I = np.random.default_rng(0).integers(-1, 4, 60)
    generator = made(toy, beams=60)
    everything = generator.generate(toy.request_batch(np.array([5])), 60).item_BR[0].tolist()
    found = generator.generate(toy.request_batch(np.array([5])), 60, cap=Cap(category_I, 2)).item_BR[0]
    want = [
        i for place, i in enumerate(everything) if category_I[i] < 0 or category_I[everything[:place]].tolist().count(category_I[i]) < 2
    ]
    assert items_of(found) == want


def test_samples_know_the_policys_probabilities():
    toy = Toy(items=60, width=4)
    generator = made(toy)
    allowed = np.arange(60) % 2 == 0
    pool = generator.pool("even", allowed)
    batch = toy.request_batch(np.array([5, 9]))
    beams = Generator(toy.policy, toy.lookup, toy.index, np.zeros(60), beams=60).generate(batch, 60, pool)
    known = [dict(zip(beams.leaf_BK[b], beams.logprob_BK[b], strict=True)) for b in range(2)]
    for replacement in (True, False):
        found = generator.sample(batch, 6, Sampling(replacement=replacement), pool, generator=torch.Generator().manual_seed(0))
        assert found.logprob_BGL.shape == (2, 6, 3)
        for b in range(2):
            want = [known[b][leaf] for leaf in found.leaf_BG[b].tolist()]
            np.testing.assert_allclose(found.logprob_BGL[b].sum(-1).numpy(), want, rtol=1e-5)


def test_a_swap_falls_between_batches():
    """One thread asks while another swaps two catalogues with the same items and other SIDs: every answer is wholly of one of them."""
    toy = Toy(head="codes", items=60, width=5)
    other_IL = (toy.codes_IL + 1) % 5
    indexes = [toy.index, PrefixIndex.from_codes(other_IL, 5)]
    generator = made(toy, beams=60)
    batch = toy.request_batch(np.array([5, 9]))
    want = {}
    for index in indexes:
        generator.swap(index, np.zeros(60))
        want[id(index)] = generator.generate(batch, 60)
    assert (want[id(indexes[0])].item_BR != want[id(indexes[1])].item_BR).any()
    stop = threading.Event()

    def swapping() -> None:
        while not stop.is_set():
            for index in indexes:
                generator.swap(index, np.zeros(60))

    thread = threading.Thread(target=swapping)
    thread.start()
    try:
        for _ in range(40):
            found = generator.generate(batch, 60)
            np.testing.assert_array_equal(found.item_BR, want[id(found.index)].item_BR)
            np.testing.assert_array_equal(found.leaf_BK, want[id(found.index)].leaf_BK)
    finally:
        stop.set()
        thread.join()


def test_a_swap_keeps_the_weights_and_renews_the_pools():
    toy = Toy(head="codes", items=60, width=5)
    generator = made(toy, beams=60)
    allowed = np.arange(60) < 30
    old = generator.pool("half", allowed)
    generator.swap(PrefixIndex.from_codes((toy.codes_IL + 1) % 5, 5), np.zeros(60))
    batch = toy.request_batch(np.array([5]))
    with pytest.raises(GenerationError, match="another version"):
        generator.generate(batch, 5, old)
    assert set(items_of(generator.generate(batch, 60, generator.pool("half", allowed)).item_BR[0])) == set(range(30))
    assert all(a is b for a, b in zip(generator.policy.parameters(), toy.policy.parameters(), strict=True))
    with pytest.raises(CatalogueError, match="built for SIDs of 3 levels of 5 codes"):
        generator.swap(PrefixIndex.from_codes(toy.codes_IL, 6), np.zeros(60))


def test_the_catalogue_is_computed_once_until_renewed_or_swapped():
    toy, asked = Toy(items=60, width=6), []

    def lookup(ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        asked.append(sorted(ids))
        return toy.lookup(ids)

    generator = Generator(toy.policy, lookup, toy.index, np.zeros(60), beams=8)
    first, second = toy.request_batch(np.array([5])), toy.request_batch(np.array([20, 33]))
    for batch in (first, second, second):
        found, alone = generator.generate(batch, 8), made(toy).generate(batch, 8)
        np.testing.assert_array_equal(found.item_BR, alone.item_BR)
        np.testing.assert_array_equal(found.score_BR, alone.score_BR)
    assert asked == [["item", "user"], ["user"], ["user"]]
    toy.tables["item"].mul_(-1)
    generator.renew()
    np.testing.assert_array_equal(generator.generate(second, 8).score_BR, made(toy).generate(second, 8).score_BR)
    generator.swap(PrefixIndex.from_codes(toy.codes_IL, 6), np.arange(60))
    generator.generate(second, 8)
    assert asked[3:] == [["item", "user"], ["item", "user"]]


def test_a_head_of_codes_keeps_nothing():
    toy = Toy(head="codes", items=60, width=6)
    generator = made(toy)
    generator.generate(toy.request_batch(np.array([5])), 8)
    second = toy.request_batch(np.array([20, 33]))
    np.testing.assert_array_equal(generator.generate(second, 8).score_BR, made(toy).generate(second, 8).score_BR)


def test_captured_searches_answer_as_the_others_do(monkeypatch):
    """On a GPU searches go through graphs; here their steps run as they are."""
    toy = Toy(items=60, width=6, repeats=True)
    plain, captured = made(toy), made(toy)
    for generator, how in ((plain, False), (captured, True)):
        monkeypatch.setattr(generator, "_captures", lambda steps, beams, how=how: how)
    for events in ([5, 9, 30], [7], [1, 2, 3, 4, 50]):
        batch, bought = toy.request_batch(np.array(events)), [np.array([3, 9])] * len(events)
        one, two = (generator.generate(batch, items=9, exclude=bought) for generator in (plain, captured))
        np.testing.assert_array_equal(two.item_BR, one.item_BR)
        np.testing.assert_allclose(two.score_BR, one.score_BR, rtol=1e-6)
        drawn = captured.sample(batch, 6, Sampling(temperature=1.4))
        assert drawn.key_BG is not None
        assert (drawn.key_BG[:, :-1] >= drawn.key_BG[:, 1:]).all()
        path_BGL = torch.from_numpy(toy.index.node_path(drawn.leaf_BG.flatten().numpy()).astype(np.int64)).view(*drawn.leaf_BG.shape, 3)
        want = toy.policy.logprob(batch, toy.lookup(batch.lookups()), path_BGL, temperature=1.4)
        torch.testing.assert_close(drawn.logprob_BGL, want.detach())
    assert len(captured._serving.graphs) == 2
    assert not plain._serving.graphs
