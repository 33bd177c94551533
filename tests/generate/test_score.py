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
