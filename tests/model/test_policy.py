"""The policy against slow, obvious versions of itself: one request at a time, dense softmax, autograd on what may not be seen."""

import dataclasses

import numpy as np
import pytest
import torch

from oxyray.config import MoEConfig, RetrievalConfig
from oxyray.data.batch import Batch
from oxyray.data.requests import training_segments
from oxyray.errors import CatalogueError, GenerationError
from oxyray.model.head import ragged_logsumexp, spread
from oxyray.model.losses import item_nll
from oxyray.model.policy import Decoding, Policy
from oxyray.sid.prefix import PrefixIndex
from tests.model.toys import Toy, repeat_changes


def node_vectors(toy: Toy, decoding: Decoding, level: int) -> torch.Tensor:
    """The output vector of every node of a level."""
    vectors = decoding.shelf.vectors[level]
    return vectors if toy.policy.head.tied else vectors[toy.index.code[level].astype(int)]


def changes(toy: Toy, batch: Batch, level: int) -> torch.Tensor:
    """What the only request's history changes in the logits of all nodes of a level, written out."""
    if toy.policy.repeats is None:
        return torch.zeros(len(toy.index.code[level]), dtype=torch.double)
    return repeat_changes(toy, batch, level)[0].detach()


def sid_logprob(toy: Toy, batch, node_path: np.ndarray) -> float:
    """Log-probability of one SID of the only request of `batch`, each level by a dense softmax over all legal children."""
    decoding = toy.policy.start(batch, toy.lookup(batch.lookups()))
    total = 0.0
    for level, node in enumerate(node_path):
        parent = toy.index.parent[level] if level else np.zeros(len(toy.index.code[0]), int)
        siblings = np.flatnonzero(parent == (node_path[level - 1] if level else 0))
        logits = node_vectors(toy, decoding, level) @ decoding.hidden_BKD[0, 0] + changes(toy, batch, level)
        total += float(logits[node] - torch.logsumexp(logits[siblings], 0))
        toy.policy.advance(decoding, level, torch.tensor([[node]]), torch.zeros(1, 1, dtype=torch.long) if level else None)
    return total


@pytest.mark.parametrize("repeats", [False, True])
def test_one_pass_over_all_positions_equals_one_request_at_a_time(repeats: bool):
    toy = Toy(item_loss=0.0, repeats=repeats)
    segments = training_segments(toy.timeline, toy.config.history)
    batch = toy.collate(toy.timeline, segments)
    rows = toy.lookup(batch.lookups())
    together = toy.policy.loss(batch, rows)
    events = np.concatenate([np.arange(a, a + n) for a, n in zip(segments.query_start_B, segments.query_length_B, strict=True)])
    alone = 0.0
    for event, segment in zip(events, np.repeat(np.arange(len(segments)), segments.query_length_B), strict=True):
        time = toy.timeline
        start = segments.start_B[segment]
        length = max(0, int(time.user_start_E[event] + time.visible_E[event] - start))
        one = type(segments)(np.array([start]), np.array([length]), np.array([event]), np.array([1]))
        path = toy.index.node_path(toy.index.leaf_of(toy.codes_IL[[time.item_E[event]]]))[0]
        weight = [1.0, 2.0, 4.0][time.action_E[event]]
        alone -= weight * sid_logprob(toy, toy.collate(time, one), path)
    assert together.total.item() == pytest.approx(alone, rel=1e-9)
    assert batch.weight() == pytest.approx(sum([1.0, 2.0, 4.0][a] for a in toy.timeline.action_E))


def test_no_query_depends_on_what_it_may_not_see():
    toy = Toy()
    batch = toy.training_batch()
    rows = toy.lookup(batch.lookups())
    item_UD = toy.policy.items(batch.items, rows["item"]).detach()
    event_ND = torch.randn(len(batch.item_N), item_UD.shape[1], dtype=torch.double, requires_grad=True)

    class Events(torch.nn.Module):  # stands in for the action embedding, so that each event has an input of its own
        def forward(self, _):
            return event_ND

    toy.policy.action = Events()
    told = toy.policy._told(batch, item_UD)
    memory = toy.policy._memory(batch, rows, item_UD, told)
    hidden_QTD = toy.policy.decoder(toy.policy.instruction.prompt(told) + toy.policy._start(batch, memory, told)[:, None], memory)
    segment_Q = torch.repeat_interleave(torch.arange(batch.segments), torch.diff(batch.query_offset))
    for query in range(batch.queries):
        (gradient,) = torch.autograd.grad(hidden_QTD[query, -1].square().sum(), event_ND, retain_graph=True)
        first = int(batch.history_offset[segment_Q[query]])
        seen = set(range(first, first + int(batch.visible_Q[query])))
        touched = set(gradient.abs().sum(1).nonzero().flatten().tolist())
        assert touched == seen, f"query {query} sees {seen} but depends on {touched}"


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_loss_has_gradient_by_finite_differences(head):
    toy = Toy(head=head, item_loss=0.5)
    batch = toy.training_batch()
    rows = toy.lookup(batch.lookups())
    toy.policy.loss(batch, rows).total.backward()
    random = np.random.default_rng(0)
    for name, parameter in toy.policy.named_parameters():
        at = tuple(random.integers(0, size) for size in parameter.shape)
        old = parameter.data[at].item()
        values = []
        for step in (1e-5, -1e-5):
            parameter.data[at] = old + step
            values.append(toy.policy.loss(batch, rows).total.item())
        parameter.data[at] = old
        assert parameter.grad is not None, name
        assert parameter.grad[at].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-5), name


def test_an_encoder_that_is_not_causal_sees_the_same_history_one_query_at_a_time():
    toy = Toy(causal_encoder=False)
    events = np.arange(len(toy.timeline))
    batch = toy.request_batch(events)
    alone = [toy.request_batch(events[[i]]) for i in events]
    together = toy.policy.start(batch, toy.lookup(batch.lookups())).hidden_BKD
    one = torch.cat([toy.policy.start(b, toy.lookup(b.lookups())).hidden_BKD for b in alone])
    torch.testing.assert_close(together, one)


def test_items_of_the_batch_suffice_for_the_code_head():
    """The block of a batch's own items and the block of the whole catalogue give the same loss."""
    toy = Toy(head="codes", item_loss=0.0)
    part = toy.training_batch()
    toy.collate.whole_catalogue = True
    whole = toy.training_batch()
    assert len(part.items.ids_U) <= len(whole.items.ids_U)
    losses = [toy.policy.loss(batch, toy.lookup(batch.lookups())).total.item() for batch in (part, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_tied_node_vectors_are_means_over_items_below():
    toy = Toy()
    item_ID = torch.randn(40, 16, dtype=torch.double)
    vectors = toy.policy.head.vectors(toy.policy.tree, item_ID)
    for level in range(3):
        for node in range(len(toy.index.code[level])):
            below = np.flatnonzero(toy.policy.tree.path_IL[:, level].numpy() == node)
            prefix = toy.codes_IL[below][:, : level + 1]
            assert len(np.unique(prefix, axis=0)) == 1
            want = item_ID[below].mean(0) + toy.policy.head.own[level][prefix[0, level]]
            torch.testing.assert_close(vectors[level][node], want)


def test_ragged_logsumexp_equals_a_loop():
    count_M = torch.tensor([3, 1, 5, 2])
    state_P, child_P = spread(torch.tensor([10, 0, 4, 20]), count_M)
    assert child_P.tolist() == [10, 11, 12, 0, 4, 5, 6, 7, 8, 20, 21]
    logit_P = torch.randn(11, dtype=torch.double) * 30
    want = torch.stack([torch.logsumexp(piece, 0) for piece in logit_P.split(count_M.tolist())])
    torch.testing.assert_close(ragged_logsumexp(logit_P, state_P, 4), want)


def test_sampled_item_loss_is_close_to_the_full_one():
    torch.manual_seed(0)
    query, items, target = torch.randn(50, 8).double() * 0.3, torch.randn(400, 8).double(), torch.randint(400, (50,))
    full = item_nll(query, items, torch.arange(400), target, None, 400)[0].mean()
    sampled = torch.stack(
        [item_nll(query, items, torch.arange(400), target, torch.randint(400, (200,)), 400)[0].mean() for _ in range(200)]
    ).mean()
    assert float(sampled) == pytest.approx(float(full), abs=0.05)


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_the_loss_does_not_depend_on_how_a_step_is_cut(head: str) -> None:
    toy = Toy(head=head)
    segments, drawn = training_segments(toy.timeline, toy.config.history), toy.collate.draw(3)
    losses = []
    for pieces in (1, 4):
        batches = [toy.collate(toy.timeline, segments.take(np.arange(n, len(segments), pieces)), negative_N=drawn) for n in range(pieces)]
        losses.append(sum(toy.policy.loss(batch, toy.lookup(batch.lookups())).total.item() for batch in batches))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_catalogue_of_another_width_is_refused():
    toy = Toy()
    other = PrefixIndex.from_codes(toy.codes_IL, 9)
    with pytest.raises(CatalogueError, match=r"3 levels of 5 codes.*3 of 9"):
        Policy(toy.config, toy.vocab, other)


def test_distillation_is_the_cross_entropy_to_the_item_softmax_summed_over_each_prefix():
    toy = Toy(distill=1.0)
    batch = toy.training_batch()
    rows = toy.lookup(batch.lookups())
    out = toy.policy.loss(batch, rows)
    item_UD = toy.policy.items(batch.items, rows["item"])
    memory = toy.policy._memory(batch, rows, item_UD, toy.policy._told(batch, item_UD))
    vectors = toy.policy.head.vectors(toy.policy.tree, item_UD)
    path_IL = toy.policy.tree.path_IL
    total = 0.0
    for query, target in enumerate(batch.target_Q.tolist()):
        tokens = [toy.policy._token(level, torch.tensor(toy.codes_IL[target, level])) for level in range(2)]
        told = toy.policy._told(batch, item_UD)
        prompt_QTD = toy.policy.instruction.prompt(told)
        x_QTD = torch.cat([prompt_QTD, torch.stack(tokens).expand(batch.queries, -1, -1)], dim=1)
        x_QTD = x_QTD + toy.policy._start(batch, memory, told)[:, None]
        hidden_TD = toy.policy.decoder(x_QTD, memory)[query, 1:]
        prob_I = torch.softmax(item_UD @ toy.policy.item_query(hidden_TD[0]), 0)
        for level in range(3):
            below = torch.ones(len(prob_I), dtype=torch.bool) if level == 0 else path_IL[:, level - 1] == path_IL[target, level - 1]
            children = path_IL[below, level].unique()
            share = torch.stack([prob_I[below & (path_IL[:, level] == node)].sum() for node in children]) / prob_I[below].sum()
            logprob = torch.log_softmax(vectors[level][children] @ hidden_TD[level], 0)
            total -= float(batch.weight_Q[query]) * (share * logprob).sum().item()
    assert out.parts["distill"].item() == pytest.approx(total, rel=1e-6)


VARIANTS: dict[str, dict[str, object]] = {
    "distilled": {"distill": 1.0, "repeats": True},
    "drawn": {"item_negatives": 9},
    "codes": {"head": "codes", "repeats": True},
    "q2i": {"retrieval": RetrievalConfig(q2i=0.5, top=3, history=9), "history": 2},
    "experts": {"moe": MoEConfig(experts=4, active=2, balance=0.01)},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_bf16_is_the_same_loss_less_precisely(kind: str) -> None:
    toy = Toy(**VARIANTS[kind])  # type: ignore[arg-type]
    if toy.config.retrieval.top:
        toy.collate = dataclasses.replace(toy.collate, older=9)
    batch = toy.training_batch()
    rows = toy.lookup(batch.lookups())
    exact = toy.policy.loss(batch, rows)
    toy.policy = toy.policy.float()
    batch.items = dataclasses.replace(batch.items, text_UF=batch.items.text_UF.float())
    batch.vector_WF = None if batch.vector_WF is None else batch.vector_WF.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = toy.policy.loss(batch, {name: row.float() for name, row in rows.items()})
    found.total.backward()
    assert set(found.parts) == set(exact.parts)
    for name, part in exact.parts.items():
        assert found.parts[name].item() == pytest.approx(part.item(), rel=0.05), name
    assert all(weight.grad is None or torch.isfinite(weight.grad).all() for weight in toy.policy.parameters())


class Allowed:
    """Legality written down plainly: the nodes above each request's allowed items."""

    def __init__(self, toy: Toy, allowed: list[np.ndarray]) -> None:
        path_IL = toy.policy.tree.path_IL.numpy()
        self.nodes = [[set(path_IL[items, level].tolist()) for level in range(3)] for items in allowed]

    def keep(self, level: int, request_P: torch.Tensor, node_P: torch.Tensor) -> torch.Tensor:
        return torch.tensor([n in self.nodes[r][level] for r, n in zip(request_P.tolist(), node_P.tolist(), strict=True)], dtype=torch.bool)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("head", ["tied", "codes"])
def test_logprob_of_given_sids_equals_the_decoders_own_token_by_token(head: str, repeats: bool) -> None:
    toy = Toy(head=head, repeats=repeats)
    batch = toy.request_batch(np.array([5, 20, 40]))
    alone = [toy.request_batch(np.array([event])) for event in (5, 20, 40)]
    rows = toy.lookup(batch.lookups())
    random = np.random.default_rng(0)
    allowed = [random.choice(40, 15, replace=False) for _ in range(3)]
    path_BGL = torch.stack([toy.policy.tree.path_IL[items[:4]] for items in allowed])
    path_BGL[1, 2] = -1
    found = toy.policy.logprob(batch, rows, path_BGL, Allowed(toy, allowed), temperature=0.7)
    assert (found[1, 2] == 0).all()
    nodes = Allowed(toy, allowed).nodes
    for b in range(3):
        for g in range(4):
            if (b, g) == (1, 2):
                continue
            decoding = toy.policy.start(batch, rows)
            for level, node in enumerate(path_BGL[b, g].tolist()):
                parent = toy.index.parent[level] if level else np.zeros(len(toy.index.code[0]), int)
                above = path_BGL[b, g, level - 1].item() if level else 0
                children = [n for n in np.flatnonzero(parent == above).tolist() if n in nodes[b][level]]
                logits = (node_vectors(toy, decoding, level) @ decoding.hidden_BKD[b, 0] + changes(toy, alone[b], level))[children] / 0.7
                expected = float(torch.log_softmax(logits, 0)[children.index(node)])
                assert found[b, g, level].item() == pytest.approx(expected, abs=1e-9)
                origin = torch.zeros(3, 1).long() if level else None
                toy.policy.advance(decoding, level, path_BGL[:, g, level][:, None].clamp(min=0), origin)


@pytest.mark.parametrize("repeats", [False, True])
def test_logprob_of_the_targets_is_the_training_loss(repeats: bool) -> None:
    toy = Toy(item_loss=0.0, repeats=repeats)
    batch = toy.request_batch(np.arange(3, 30, 4))
    batch.weight_Q = torch.ones_like(batch.weight_Q)
    rows = {name: row.requires_grad_() for name, row in toy.lookup(batch.lookups()).items()}
    paths = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]][:, None]
    own = -toy.policy.logprob(batch, rows, paths).sum()
    loss = toy.policy.loss(batch, rows).total
    assert own.item() == pytest.approx(loss.item(), rel=1e-12)
    mine, theirs = (torch.autograd.grad(value, [*rows.values()], allow_unused=True) for value in (own, loss))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-10)


def test_a_candidate_outside_the_pool_is_refused() -> None:
    toy = Toy()
    batch = toy.request_batch(np.array([5, 20]))
    path_BGL = toy.policy.tree.path_IL[torch.tensor([[1], [2]])]
    items = np.flatnonzero(toy.codes_IL[:, 0] == toy.codes_IL[1, 0])
    others = np.flatnonzero(toy.codes_IL[:, 0] != toy.codes_IL[2, 0])
    with pytest.raises(GenerationError, match="request 1 is not legal at level 1"):
        toy.policy.logprob(batch, toy.lookup(batch.lookups()), path_BGL, Allowed(toy, [items, others]))


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_candidates_with_shared_prefixes_equal_each_candidate_alone_with_gradients(head: str) -> None:
    toy = Toy(head=head, items=60, width=4, repeats=head == "tied")
    batch = toy.request_batch(np.array([5, 20, 33, 40]))
    rows = {name: row.requires_grad_() for name, row in toy.lookup(batch.lookups()).items()}
    random = np.random.default_rng(1)
    allowed = [np.arange(60), random.choice(60, 20, replace=False), random.choice(60, 3, replace=False), np.array([7])]
    path_BGL = torch.stack([toy.policy.tree.path_IL[random.choice(items, 12)] for items in allowed])  # some twice
    path_BGL[0, :5], path_BGL[2] = -1, -1
    weight_BGL = torch.randn(4, 12, 3, dtype=torch.float64)
    wanted = [*toy.policy.parameters(), *rows.values()]
    together = toy.policy.logprob(batch, rows, path_BGL, Allowed(toy, allowed))
    alone = torch.cat([toy.policy.logprob(batch, rows, path_BGL[:, g : g + 1], Allowed(toy, allowed)) for g in range(12)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    assert (together[3, :, 0] == 0).all(), "the pool of one item has one first code"
    for a, b in zip(*(torch.autograd.grad((x * weight_BGL).sum(), wanted, allow_unused=True) for x in (together, alone)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_every_parameter_of_the_tokens_takes_part_where_no_prefix_needs_computing(head: str) -> None:
    """Else workers would disagree on which gradients there are."""
    toy = Toy(head=head)
    batch = toy.request_batch(np.array([5, 20]))
    absent = toy.policy.logprob(batch, toy.lookup(batch.lookups()), torch.full((2, 3, 3), -1))
    some = toy.policy.logprob(batch, toy.lookup(batch.lookups()), toy.policy.tree.path_IL[torch.tensor([[1, 2], [3, 4]])])
    given = [torch.autograd.grad(x.sum(), [*toy.policy.parameters()], allow_unused=True) for x in (absent, some)]
    assert [a is None for a in given[0]] == [b is None for b in given[1]]


def test_a_shelf_of_the_whole_catalogue_serves_other_batches() -> None:
    toy = Toy()
    first, second = toy.request_batch(np.array([5, 20])), toy.request_batch(np.array([33, 40, 41]))
    shelf = toy.policy.shelf(first, toy.lookup(first.lookups()))
    rows = toy.lookup(second.lookups())
    path_BGL = toy.policy.tree.path_IL[torch.tensor([[1, 2], [3, 4], [5, 6]])]
    del rows["item"]
    assert first.items is second.items
    torch.testing.assert_close(
        toy.policy.logprob(second, rows, path_BGL, shelf=shelf),
        toy.policy.logprob(second, toy.lookup(second.lookups()), path_BGL), rtol=0, atol=0,
    )  # fmt: skip
    assert toy.policy.loss(second, rows, shelf=shelf).total == toy.policy.loss(second, toy.lookup(second.lookups())).total
