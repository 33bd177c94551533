"""Both ways of scoring children against the dense matrix of logits; slices of any size."""

import numpy as np
import pytest
import torch

from oxyray.generate import score
from oxyray.generate.score import Pairs, logprobs
from oxyray.generate.steps import Outputs
from oxyray.model.head import Tree, spread
from oxyray.sid.prefix import PrefixIndex


@pytest.mark.parametrize("cost", [0, 10**9], ids=["sampled", "dense"])
@pytest.mark.parametrize("slices", [1, 40, 10**6])
@pytest.mark.parametrize(("by_code", "normalise"), [(True, "children"), (True, "vocabulary"), (False, "children")])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_children_are_scored_as_the_dense_softmax_says(monkeypatch, cost, slices, by_code, normalise, temperature):
    monkeypatch.setattr(score, "_PAIR_COST", cost)
    monkeypatch.setattr(score, "_SLICE", slices)
    monkeypatch.setattr(score, "_BLOCK", (1 + slices // 8, 1 + slices // 13))
    random = np.random.default_rng(0)
    tree = Tree(PrefixIndex.from_codes(random.integers(0, 9, (60, 2)), 9))
    node_M = torch.from_numpy(random.integers(0, tree.nodes(0), 17))
    first_M, count_M = tree.children_of(0, node_M)
    count_M[3] = count_M[16] = 0  # states without children stand among the others
    pairs = Pairs(*spread(first_M, count_M), 17)
    vector_nD = torch.randn(9 if by_code else tree.nodes(1), 5, dtype=torch.double)
    hidden_MD = torch.randn(17, 5, dtype=torch.double)
    found = logprobs(hidden_MD, Outputs(vector_nD, by_code), tree, 1, pairs, normalise, temperature)
    logit = hidden_MD @ (vector_nD[tree.code(1)] if by_code else vector_nD).T / temperature
    for state in range(17):
        children = torch.arange(first_M[state], first_M[state] + count_M[state])
        over = logit[state, children] if normalise == "children" else hidden_MD[state] @ vector_nD.T / temperature
        want = logit[state, children] - torch.logsumexp(over, 0)
        torch.testing.assert_close(found[pairs.state_P == state], want)


def test_the_log_of_the_total_does_not_overflow_where_later_codes_are_far_more_likely(monkeypatch):
    monkeypatch.setattr(score, "_BLOCK", (2, 3))
    hidden_MD, vector_VD = torch.tensor([[1.0], [-1.0], [0.0]]), torch.linspace(-500, 500, 11)[:, None]
    torch.testing.assert_close(score.log_total(hidden_MD, vector_VD), torch.logsumexp(hidden_MD @ vector_VD.T, 1))
