"""What is drawn, against the distribution written out over the whole catalogue."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from oxyray.errors import GenerationError
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.sample import Sampling, sample
from oxyray.sid.prefix import PrefixIndex
from tests.generate.tiny import Tiny, catalogue, leaves_of

ALLOWED = np.array([0, 1, 2, 4, 5, 7, 8, 10, 11])


def truncated(steps: Tiny, leaves: set[int], sampling: Sampling) -> dict[int, np.ndarray]:
    """Each leaf that can be drawn with the log-probability of its tokens after top-k, then nucleus, level by level."""
    tokens = steps.token_logprobs(0, leaves, temperature=sampling.temperature)
    sids = {leaf: tuple(steps.index.codes_of(np.array([leaf]))[0].tolist()) for leaf in leaves}
    out = {leaf: np.zeros(steps.index.levels) for leaf in leaves}
    for level in range(steps.index.levels):
        for prefix in {sid[:level] for sid in sids.values()}:
            prob = {sids[leaf][level]: math.exp(tokens[leaf][level]) for leaf in leaves if sids[leaf][:level] == prefix}
            ranked = sorted(prob, key=lambda code: -prob[code])[: sampling.top_k or None]
            mass = sum(prob[code] for code in ranked)
            kept, reached = [], 0.0
            for code in ranked:
                if reached < sampling.top_p:
                    kept.append(code)
                reached += prob[code] / mass
            mass = sum(prob[code] for code in kept)
            for leaf in leaves:
                if sids[leaf][:level] == prefix:
                    code = sids[leaf][level]
                    out[leaf][level] = math.log(prob[code] / mass) if code in kept else -math.inf
    return {leaf: tokens for leaf, tokens in out.items() if np.isfinite(tokens).all()}


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 2},
        {"top_p": 0.7},
        {"top_k": 3, "top_p": 0.8, "temperature": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("replacement", [True, False])
def test_first_draws_follow_the_distribution_and_know_their_probability(sampling, replacement):
    """The first of a draw without replacement is distributed like one with replacement."""
    sampling = Sampling(replacement=replacement, **sampling)
    codes_IL, index = catalogue(3, 12, 3)
    steps = Tiny(index, 1, 1, sharp=1.0)
    want = truncated(steps, leaves_of(index, codes_IL, ALLOWED), sampling)
    pool = Pool.of_items(steps.tree, torch.from_numpy(ALLOWED))
    generator = torch.Generator().manual_seed(5)
    if replacement:
        found = sample(steps, Legal(steps.tree, [pool]), 20_000, sampling, generator)
        leaves, logprob_NL = found.leaf_BG[0].numpy(), found.logprob_BGL[0].numpy()
    else:
        many = Tiny(index, 20_000, 1, sharp=1.0, tree=steps.tree)
        many.hidden_BKD = steps.first_BD[:, None].expand(20_000, 1, -1)
        found = sample(many, Legal(steps.tree, [pool] * 20_000), 1, sampling, generator)
        leaves, logprob_NL = found.leaf_BG[:, 0].numpy(), found.logprob_BGL[:, 0].numpy()
    assert set(leaves.tolist()) <= want.keys()
    np.testing.assert_allclose(logprob_NL, np.stack([want[leaf] for leaf in leaves.tolist()]), atol=1e-9)
    expected = {leaf: math.exp(tokens.sum()) for leaf, tokens in want.items()}
    assert sum(expected.values()) == pytest.approx(1)
    if len(expected) > 1:
        assert stats.chisquare([(leaves == leaf).sum() for leaf in expected], [20_000 * p for p in expected.values()]).pvalue > 1e-3


def test_draws_without_replacement_are_distributed_as_if_drawn_one_after_another():
    """Ordered pairs: p(a) p(b) / (1 - p(a)), over a ragged catalogue of two levels."""
    index = PrefixIndex.from_codes(np.array([[0, 0], [0, 1], [0, 2], [1, 1], [2, 0], [2, 2]]), 3)
    steps = Tiny(index, 1, 2, sharp=0.7)
    prob = {leaf: math.exp(tokens.sum()) for leaf, tokens in steps.token_logprobs(0, set(range(6))).items()}
    many = Tiny(index, 30_000, 2, sharp=0.7, tree=steps.tree)
    many.hidden_BKD = steps.first_BD[:, None].expand(30_000, 1, -1)
    found = sample(many, Legal(steps.tree, [None] * 30_000), 2, generator=torch.Generator().manual_seed(1))
    pairs = list(itertools.permutations(prob, 2))
    drawn = found.leaf_BG.numpy()
    counts = [int(((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum()) for a, b in pairs]
    assert sum(counts) == 30_000
    assert stats.chisquare(counts, [30_000 * prob[a] * prob[b] / (1 - prob[a]) for a, b in pairs]).pvalue > 1e-3


def test_the_keys_give_unbiased_estimates():
    """Kool et al., section 4.2: with the last key as threshold, sum of p / q f over the others has the mean of f as its expectation."""
    _, index = catalogue(3, 12, 3)
    steps = Tiny(index, 1, 1, sharp=1.0)
    prob = {leaf: math.exp(tokens.sum()) for leaf, tokens in steps.token_logprobs(0, set(range(index.leaves))).items()}
    value = np.random.default_rng(0).random(index.leaves)
    many = Tiny(index, 20_000, 1, sharp=1.0, tree=steps.tree)
    many.hidden_BKD = steps.first_BD[:, None].expand(20_000, 1, -1)
    found = sample(many, Legal(steps.tree, [None] * 20_000), 4, generator=torch.Generator().manual_seed(2))
    total_BG = found.logprob_BGL.sum(-1)
    assert (found.key_BG[:, :-1] >= found.key_BG[:, 1:]).all()
    above_BG = -torch.expm1(-torch.exp(total_BG - found.key_BG[:, -1:]))
    estimate = ((total_BG.exp() / above_BG)[:, :-1] * torch.from_numpy(value)[found.leaf_BG[:, :-1]]).sum(1)
    want = sum(p * value[leaf] for leaf, p in prob.items())
    assert abs(float(estimate.mean()) - want) < 4 * float(estimate.std()) / 20_000**0.5


def test_all_sids_come_back_once_when_more_are_asked_for():
    _, index = catalogue(3, 12, 3)
    steps = Tiny(index, 2)
    with pytest.warns(UserWarning, match="gets those"):
        found = sample(steps, Legal(steps.tree, [None, None]), 50)
    for row in found.leaf_BG.tolist():
        assert sorted(leaf for leaf in row if leaf >= 0) == list(range(index.leaves))


def test_the_same_generator_draws_the_same():
    _, index = catalogue(3, 40, 5)
    for replacement in (True, False):
        found = [
            sample(steps, Legal(steps.tree, [None] * 3), 5, Sampling(replacement=replacement), torch.Generator().manual_seed(4))
            for steps in (Tiny(index, 3), Tiny(index, 3))
        ]
        assert torch.equal(found[0].leaf_BG, found[1].leaf_BG)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(GenerationError, match="sampling needs"):
        Sampling(**wrong)
