"""Mixtures of experts against a loop over tokens and experts; their balance; the paper's sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oxyray.cli.compose import check, compose_config
from oxyray.config import MoEConfig
from oxyray.errors import ConfigError
from oxyray.model.items import Vocab
from oxyray.model.moe import MixtureOfExperts, grouped, parameters
from oxyray.model.policy import Policy
from oxyray.sid.prefix import PrefixIndex
from tests.model.toys import Toy

# Paper, Table 3: billions of parameters, total and active.
SIZES = {"0.1b": (0.1, 0.1), "0.4b": (0.4, 0.3), "0.7b": (0.7, 0.4), "1.5b": (1.5, 0.4), "3.0b": (3.0, 0.6)}


def mixture(experts: int = 5, active: int = 2, balance: float = 0.0) -> MixtureOfExperts:
    torch.manual_seed(0)
    made = MixtureOfExperts(8, 6, experts, active, balance).double()
    made.get_buffer("bias_E").copy_(torch.randn(experts) * 0.1)
    return made


def slow(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        score = 1 / (1 + torch.exp(-(moe.router.weight @ token)))
        best = sorted(range(len(score)), key=lambda e: -float(score[e] + moe.get_buffer("bias_E")[e]))[: moe.active]
        total = sum(score[e] for e in best) if moe.active > 1 else 1.0
        rows.append(sum(score[e] / total * (F.silu(token @ moe.up[e]) @ moe.down[e]) for e in best))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("active", [1, 2, 5])
def test_a_mixture_is_the_sum_over_each_tokens_best_experts(active: int) -> None:
    moe = mixture(active=active)
    x = torch.randn(3, 4, 8, dtype=torch.double, requires_grad=True)
    found, want = moe(x), slow(moe, x)
    assert torch.allclose(found, want, atol=1e-12)
    weights = (x, moe.up, moe.down, moe.router.weight)
    for mine, theirs in zip(*(torch.autograd.grad(out.square().sum(), weights) for out in (found, want)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)
    assert torch.autograd.grad(moe(x).square().sum(), moe.router.weight)[0].abs().sum() > 0 or active == 5


def test_no_token_is_dropped_when_all_come_to_one_expert() -> None:
    moe = mixture(active=1)
    moe.get_buffer("bias_E").copy_(torch.tensor([0.0, 9, 0, 0, 0]))
    x = torch.randn(50, 8, dtype=torch.double)
    moe.train()
    assert torch.allclose(moe(x), slow(moe, x), atol=1e-12)
    moe.after_step()
    assert moe.peak == 5.0, "the expert's load is the whole, five times the mean"


def test_one_kernel_and_a_product_an_expert_agree() -> None:
    torch.manual_seed(1)
    x, weight, count = torch.randn(9, 16), torch.randn(3, 16, 8), torch.tensor([4, 0, 5])
    kernel = torch._grouped_mm(x.bfloat16(), weight.bfloat16(), offs=count.cumsum(0).int())
    assert torch.allclose(kernel.float(), grouped(x, weight, count), atol=0.15)


def test_the_bias_evens_the_load() -> None:
    moe = mixture(experts=4, balance=0.01)
    moe.get_buffer("bias_E").zero_()
    with torch.no_grad():
        moe.router.weight[0] += 1.5  # one expert suits nearly all tokens
    moe.train()
    x = torch.randn(400, 8, dtype=torch.double).abs()
    peaks = []
    for _ in range(250):
        moe(x)
        moe.after_step()
        peaks.append(moe.peak)
    assert peaks[0] > 1.7
    assert min(peaks[-5:]) < 1.25
    before = moe.get_buffer("bias_E").clone()
    with torch.no_grad():
        moe(x)
    assert not moe.get_buffer("load_E").any(), "only learning counts"
    assert torch.equal(before, moe.get_buffer("bias_E"))


@pytest.mark.parametrize("position", ["right", "add"])
def test_decoding_step_by_step_equals_the_training_pass(position: str) -> None:
    toy = Toy(item_loss=0.0, moe=MoEConfig(experts=4, active=2))
    batch = toy.request_batch(np.arange(3, 30, 4))
    batch.weight_Q = torch.ones_like(batch.weight_Q)
    rows = toy.lookup(batch.lookups())
    paths = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]][:, None]
    assert -toy.policy.logprob(batch, rows, paths).sum().item() == pytest.approx(toy.policy.loss(batch, rows).total.item(), rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_sizes(size: str) -> None:
    model = compose_config(check([f"model=oxygen_{size}", "experiment=null"])).model
    index = PrefixIndex.from_codes(np.array([[0, 1, 2], [3, 4, 5]]), 8192)
    vocab = Vocab(items=2, users=2, scenarios=8, actions=3, side=(9,), profile=(5,), levels=3, width=8192, text=384, query=384, clock=True)
    with torch.device("meta"):
        policy = Policy(model, vocab, index)
    D, H, experts, active = model.width, model.hidden, model.moe.experts, model.moe.active
    for used, found in zip((experts, active), parameters(nn.ModuleList([policy.encoder, policy.decoder])), strict=True):
        feed = experts * D + used * 2 * D * H
        hand = model.encoder_layers * (4 * D * D + 2 * D + feed) + model.decoder_layers * (8 * D * D + 3 * D + feed) + 2 * D
        assert found == hand
    total, used = (count / 1e9 for count in parameters(nn.ModuleList([policy.encoder, policy.decoder])))
    assert total == pytest.approx(SIZES[size][0], rel=0.35)
    assert used == pytest.approx(SIZES[size][1], rel=0.42)


def test_more_active_experts_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\.active: must lie between 1 and the 2 experts, got 3"):
        MoEConfig(experts=2, active=3)
