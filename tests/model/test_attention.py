"""Packed attention against one dense softmax over everything, in float64, for every mask of the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.model.attention import Documents, attend

Tensor = torch.Tensor
LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def dense(q_QHE: Tensor, k_KGE: Tensor, v_KGE: Tensor, mask_QK: Tensor) -> Tensor:
    """One query, one head after the other."""
    out = torch.zeros_like(q_QHE)
    share = q_QHE.shape[1] // k_KGE.shape[1]
    for query in range(len(q_QHE)):
        seen = mask_QK[query].nonzero()[:, 0]
        for head in range(q_QHE.shape[1]) if len(seen) else ():
            score = torch.stack([q_QHE[query, head] @ k_KGE[key, head // share] for key in seen]) / q_QHE.shape[2] ** 0.5
            out[query, head] = score.softmax(0) @ v_KGE[seen, head // share]
    return out


def tensors(queries: int, keys: int, heads: int = 4, groups: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((queries, heads), (keys, groups), (keys, groups))]
    return made[0], made[1], made[2]


def same(documents: Documents, groups: int = 4) -> None:
    """Values and gradients."""
    queries, keys = int(documents.query_offset_B[-1]), int(documents.key_offset_B[-1])
    given = tensors(queries, keys, groups=groups)
    got, want = attend(*given, documents), dense(*given, documents.mask())
    torch.testing.assert_close(got, want)
    if not queries or not keys:
        return
    weight = torch.randn_like(want)
    if not want.requires_grad:
        return
    wanted = torch.autograd.grad((want * weight).sum(), given, allow_unused=True, materialize_grads=True)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), given, allow_unused=True, materialize_grads=True), wanted, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def by_hand(documents: Documents, sees: object) -> Tensor:
    """The dense mask by asking `sees(document, query's place, key's place)` of every pair."""
    ask, key = documents.query_offset_B.tolist(), documents.key_offset_B.tolist()
    mask = torch.zeros(ask[-1], key[-1], dtype=torch.bool)
    for row in range(len(ask) - 1):
        for i in range(ask[row + 1] - ask[row]):
            for j in range(key[row + 1] - key[row]):
                mask[ask[row] + i, key[row] + j] = sees(row, i, j)  # type: ignore[operator]
    return mask


@settings(deadline=None, max_examples=40)
@given(LENGTHS)
def test_documents_see_themselves(lengths: list[int]) -> None:
    documents = Documents.bidirectional(offsets(lengths))
    assert torch.equal(documents.mask(), by_hand(documents, lambda row, i, j: True))
    same(documents)


@settings(deadline=None, max_examples=40)
@given(LENGTHS)
def test_causal_documents(lengths: list[int]) -> None:
    documents = Documents.causal(offsets(lengths))
    assert torch.equal(documents.mask(), by_hand(documents, lambda row, i, j: j <= i))
    assert {shape.form for shape in documents.shapes} <= {"causal", "full"}  # a document of one token is both
    same(documents)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.data())
def test_a_prefix_sees_itself_and_what_follows_is_causal(lengths: list[int], data: st.DataObject) -> None:
    prefixes = [data.draw(st.integers(0, 8)) for _ in lengths]
    documents = Documents.causal(offsets(lengths), torch.tensor(prefixes))
    assert torch.equal(documents.mask(), by_hand(documents, lambda row, i, j: j <= i or j < prefixes[row]))
    same(documents)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.data())
def test_across_to_as_much_as_had_come_before(lengths: list[int], data: st.DataObject) -> None:
    keys = [data.draw(st.integers(0, 7)) for _ in lengths]
    reach = [data.draw(st.integers(0, key)) for length, key in zip(lengths, keys, strict=True) for _ in range(length)]
    documents = Documents.across(offsets(lengths), offsets(keys), torch.tensor(reach, dtype=torch.long))
    starts = offsets(lengths).tolist()
    assert torch.equal(documents.mask(), by_hand(documents, lambda row, i, j: j < reach[starts[row] + i]))
    same(documents)
    same(Documents.across(offsets(lengths), offsets(keys)))


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_may_share_keys(groups: int) -> None:
    same(Documents.causal(offsets([3, 5, 3])), groups)


def test_one_call_for_documents_of_one_shape_and_for_short_ones_of_like_length() -> None:
    documents = Documents.bidirectional(offsets([3, 5, 3, 4, 3]))
    assert sorted((shape.queries, shape.rows) for shape in documents.shapes) == [(3, (0, 2, 4)), (4, (3,)), (5, (1,))]
    documents = Documents.causal(offsets([3, 5, 300, 4, 200]))
    assert sorted((shape.queries, shape.rows) for shape in documents.shapes) == [(5, (0, 1, 3)), (200, (4,)), (300, (2,))]


def test_nothing_leaks_between_documents() -> None:
    documents = Documents.bidirectional(offsets([4, 3]))
    q, k, v = tensors(7, 7)
    grad_k, grad_v = torch.autograd.grad(attend(q, k, v, documents)[:4].sum(), (k, v))
    assert not grad_k[4:].any()
    assert not grad_v[4:].any()
    assert grad_v[:4].any()
