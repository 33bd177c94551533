"""What was had already: every form of adding the factors against the plainest one, generation against training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oxyray.config import Config, DataConfig, GenerateConfig, ModelConfig
from oxyray.data.batch import Batch
from oxyray.errors import ConfigError, GenerationError
from oxyray.generate.engine import Generator
from oxyray.model.repeats import Had
from tests.model.toys import Toy, repeat_changes


def made(**settings: object) -> tuple[Toy, Batch, Had]:
    toy = Toy(repeats=True, **settings)  # type: ignore[arg-type]
    batch = toy.training_batch()
    assert toy.policy.repeats is not None
    return toy, batch, toy.policy.repeats(toy.policy.tree, batch)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_every_form_adds_what_the_plain_one_does(level: int) -> None:
    toy, batch, had = made()
    expected_Qn = repeat_changes(toy, batch, level)
    assert (expected_Qn != 0).any()
    torch.testing.assert_close(had.add_all(level, torch.zeros_like(expected_Qn)), expected_Qn)
    random = torch.Generator().manual_seed(3)
    for pairs in (500, 20):  # many, and few: found in two ways
        query_P, node_P = (torch.randint(0, size, (pairs,), generator=random) for size in expected_Qn.shape)
        found_P = had.add(level, query_P, node_P, torch.zeros(pairs, dtype=torch.double))
        torch.testing.assert_close(found_P, expected_Qn[query_P, node_P])
    if level == 3:
        drawn_N = torch.tensor([4, 9, 4, 31, 0])
        nothing = torch.zeros(batch.queries, 5, dtype=torch.double)
        torch.testing.assert_close(had.add_drawn(drawn_N, nothing), expected_Qn[:, drawn_N])
        return
    path_QL = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]]
    nothing = torch.zeros(batch.queries, toy.vocab.width, dtype=torch.double)
    found_QV = had.add_codes(level, toy.policy.tree, path_QL[:, max(level - 1, 0)], nothing)
    for query in range(batch.queries):
        for node in range(toy.policy.tree.nodes(level)):
            if level == 0 or toy.policy.tree.parent(level)[node] == path_QL[query, level - 1]:
                assert found_QV[query, toy.policy.tree.code(level)[node]].item() == pytest.approx(
                    expected_Qn[query, node].item(), abs=1e-12
                )


def test_one_factor_on_all_levels_is_one_factor_on_items_that_are_alike() -> None:
    """Where a node's items are equally likely, the product over the levels is exact: items had are `factor` times as likely."""
    toy, batch, _ = made(width=3)
    assert toy.policy.repeats is not None
    for weight in toy.policy.repeats.factor.parameters():
        weight.data.fill_(-0.02)
    had = toy.policy.repeats(toy.policy.tree, batch)
    path_IL, counts = toy.policy.tree.path_IL, [torch.bincount(toy.policy.tree.path_IL[:, level]).double() for level in range(3)]
    total_QI = torch.zeros(batch.queries, len(path_IL), dtype=torch.double)
    for level in range(3):
        logit_Qn = had.add_all(level, counts[level].log().expand(batch.queries, -1).clone())
        parent_n = toy.policy.tree.parent(level)
        norm = torch.zeros(batch.queries, int(parent_n.max()) + 1, dtype=torch.double).index_add(1, parent_n, logit_Qn.exp()).log()
        total_QI += (logit_Qn - norm[:, parent_n])[:, path_IL[:, level]]
    share_QI = (total_QI - counts[2].log()[path_IL[:, 2]]).exp()  # items of a leaf stand in for one another
    alone = counts[2][path_IL[:, 2]] == 1
    expected_QI = repeat_changes(toy, batch, 3).exp()
    expected_QI = expected_QI / expected_QI.sum(1, keepdim=True)
    torch.testing.assert_close(share_QI[:, alone], expected_QI[:, alone].detach())


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_generation_draws_from_what_training_learns(head: str) -> None:
    toy = Toy(head=head, repeats=True)
    batch = toy.request_batch(np.array([5, 20, 40]))
    generator = Generator(toy.policy, toy.lookup, toy.index, np.zeros(40), beams=30)
    found = generator.generate(batch, 10)
    path_BGL = toy.policy.tree.path_IL[torch.from_numpy(found.item_BR)]
    logprob_BR = toy.policy.logprob(batch, toy.lookup(batch.lookups()), path_BGL).sum(-1)
    np.testing.assert_allclose(found.score_BR, logprob_BR.detach().numpy(), atol=1e-5)
    drawn = generator.sample(batch, 8, generator=torch.Generator().manual_seed(1))
    assert (drawn.leaf_BG >= 0).all()
    places = torch.tensor([int((toy.policy.tree.leaf_of_item() == leaf).nonzero()[0, 0]) for leaf in drawn.leaf_BG.flatten()])
    again = toy.policy.logprob(batch, toy.lookup(batch.lookups()), toy.policy.tree.path_IL[places].view(3, 8, 3))
    torch.testing.assert_close(drawn.logprob_BGL, again.detach())


def test_the_item_level_loss_against_drawn_items_knows_what_was_had() -> None:
    """With head=codes a batch holds some of the catalogue's items, and places among these are not catalogue indices."""
    toy = Toy(head="codes", items=60, repeats=True, item_loss=1.0)
    batch = toy.training_batch()
    rows = toy.lookup(batch.lookups())
    said = toy.policy.loss(batch, rows).parts["item"]
    assert batch.negative_N is not None
    item_UD = toy.policy.items(batch.items, rows["item"])
    told = toy.policy._told(batch, item_UD)
    memory = toy.policy._memory(batch, rows, item_UD, told)
    prompt = toy.policy.instruction.prompt(told)
    hidden_QTD = toy.policy.decoder(prompt + toy.policy._start(batch, memory, told)[:, None], memory)
    query_QD = toy.policy.item_query(hidden_QTD[:, -1])
    change_QI, ids_U, negatives = repeat_changes(toy, batch, 3), batch.items.ids_U, batch.negative_N.tolist()
    total = 0.0
    for query, target in enumerate(batch.target_Q.tolist()):
        logit_U = item_UD @ query_QD[query] + change_QI[query, ids_U]
        others = [logit_U[u] + np.log(59 / len(negatives)) for u in negatives if u != target]
        total += float(batch.weight_Q[query] * (torch.stack([logit_U[target], *others]).logsumexp(0) - logit_U[target]))
    assert said.item() == pytest.approx(total, rel=1e-9)


def test_a_shop_where_nobody_takes_twice_is_learned() -> None:
    """Targets are never among what was had: the factors fall until what was had has next to no chance."""
    toy = Toy(repeats=True, item_loss=0.5, distill=1.0)
    batch = toy.training_batch()
    assert toy.policy.repeats is not None
    had = toy.policy.repeats(toy.policy.tree, batch)
    query_H, item_H = had.pairs(-1)
    taken_Q = batch.items.ids_U[batch.target_Q]
    again_Q = torch.zeros(batch.queries, dtype=torch.bool).index_put((query_H[item_H == taken_Q[query_H]],), torch.tensor(True))
    batch.weight_Q = torch.where(again_Q, 0.0, 1.0).double()
    rows = toy.lookup(batch.lookups())
    for weight in toy.policy.repeats.factor.parameters():
        weight.data.zero_()
    optimizer = torch.optim.Adam(toy.policy.repeats.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        toy.policy.loss(batch, rows).total.backward()
        optimizer.step()
    said_QI = repeat_changes(toy, batch, 3).detach()
    assert float(said_QI[query_H, item_H].max()) < -2


def test_newcomers_have_had_nothing_and_all_weights_take_part() -> None:
    toy, batch, _ = made()
    batch.visible_Q = torch.zeros_like(batch.visible_Q)
    assert toy.policy.repeats is not None
    had = toy.policy.repeats(toy.policy.tree, batch)
    assert [len(key) for key in had.key_H] == [0, 0, 0, 0]
    toy.policy.loss(batch, toy.lookup(batch.lookups())).total.backward()
    assert all(weight.grad is not None for weight in toy.policy.repeats.parameters())


def test_probabilities_over_the_whole_vocabulary_are_refused() -> None:
    parts = {"model": ModelConfig(head="codes", repeats=True), "generate": GenerateConfig(normalise="vocabulary")}
    with pytest.raises(ConfigError, match="set model.repeats=false"):
        Config(run_dir="x", data=DataConfig(name="x", source="mall"), **parts)
    toy = Toy(head="codes", repeats=True)
    generator = Generator(toy.policy, toy.lookup, toy.index, np.zeros(40), beams=5, normalise="vocabulary")
    with pytest.raises(GenerationError, match="repeats"):
        generator.generate(toy.request_batch(np.array([5])), 5)
