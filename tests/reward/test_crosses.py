"""Comparisons of an item with what its page knows, against a slow loop; and they know nothing of its own page or later."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from oxyray.reward.crosses import crosses, size
from oxyray.reward.packing import RankBatch
from oxyray.reward.pages import stretches
from tests.reward.toys import Toy


def asked(batch: RankBatch) -> tuple[torch.Tensor, torch.Tensor]:
    asked_C = batch.asked_R[batch.page_C()]
    return batch.page_C()[asked_C], batch.item_C[asked_C]


def slow(batch: RankBatch) -> np.ndarray:
    rows = []
    text = torch.nn.functional.normalize(batch.items.text_UF, dim=-1).numpy()
    query = torch.nn.functional.normalize(batch.query_RF, dim=-1).numpy()
    sample_R, page_C = batch.sample_R(), batch.page_C()
    for page, item in zip(*asked(batch), strict=True):
        first = int(batch.page_offset[sample_R[page]])
        known = range(first, first + int(batch.visible_R[page]))
        taken = [int(batch.item_C[c]) for c in range(len(page_C)) if int(page_C[c]) in known and batch.done_C[c] > 0]
        kinds = [np.arange(len(text)), batch.items.codes_UL[:, 0].numpy(), *batch.items.side_UC.numpy().T]
        row = [np.log1p(sum(kind[other] == kind[item] for other in taken)) for kind in kinds]
        trigger = int(batch.trigger_R[page])
        near = [text[item] @ text[other] for other in taken]
        row += [text[item] @ query[page], text[item] @ text[trigger] if trigger >= 0 else 0.0]
        row += [max(near, default=0.0), np.mean(near) if near else 0.0]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_a_slow_loop(seed: int) -> None:
    toy = Toy(seed)
    few = toy.log.item_C % 7  # so that items and codes come again
    batch = toy.packer.pack(dataclasses.replace(toy.log, item_C=few), stretches(toy.log, 5))
    found = crosses(batch, *asked(batch), text=True)
    assert found.shape[1] == size(toy.ranker.vocab, text=True)
    np.testing.assert_allclose(found.numpy(), slow(batch), atol=1e-6)


def test_nothing_taken_at_all() -> None:
    toy = Toy(0)
    batch = toy.packer.pack(dataclasses.replace(toy.log, done_C=np.zeros_like(toy.log.done_C)), stretches(toy.log, 5))
    np.testing.assert_allclose(crosses(batch, *asked(batch), text=True).numpy(), slow(batch), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_the_own_page_and_later_change_no_score(seed: int) -> None:
    toy = Toy(seed)
    batch = toy.packer.pack(dataclasses.replace(toy.log, item_C=toy.log.item_C % 7), stretches(toy.log, 5))
    page_Q, item_Q = asked(batch)
    before = crosses(batch, page_Q, item_Q, text=True)
    scores = toy.ranker.chances(batch, toy.rows(batch))
    place_R = torch.arange(len(batch.asked_R)) - batch.page_offset[batch.sample_R()]
    for page in torch.unique(page_Q).tolist():
        same = batch.sample_R() == batch.sample_R()[page]
        unknown_R = same & (place_R >= batch.visible_R[page])
        flipped = torch.where(unknown_R[batch.page_C()], (batch.done_C + 1) % 4, batch.done_C)
        other = dataclasses.replace(batch, done_C=flipped)
        here = page_Q == page
        torch.testing.assert_close(crosses(other, page_Q, item_Q, text=True)[here], before[here], atol=0, rtol=0)
        torch.testing.assert_close(toy.ranker.chances(other, toy.rows(other))[here], scores[here], atol=1e-12, rtol=0)
