"""Will an item be taken again? One learned factor a scenario and level: what the user has had already gets so many times as likely.

A head whose outputs are tied to its inputs puts the latest items first, whether a shop's people buy again (bread) or never do (a book). The
factor says which. Where a share f of a node's items has been had, the node's probability is multiplied by 1 - f + f·factor, as if its
items were alike; at the leaves that is exact. What a request sees of its user's short-term history counts.

Legend: Q queries (requests), N events, H pairs (query, node) where something was had, P pairs asked for, L levels, n nodes of a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from oxyray.data.batch import Batch
from oxyray.model.head import Tree, spread
from oxyray.model.instruction import segments_of
from oxyray.model.layers import Tensor

_SPEED = 10  # the logarithm of a factor moves so many times as fast as a weight


@dataclass(frozen=True)
class Had:
    """What each query has had, by level: sorted keys `query * n + node`, and the share of the node's items. Behind the levels, at place L,
    the items themselves (share 1). `scenario_Q` picks the factors, of which `weight` holds the logarithms."""

    weight: nn.ParameterList
    scenario_Q: Tensor
    key_H: list[Tensor]
    share_H: list[Tensor]
    nodes: list[int]

    def pairs(self, level: int) -> tuple[Tensor, Tensor]:
        """Queries and nodes: (H,) both."""
        return self.key_H[level] // self.nodes[level], self.key_H[level] % self.nodes[level]

    def change(self, level: int) -> Tensor:
        """What is added to the logits of the pairs, log(1 - f + f·factor): (H,)."""
        weight_S, (query_H, _) = self.weight[level], self.pairs(level)
        factor_H = weight_S.to(torch.promote_types(weight_S.dtype, torch.float32))[self.scenario_Q[query_H]] * _SPEED
        share_H = self.share_H[level].to(factor_H.dtype)
        return torch.logaddexp(torch.log1p(-share_H), torch.log(share_H) + factor_H)

    def add(self, level: int, query_P: Tensor, node_P: Tensor, logit_P: Tensor) -> Tensor:
        """The logits of (query, node) pairs with the factors in; at place L those of items."""
        key_H, key_P = self.key_H[level], query_P * self.nodes[level] + node_P
        hit = self._hits(key_H, key_P, len(self.scenario_Q) * self.nodes[level])
        return logit_P.index_add(0, hit, self.change(level)[torch.searchsorted(key_H, key_P[hit])].to(logit_P.dtype))

    @staticmethod
    def _hits(key_H: Tensor, key_P: Tensor, keys: int) -> Tensor:
        """Places of those among `key_P` that `key_H` has. Most have not: a table of all keys tells fastest, where it is no waste."""
        if keys <= 32 * len(key_P):
            mark = torch.zeros(keys, dtype=torch.bool, device=key_P.device)
            mark[key_H] = True
            return mark[key_P].nonzero()[:, 0]
        if not len(key_H):
            return key_P.new_zeros(0)
        return (key_H[torch.searchsorted(key_H, key_P).clamp(max=len(key_H) - 1)] == key_P).nonzero()[:, 0]

    def add_all(self, level: int, logit_Qn: Tensor) -> Tensor:
        """The same where every node of the level (at place L: every item) has its logit. In place."""
        return _put(logit_Qn, *self.pairs(level), self.change(level))

    def add_codes(self, level: int, tree: Tree, parent_Q: Tensor, logit_QV: Tensor) -> Tensor:
        """The same for the codes below each query's prefix, whose node is `parent_Q` (of no meaning at the first level). In place."""
        query_H, node_H = self.pairs(level)
        here = tree.parent(level)[node_H] == parent_Q[query_H] if level else torch.ones_like(query_H, dtype=torch.bool)
        return _put(logit_QV, query_H[here], tree.code_of(level, node_H[here]), self.change(level)[here])

    def add_drawn(self, item_N: Tensor, logit_QN: Tensor) -> Tensor:
        """The same for items that every query is compared with; one may stand there twice. In place."""
        query_H, item_H = self.pairs(-1)
        sorted_N, order_N = torch.sort(item_N)
        first_H = torch.searchsorted(sorted_N, item_H)
        pair_T, place_T = spread(first_H, torch.searchsorted(sorted_N, item_H, right=True) - first_H)
        return _put(logit_QN, query_H[pair_T], order_N[place_T], self.change(-1)[pair_T])


def _put(logit_Qx: Tensor, query_H: Tensor, place_H: Tensor, value_H: Tensor) -> Tensor:
    return logit_Qx.index_put_((query_H, place_H), value_H.to(logit_Qx.dtype), accumulate=True)


class Repeats(nn.Module):
    def __init__(self, scenarios: int, levels: int) -> None:
        super().__init__()
        self.weight = nn.ParameterList(torch.zeros(scenarios) for _ in range(levels + 1))

    def forward(self, tree: Tree, batch: Batch) -> Had:
        """What each query of the batch sees in its user's history."""
        query_N, event_N = spread(batch.history_offset[segments_of(batch)], batch.visible_Q)
        item_N, place_I = batch.items.ids_U[batch.item_N[event_N]], tree.place_of_item()
        known_N = item_N < len(place_I)
        place_N = place_I[item_N.clamp(max=len(place_I) - 1)].long()
        known_N &= place_N >= 0
        key_H = torch.unique((query_N * tree.items + place_N)[known_N])  # in the order of the leaves, and so in that of every level
        query_H, item_H = key_H // tree.items, tree.item_at(key_H % tree.items)
        keys, nodes = [torch.sort(query_H * len(place_I) + item_H).values], [len(place_I)]
        shares = [torch.ones(len(key_H), dtype=torch.double, device=key_H.device)]
        node_H = tree.leaf_of_item()[item_H].long()
        for level in reversed(range(tree.levels)):
            if level + 1 < tree.levels:
                node_H = tree.parent(level + 1)[node_H]
            key_h, count_h = torch.unique_consecutive(query_H * tree.nodes(level) + node_H, return_counts=True)
            keys.insert(0, key_h)
            shares.insert(0, count_h.double() / tree.items_in(level, key_h % tree.nodes(level)))
            nodes.insert(0, tree.nodes(level))
        return Had(self.weight, batch.scenario_Q, keys, shares, nodes)
