"""A whole search as one CUDA graph, captured once for each size of a batch and replayed: the host sends one call in place of some hundred
(paper 3.2, xBeam).

What requests bring (keys and values of their histories and prompts, what they may get, what they have had) is copied into tensors of the
graph's own. Requests, memory slots and lists are rounded up to a bucket, so few graphs serve all batches. Weights are read where they are:
those of a new version are there at the next replay. Without CUDA the same steps run uncaptured, which is how they are tested.

Legend: B requests of a bucket, S memory slots, K beams, L levels, H heads, E head width, D width.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oxyray.generate.fixed import Choice, walk_fixed
from oxyray.generate.pools import Legal
from oxyray.generate.score import Normalise
from oxyray.generate.steps import PolicySteps
from oxyray.generate.walk import Walked
from oxyray.model.decoder import BeamState, Memory
from oxyray.model.layers import Tensor
from oxyray.model.moe import MixtureOfExperts
from oxyray.model.policy import Decoding, Policy, Shelf
from oxyray.model.repeats import Had

_SLOTS = 64  # memory slots are rounded up to a multiple of so many
_NEVER = torch.iinfo(torch.int64).max  # behind all keys
_MOST = 1 << 26  # children that a search has room for, over all requests and beams


@dataclass(frozen=True)
class _Bucket:
    """Batches that one graph serves."""

    requests: int
    slots: int
    had: int
    pools: bool
    lost: int

    @classmethod
    def of(cls, decoding: Decoding, legal: Legal) -> _Bucket:
        return cls(
            requests=_power(len(decoding.hidden_BKD)),
            slots=-(-decoding.memory.visible_BPS.shape[2] // _SLOTS) * _SLOTS,
            had=0 if decoding.had is None else _power(max(len(keys) for keys in decoding.had.key_H)),
            pools=legal.pooled,
            lost=_power(max(len(keys) for keys in legal.lost)) if legal.lost else 0,
        )


class Graphs:
    """Searches of one policy over one version of the catalogue. `choice` makes the rule that each of them follows; `most` graphs are kept,
    those that were used last."""

    def __init__(
        self, policy: Policy, choice: Callable[[], Choice], normalise: Normalise = "children", temperature: float = 1.0, most: int = 16
    ) -> None:
        self.policy, self.choice, self.normalise, self.temperature, self.most = policy, choice, normalise, temperature, most
        self.memory = torch.cuda.graph_pool_handle() if policy.level.is_cuda else None  # of all graphs: one runs at a time
        self._captured: OrderedDict[_Bucket, _Captured] = OrderedDict()
        self._vectors: list[Tensor] | None = None
        self._copies: list[Tensor] = []

    @staticmethod
    def can(policy: Policy, requests: int, beams: int) -> bool:
        """Whether it is on a GPU and can be captured: experts count their tokens on the host. And whether there is room for the largest
        fan-out of all beams."""
        tree = policy.tree
        room = max(tree.fan_out(0), beams * max((tree.fan_out(level) for level in range(1, tree.levels)), default=0))
        return policy.level.is_cuda and requests * room <= _MOST and not any(isinstance(m, MixtureOfExperts) for m in policy.modules())

    def vectors(self, shelf: Shelf) -> list[Tensor]:
        """Those of the head, where graphs find them: weights are where they are, others are copied to one place."""
        if not self.policy.head.tied:
            return shelf.vectors
        if self._vectors is not shelf.vectors:
            self._copies = self._copies or [torch.empty_like(vector) for vector in shelf.vectors]
            self._vectors = shelf.vectors  # held, so that no other list can be taken for it
            for own, given in zip(self._copies, shelf.vectors, strict=True):
                own.copy_(given)
        return self._copies

    @torch.no_grad()
    def walk(self, decoding: Decoding, legal: Legal) -> Walked:
        """The result for a decoding that has just started, as `walk_fixed` gives it."""
        bucket = _Bucket.of(decoding, legal)
        captured = self._captured.get(bucket) or _Captured(self, bucket, decoding, legal)
        self._captured[bucket] = captured
        self._captured.move_to_end(bucket)
        while len(self._captured) > self.most:
            self._captured.popitem(last=False)
        return captured.run(decoding, legal)


class _Captured:
    """One bucket's tensors, and its graph."""

    def __init__(self, graphs: Graphs, bucket: _Bucket, decoding: Decoding, legal: Legal) -> None:
        self.graphs, self.bucket = graphs, bucket
        requests, slots = bucket.requests, bucket.slots
        device = decoding.hidden_BKD.device

        def room(like: Tensor, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=device)

        def pair(key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
            return room(key, requests, key.shape[1], length, key.shape[3]), room(value, requests, value.shape[1], length, value.shape[3])

        memory, nothing = decoding.memory, torch.empty(0, device=device)  # of a memory, steps look at two things
        self.memory = Memory(
            memory_BSD=nothing, position_BS=nothing, query_BP=nothing, real_BP=nothing,
            visible_BPS=room(memory.visible_BPS, requests, 1, slots), position_BP=room(memory.position_BP, requests, 1),
        )  # fmt: skip
        self.states = [BeamState(pair(*s.cross, slots), pair(*s.prompt, s.prompt[0].shape[2]), []) for s in decoding.states]
        self.state_BD = room(decoding.state_BD, requests, *decoding.state_BD.shape[1:])
        self.hidden_BKD = room(decoding.hidden_BKD, requests, *decoding.hidden_BKD.shape[1:])
        self.shelf = Shelf(nothing, graphs.vectors(decoding.shelf))
        self.had = None
        if decoding.had is not None:
            keys, changes = ([room(each, bucket.had) for each in kind] for kind in (decoding.had.key_H, decoding.had.change_H))
            self.had = Had(requests, keys, changes, decoding.had.nodes)
        self.legal = Legal.empty(graphs.policy.tree, requests, bucket.pools, bucket.lost)
        self._fill(decoding, legal)
        self._replay = _captured_if_possible(self._search, graphs.memory) if device.type == "cuda" else self._search

    def run(self, decoding: Decoding, legal: Legal) -> Walked:
        self._fill(decoding, legal)
        found, requests = self._replay(), len(decoding.hidden_BKD)
        return Walked(*(part[:requests].clone() for part in (found.leaf_BK, found.logprob_BKL, found.score_BK) if part is not None))

    def _search(self) -> Walked:
        graphs = self.graphs
        states = [BeamState(state.cross, state.prompt, []) for state in self.states]
        decoding = Decoding(self.memory, self.state_BD, states, self.shelf, self.hidden_BKD, self.state_BD, self.had)
        return walk_fixed(PolicySteps(graphs.policy, decoding), self.legal, graphs.choice(), graphs.normalise, graphs.temperature)

    def _fill(self, decoding: Decoding, legal: Legal) -> None:
        """Copy in what a batch brings. Rows of requests that it has not stay as an earlier one left them: they are not looked at."""
        self.memory.visible_BPS.zero_()
        self.memory.visible_BPS[:, :, 0] = True  # a request that sees nothing would be NaN
        _put(self.memory.visible_BPS, decoding.memory.visible_BPS)
        _put(self.memory.position_BP, decoding.memory.position_BP)
        for mine, given in zip(self.states, decoding.states, strict=True):
            for own, theirs in zip(mine.cross, given.cross, strict=True):
                own[:, :, theirs.shape[2] :].zero_()  # nothing times what is not finite is not nothing
            for own, theirs in zip((*mine.cross, *mine.prompt), (*given.cross, *given.prompt), strict=True):
                _put(own, theirs)
        _put(self.state_BD, decoding.state_BD)
        _put(self.hidden_BKD, decoding.hidden_BKD)
        if self.had is not None and decoding.had is not None:
            for own, theirs in zip(self.had.key_H, decoding.had.key_H, strict=True):
                _put(own.fill_(_NEVER), theirs)
            for own, theirs in zip(self.had.change_H, decoding.had.change_H, strict=True):
                _put(own, theirs)
        self.graphs.vectors(decoding.shelf)
        self.legal.take(legal)


def _captured_if_possible(search: Callable[[], Walked], memory: Any) -> Callable[[], Walked]:
    """The search as a CUDA graph; as it is, step by step, where CUDA refuses (no memory left, a call that cannot be captured). Results are
    the same, only later; so that is said."""
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that breaks off may leave its own stream behind
            return _capture(search, memory)
    except RuntimeError as error:
        told = "a search could not be captured as a CUDA graph and runs without, which is slower: %s"
        logging.getLogger(__name__).warning(told, error)
        return search


def _capture(search: Callable[[], Walked], memory: Any) -> Callable[[], Walked]:
    """`search` as a CUDA graph: every replay fills the same result. It is run before, on a stream of its own, so that what is made at a
    first call (compiled kernels, work space, tables of the index) is there; what that draws is put back."""
    random = torch.cuda.get_rng_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            search()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        found = search()
    torch.cuda.set_rng_state(random)

    def replay() -> Walked:
        graph.replay()
        return found

    return replay


def _put(own: Tensor, given: Tensor) -> None:
    """Into the corner of a tensor that may be larger."""
    own[tuple(slice(0, size) for size in given.shape)].copy_(given)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
