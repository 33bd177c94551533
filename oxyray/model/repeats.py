"""Will an item be taken again? What the user has had already gets so many times as likely, by learned factors.

A head whose outputs are tied to its inputs puts the latest items first, whether a shop's people buy again (bread) or never do (a book).
Here an item's factor depends on the scenario, on what its user last did with it (who has put it into the cart buys it next; who has bought
it may be done), on how often it was had and on how many events ago. A node's factor at a level is the mean of its items' factors, 1 for
those that were not had, as if its items were else alike; at the leaves that is exact. What a request sees of its user's short-term history
counts.

Legend: Q queries (requests), N events, H pairs (query, item) where something was had, h pairs (query, node), P pairs asked for, L levels,
n nodes of a level, K kinds (actions, then those between `COUNTS`, then those between `AGES`).
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
COUNTS = (2, 4)  # how often: once; twice or three times; more often
AGES = (1, 3, 7, 15, 31, 63)  # events since it was last had: none; 1 or 2; 3 to 6; and so on


@dataclass(frozen=True)
class Had:
    """What each query has had, by level: sorted keys `query * n + node`, and what is added to the logits there, the logarithm of the node's
    factor. Behind the levels, at place L, stand the items themselves. `nodes` is n of every level."""

    queries: int
    key_H: list[Tensor]
    change_H: list[Tensor]
    nodes: list[int]

    def pairs(self, level: int) -> tuple[Tensor, Tensor]:
        """Queries and nodes: (H,) both."""
        return self.key_H[level] // self.nodes[level], self.key_H[level] % self.nodes[level]

    def add(self, level: int, query_P: Tensor, node_P: Tensor, logit_P: Tensor) -> Tensor:
        """The logits of (query, node) pairs with the factors in; at place L those of items."""
        key_H, key_P = self.key_H[level], query_P * self.nodes[level] + node_P
        hit = self._hits(key_H, key_P, self.queries * self.nodes[level])
        return logit_P.index_add(0, hit, self.change_H[level][torch.searchsorted(key_H, key_P[hit])].to(logit_P.dtype))

    def change(self, level: int, query_X: Tensor, node_X: Tensor) -> Tensor:
        """What is added to the logits of (query, node) pairs of any shape; nothing is read back from a GPU for it."""
        key_H, key_X = self.key_H[level], query_X * self.nodes[level] + node_X
        if not len(key_H):
            return torch.zeros_like(key_X, dtype=self.change_H[level].dtype)
        place_X = torch.searchsorted(key_H, key_X).clamp(max=len(key_H) - 1)
        return torch.where(key_H[place_X] == key_X, self.change_H[level][place_X], 0)

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
        return _put(logit_Qn, *self.pairs(level), self.change_H[level])

    def add_codes(self, level: int, tree: Tree, parent_Q: Tensor, logit_QV: Tensor) -> Tensor:
        """The same for the codes below each query's prefix, whose node is `parent_Q` (of no meaning at the first level). In place."""
        query_H, node_H = self.pairs(level)
        here = tree.parent(level)[node_H] == parent_Q[query_H] if level else torch.ones_like(query_H, dtype=torch.bool)
        return _put(logit_QV, query_H[here], tree.code_of(level, node_H[here]), self.change_H[level][here])

    def add_drawn(self, item_N: Tensor, logit_QN: Tensor) -> Tensor:
        """The same for items that every query is compared with; one may stand there twice. In place."""
        query_H, item_H = self.pairs(-1)
        sorted_N, order_N = torch.sort(item_N)
        first_H = torch.searchsorted(sorted_N, item_H)
        pair_T, place_T = spread(first_H, torch.searchsorted(sorted_N, item_H, right=True) - first_H)
        return _put(logit_QN, query_H[pair_T], order_N[place_T], self.change_H[-1][pair_T])


def _put(logit_Qx: Tensor, query_H: Tensor, place_H: Tensor, value_H: Tensor) -> Tensor:
    return logit_Qx.index_put_((query_H, place_H), value_H.to(logit_Qx.dtype), accumulate=True)


class Repeats(nn.Module):
    """`factor[level]` holds, for each scenario and kind, a tenth of the logarithm of a factor, (S · K, 1); the last one the items' own.
    They are modules of their own because ZeRO-3 gathers a module's weights for its backward pass only where it returns plain tensors."""

    def __init__(self, scenarios: int, actions: int, levels: int) -> None:
        super().__init__()
        self.actions, self.kinds = actions, actions + len(COUNTS) + 1 + len(AGES) + 1
        self.factor = nn.ModuleList(Factors(scenarios * self.kinds) for _ in range(levels + 1))

    def forward(self, tree: Tree, batch: Batch) -> Had:
        """What each query of the batch sees in its user's history."""
        query_H, item_H, kind_H3 = self._had(tree, batch)
        kind_H3 = kind_H3 + batch.scenario_Q[query_H, None] * self.kinds
        keys, changes, nodes = list[Tensor](), list[Tensor](), list[int]()
        node_H = tree.leaf_of_item()[item_H].long()
        for level in reversed(range(tree.levels)):
            if level + 1 < tree.levels:
                node_H = tree.parent(level + 1)[node_H]
            key_h, place_H, count_h = torch.unique_consecutive(
                query_H * tree.nodes(level) + node_H, return_inverse=True, return_counts=True
            )
            below_h = tree.items_in(level, key_h % tree.nodes(level))
            factor_H = self._log_factor(level, kind_H3).exp()
            keys.insert(0, key_h)
            changes.insert(0, torch.log((below_h - count_h).double().index_add(0, place_H, factor_H) / below_h))
            nodes.insert(0, tree.nodes(level))
        items = len(tree.place_of_item())
        key_H, order_H = torch.sort(query_H * items + item_H)
        changes.append(self._log_factor(tree.levels, kind_H3)[order_H])
        return Had(batch.queries, [*keys, key_H], changes, [*nodes, items])

    def _had(self, tree: Tree, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, items and the three kinds of each pair, in the order of the leaves, and so in that of every level."""
        first_Q = batch.history_offset[segments_of(batch)]
        query_N, event_N = spread(first_Q, batch.visible_Q)
        item_N, place_I = batch.items.ids_U[batch.item_N[event_N]], tree.place_of_item()
        place_N = torch.where(item_N < len(place_I), place_I[item_N.clamp(max=len(place_I) - 1)].long(), -1)
        known_N = place_N >= 0
        key_H, pair_N, count_H = torch.unique((query_N * tree.items + place_N)[known_N], return_inverse=True, return_counts=True)
        last_H = torch.zeros_like(key_H).scatter_reduce(0, pair_N, event_N[known_N], "amax")
        query_H = key_H // tree.items
        age_H = (first_Q + batch.visible_Q)[query_H] - 1 - last_H
        counted_H, aged_H = (
            torch.bucketize(number_H, torch.tensor(bounds, device=key_H.device), right=True)
            for number_H, bounds in ((count_H, COUNTS), (age_H, AGES))
        )
        kind_H3 = [batch.action_N[last_H], self.actions + counted_H, self.actions + len(COUNTS) + 1 + aged_H]
        return query_H, tree.item_at(key_H % tree.items), torch.stack(kind_H3, dim=1)

    def _log_factor(self, level: int, kind_H3: Tensor) -> Tensor:
        """In float64: a factor must neither overflow nor vanish beside 1."""
        log_H3: Tensor = self.factor[level](kind_H3)
        return log_H3.double().sum(dim=1) * _SPEED


class Factors(nn.Module):
    """One number for each of so many; an embedding of width 1 whose gradient costs a fifth."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, 1))

    def forward(self, index_X: Tensor) -> Tensor:
        """(X): those numbers."""
        return self.weight[:, 0].index_select(0, index_X.flatten()).view(index_X.shape)
