"""What generation needs from a model: the states that score the next level, the vectors that they are scored with, one step forward.

`PolicySteps` is the policy in this form. Any other decoder over SIDs can take its place.

Legend: B requests, K beams, n_l nodes of level l, V codes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from oxyray.data.batch import Batch
from oxyray.model.head import Tree
from oxyray.model.layers import Tensor
from oxyray.model.policy import Decoding, Policy, Rows, Shelf
from oxyray.model.repeats import Had


@dataclass(frozen=True)
class Outputs:
    """Output vectors of a level: of its codes, (V, D), or of its nodes, (n_l, D). Only the first give probabilities over the whole
    vocabulary. `had` changes the logits of what each request's user has had already."""

    vector_nD: Tensor
    by_code: bool
    had: Had | None = None


class Steps(Protocol):
    """A decoder in the middle of B requests. At first K is 1, and `hidden_BKD` scores the first level."""

    @property
    def tree(self) -> Tree: ...

    @property
    def hidden_BKD(self) -> Tensor: ...

    def outputs(self, level: int) -> Outputs: ...

    def advance(self, level: int, node_BK: Tensor, origin_BK: Tensor | None) -> None:
        """Feed the chosen node of `level` to each beam, which continues beam `origin_BK` of the step before (None at the first)."""


class PolicySteps:
    """The policy in the middle of a decoding."""

    def __init__(self, policy: Policy, decoding: Decoding) -> None:
        self.policy, self.tree, self.decoding = policy, policy.tree, decoding

    @classmethod
    @torch.no_grad()
    def begin(cls, policy: Policy, batch: Batch, rows: Rows, shelf: Shelf | None = None) -> PolicySteps:
        """Started on a batch of requests (one query a segment)."""
        with torch.profiler.record_function("generate/start"):
            return cls(policy, policy.start(batch, rows, shelf))

    @property
    def hidden_BKD(self) -> Tensor:
        return self.decoding.hidden_BKD

    def outputs(self, level: int) -> Outputs:
        return Outputs(self.decoding.shelf.vectors[level], by_code=not self.policy.head.tied, had=self.decoding.had)

    def advance(self, level: int, node_BK: Tensor, origin_BK: Tensor | None) -> None:
        self.policy.advance(self.decoding, level, node_BK, origin_BK)
