"""A decoder small enough to ask it about every SID: a recurrent net over any catalogue's codes, and the catalogue scored one prefix at a
time."""

from __future__ import annotations

import numpy as np
import torch

from oxyray.generate.steps import Outputs
from oxyray.model.head import Tree
from oxyray.sid.prefix import PrefixIndex

D = 6


class Tiny:
    """Steps of `requests` requests, float64. `sharp` scales the logits. `fed` counts the beams of each step forward."""

    def __init__(self, index: PrefixIndex, requests: int, seed: int = 0, sharp: float = 2.0, tree: Tree | None = None) -> None:
        random = torch.Generator().manual_seed(seed)
        self.index, self.tree, self.fed = index, tree or Tree(index), list[int]()
        self.mix = torch.randn(D, D, generator=random, dtype=torch.double)
        self.code = torch.randn(index.levels, index.width, D, generator=random, dtype=torch.double)
        self.own = sharp * torch.randn(index.levels, index.width, D, generator=random, dtype=torch.double)
        self.first_BD = torch.randn(requests, D, generator=random, dtype=torch.double)
        self.hidden_BKD = self.first_BD[:, None]

    def outputs(self, level: int) -> Outputs:
        return Outputs(self.own[level], True)

    def advance(self, level: int, node_BK: torch.Tensor, origin_BK: torch.Tensor | None) -> None:
        self.fed.append(node_BK.shape[1])
        before = self.hidden_BKD if origin_BK is None else self.hidden_BKD.gather(1, origin_BK[..., None].expand(-1, -1, D))
        self.hidden_BKD = self._next(before, self.code[level][self.tree.code_of(level, node_BK)])

    def _next(self, hidden: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return torch.tanh(hidden @ self.mix + token)

    def token_logprobs(self, request: int, legal: set[int], vocabulary: bool = False, temperature: float = 1.0) -> dict[int, np.ndarray]:
        """Every legal leaf with the log-probability of each of its codes, written out prefix by prefix."""
        sids = {leaf: tuple(sid) for leaf, sid in enumerate(self.index.codes_of(np.arange(self.index.leaves)).tolist()) if leaf in legal}
        found = {}
        for leaf, sid in sids.items():
            hidden, tokens = self.first_BD[request], []
            for level, code in enumerate(sid):
                logit = self.own[level] @ hidden / temperature
                children = sorted({other[level] for other in sids.values() if other[:level] == sid[:level]})
                tokens.append(float(logit[code] - torch.logsumexp(logit if vocabulary else logit[children], 0)))
                hidden = self._next(hidden, self.code[level][code])
            found[leaf] = np.array(tokens)
        return found


def catalogue(seed: int, items: int, width: int, levels: int = 3) -> tuple[np.ndarray, PrefixIndex]:
    codes_IL = np.random.default_rng(seed).integers(0, width, (items, levels))
    return codes_IL, PrefixIndex.from_codes(codes_IL, width)


def leaves_of(index: PrefixIndex, codes_IL: np.ndarray, items: np.ndarray) -> set[int]:
    return set(index.leaf_of(codes_IL[items]).tolist())
