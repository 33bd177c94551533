"""Lloyd's algorithm on vectors that may lie on several machines: what one level of RQ-KMeans needs of them (paper 2.2.2).

Vectors lie in blocks, blocks in shards: one in this process, or one in each of some Ray actors. A round sends the centroids out and gets
each shard's sums and counts back. Vectors are brought to a grid of 24 bits, so that float64 adds them up without rounding, in any order:
the same seed gives the same centroids on any number of workers, and a sum is kept up by the few vectors that changed their code. Which
centroid is nearest is faiss's business, block by block.

A code without vectors goes to stand beside the fullest, round after round. For a bound on the load so do codes that are nearly empty, until
crowds have the codes that they need; what is still too much in the end goes, farthest first, to the next nearest code with room.

Legend: N vectors of a shard or a block, F dimensions, V codes, H vectors without a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from oxyray.cluster.start import ray_for
from oxyray.cluster.wait import answers
from oxyray.config import ClusterConfig

Array = np.ndarray

BLOCK = 16_384  # rows; the same whatever the workers
_TIMEOUT_S = 900.0
_FULL, _EMPTY = 1.3, 0.8  # of the mean load: a code above the one is split, at the cost of one below the other


class Shard:
    """Blocks of vectors, what is left of them level by level, and the codes of the present level. `blocks` are (first row, vectors)."""

    def __init__(self, blocks: Sequence[tuple[int, Array]]) -> None:
        self.firsts = [first for first, _ in blocks]
        self.left = [np.array(vectors_NF, dtype=np.float32) for _, vectors_NF in blocks]
        self.trained: list[Array] = list(self.left)
        self.learned = [np.arange(len(left_NF)) for left_NF in self.left]  # by block, rows that are learned from: all
        self.codes: list[Array] = []
        self.step = 1.0
        self.distances: list[Array] = []
        self._begin_sums()

    def _begin_sums(self) -> None:
        self._sum_VF: Array | None = None
        self._summed: dict[int, Array] = {}  # by block: the codes that its vectors are counted under

    def train_on(self, rows: Array) -> None:
        """Only these (global row numbers, sorted) take part in `sums` and `worst` until what is left changes."""
        self.learned = self._here(rows)
        self.trained = self._of(self.learned)
        self._begin_sums()

    def _here(self, rows: Array) -> list[Array]:
        """By block: those of the sorted global row numbers that lie in it, counted from its first."""
        bounds = [np.searchsorted(rows, [first, first + len(left_NF)]) for first, left_NF in zip(self.firsts, self.left, strict=True)]
        return [rows[low:high] - first for first, (low, high) in zip(self.firsts, bounds, strict=True)]

    def _of(self, rows: list[Array]) -> list[Array]:
        return [left if len(row_N) == len(left) else left[row_N] for left, row_N in zip(self.left, rows, strict=True)]

    def to_grid(self, step: float) -> None:
        """Round what is left to multiples of `step`, a power of two that float32 has room for."""
        self.step = step
        for left_NF in self.left:
            left_NF *= np.float32(1 / step)
            np.rint(left_NF, out=left_NF)
            left_NF *= np.float32(step)

    def sums(self, centroids_VF: Array) -> tuple[Array, Array, Array]:
        """Of each code's vectors: their sum (V, F) float64, exact; their number (V,); the sum of their squared distances in the grid's
        units, as whole numbers."""
        if self._sum_VF is None:
            self._sum_VF = np.zeros(centroids_VF.shape)
        count_V, error_V = np.zeros(len(centroids_VF), dtype=np.int64), np.zeros(len(centroids_VF))
        nearest = Nearest(centroids_VF)
        for place, vectors_NF in ((place, block) for place, block in enumerate(self.trained) if len(block)):
            code_N, distance_N = nearest(vectors_NF)
            self._sum_VF += change(len(centroids_VF), vectors_NF, self._summed.get(place), code_N)
            self._summed[place] = code_N
            count_V += np.bincount(code_N, minlength=len(centroids_VF))
            error_V += np.bincount(code_N, weights=np.rint(distance_N / self.step), minlength=len(centroids_VF))
        return self._sum_VF, count_V, error_V

    def assign(self, centroids_VF: Array) -> Array:
        """Give every vector its code; how many each code has."""
        nearest = Nearest(centroids_VF)
        found = [nearest(left_NF) for left_NF in self.left]
        self.codes, self.distances = [codes for codes, _ in found], [distances for _, distances in found]
        return np.bincount(np.concatenate([*self.codes, np.zeros(0, dtype=np.int64)]).astype(np.int64), minlength=len(centroids_VF))

    def of_code(self, codes: Array) -> tuple[Array, Array, Array, Array]:
        """Row, code, squared distance and what is left of every vector whose code is among `codes`."""
        found = []
        for first, left_NF, code_N, distance_N in zip(self.firsts, self.left, self.codes, self.distances, strict=True):
            here = np.flatnonzero(np.isin(code_N, codes))
            found.append((first + here, code_N[here], distance_N[here], left_NF[here]))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
        rows, code, distance, left = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows, code, distance, left

    def recode(self, rows: Array, codes: Array) -> None:
        """These vectors (global row numbers) have other codes now."""
        for first, code_N in zip(self.firsts, self.codes, strict=True):
            here = (rows >= first) & (rows < first + len(code_N))
            code_N[rows[here] - first] = codes[here]

    def worst(self, count: int, above: float) -> tuple[Array, Array, Array]:
        """Row, squared distance and what is left of up to `count` different vectors that are described worst, farther than `above`."""
        found = []
        for first, left_NF, distance_N, here in zip(self.firsts, self.left, self.distances, self.learned, strict=True):
            here = here[distance_N[here] > above]
            here = here[np.argsort(-distance_N[here], kind="stable")]
            found.append((first + here, distance_N[here], left_NF[here]))
        return farthest(found, count)

    def rows(self, rows: Array) -> tuple[Array, Array]:
        """Of these vectors (global row numbers) those that lie here: their places among `rows`, and what is left of them."""
        places = [np.flatnonzero((rows >= first) & (rows < first + len(left))) for first, left in zip(self.firsts, self.left, strict=True)]
        left = [left_NF[rows[place] - first] for first, left_NF, place in zip(self.firsts, self.left, places, strict=True)]
        return np.concatenate(places), np.concatenate(left)

    def squares(self, rows: Array | None = None) -> tuple[list[float], float, int]:
        """Sum of squared lengths of every block, largest entry, number of vectors; of these (global row numbers, sorted) or of all."""
        asked = self.left if rows is None else self._of(self._here(rows))
        totals = [float(np.einsum("nf,nf->", left, left, dtype=np.float64)) for left in asked]
        return totals, max((float(np.abs(left).max()) for left in asked if left.size), default=0.0), sum(map(len, asked))

    def subtract(self, centroids_VF: Array) -> list[tuple[int, Array]]:
        """Go on to the next level with what the codes leave; the codes of this one, by first row."""
        for left_NF, code_N in zip(self.left, self.codes, strict=True):
            left_NF -= centroids_VF[code_N]
        return list(zip(self.firsts, self.codes, strict=True))


def change(width: int, vectors_NF: Array, before_N: Array | None, after_N: Array) -> Array:
    """By how much each code's sum (V, F) changes when vectors leave the codes `before_N` (None: they had none) for those of `after_N`."""
    from scipy import sparse

    moved = np.arange(len(after_N)) if before_N is None else np.flatnonzero(after_N != before_N)
    signs, codes = np.ones((len(moved), 1)), after_N[moved, None]
    if before_N is not None:
        signs, codes = np.concatenate([signs, -signs], axis=1), np.concatenate([codes, before_N[moved, None]], axis=1)
    starts = np.arange(len(moved) + 1) * signs.shape[1]
    moves_VM = sparse.csc_matrix((signs.reshape(-1), codes.reshape(-1), starts), shape=(width, len(moved)))
    change_VF: Array = moves_VM @ vectors_NF[moved].astype(np.float64)
    return change_VF


class Nearest:
    """The code of the least squared distance, and that distance."""

    def __init__(self, centroids_VF: Array) -> None:
        import faiss

        self.index = faiss.IndexFlatL2(centroids_VF.shape[1])
        self.index.add(np.ascontiguousarray(centroids_VF, dtype=np.float32))

    def __call__(self, vectors_NF: Array) -> tuple[Array, Array]:
        distance_N1, code_N1 = self.index.search(np.ascontiguousarray(vectors_NF), 1)
        return code_N1[:, 0].astype(np.int32), np.maximum(distance_N1[:, 0], 0)


class Shards:
    """All shards: `ask` calls a method of each and gives the answers in the order of the shards."""

    def __init__(self, shards: Sequence[Any], ask: Callable[..., list[Any]]) -> None:
        self._shards, self._ask = shards, ask

    def ask(self, method: str, *args: Any) -> list[Any]:
        return self._ask(self._shards, method, *args)


@contextmanager
def shards(vectors_NF: Array, workers: int = 1, cluster: ClusterConfig | None = None) -> Iterator[Shards]:
    """In this process, or block after block dealt out to `workers` Ray actors. Raises RunError when the cluster is too small."""
    blocks = [(first, vectors_NF[first : first + BLOCK]) for first in range(0, len(vectors_NF), BLOCK)]
    workers = min(workers, len(blocks))
    if workers == 1:
        yield Shards([Shard(blocks)], lambda held, method, *args: [getattr(shard, method)(*args) for shard in held])
        return
    import ray

    with ray_for(cluster or ClusterConfig(), workers, otherwise="sid.workers=1"):
        actors: list[Any] = [ray.remote(num_cpus=1)(Shard).remote(blocks[rank::workers]) for rank in range(workers)]

        def ask(held: Sequence[Any], method: str, *args: Any) -> list[Any]:
            shared = [ray.put(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
            return answers([getattr(actor, method).remote(*shared) for actor in held], _TIMEOUT_S, f"RQ-KMeans workers ({method})")

        try:
            yield Shards(actors, ask)
        finally:
            for actor in actors:
                ray.kill(actor)


def lloyd(held: Shards, centroids_VF: Array, iterations: int, step: float, alike: float, even: bool) -> Array:
    """Centroids (V, F) after so many rounds on the vectors in training. Codes without vectors are moved in all rounds but the last two;
    with `even` loads are evened out in the first half. A code whose vectors lie within the mean squared distance `alike` is not split.
    `step` is the grid's."""
    for turn in range(iterations):
        parts = held.ask("sums", centroids_VF)
        sum_VF, count_V, error_V = (np.sum([part[place] for part in parts], axis=0) for place in range(3))
        mean_VF = sum_VF / np.maximum(count_V, 1)[:, None]
        centroids_VF = np.where((count_V > 0)[:, None], mean_VF, centroids_VF).astype(np.float32)
        if turn < iterations - 2:
            centroids_VF = split(centroids_VF, count_V, error_V * step > alike * count_V, even and turn < iterations // 2)
    return centroids_VF


def split(centroids_VF: Array, count_V: Array, apart_V: Array, even: bool) -> Array:
    """Codes without vectors come to stand beside the fullest whose vectors lie apart; with `even` the emptiest do, as long as that evens
    out: a crowd gets the codes that it needs."""
    load_V, mean = count_V.astype(np.float64), float(count_V.mean())
    centroids_VF = centroids_VF.copy()
    for empty in np.argsort(load_V, kind="stable")[: len(load_V) // 2]:
        full = int(np.where(apart_V, load_V, 0).argmax())
        uneven = even and load_V[full] >= _FULL * mean and load_V[empty] <= _EMPTY * mean
        if not apart_V[full] or (load_V[empty] and not uneven):
            break
        load_V[full] = load_V[empty] = load_V[full] / 2
        apart_V = apart_V | (np.arange(len(load_V)) == empty)
        centroids_VF[empty] = centroids_VF[full] * np.float32(1 + 2**-10)
        centroids_VF[full] *= np.float32(1 - 2**-10)
    return centroids_VF


def within(held: Shards, centroids_VF: Array, count_V: Array, most: float) -> Array:
    """Bring every code to at most `most` times the mean load: of those that are too full the farthest vectors move to the nearest code
    with room. How many each code then has."""
    mean = count_V.sum() / len(count_V)
    room = max(math.floor(most * mean + 1e-9), math.ceil(mean))
    full = np.flatnonzero(count_V > room)
    if not len(full):
        return count_V
    parts = held.ask("of_code", full)
    row_H, code_H, distance_H = (np.concatenate([part[place] for part in parts]) for place in (0, 1, 2))
    left_HF = np.concatenate([part[3] for part in parts if len(part[3])])
    order = np.lexsort((row_H, distance_H, code_H))
    place = np.arange(len(order)) - np.searchsorted(code_H[order], code_H[order])
    homeless = np.sort(order[place >= room])
    count_V = np.minimum(count_V, room)
    new_H = np.empty(len(homeless), dtype=np.int32)
    waiting = np.arange(len(homeless))
    while len(waiting):
        free = np.flatnonzero(count_V < room)
        choice, distance = _nearest_of(left_HF[homeless[waiting]], centroids_VF, free)
        order = np.lexsort((row_H[homeless[waiting]], distance, choice))
        turn = np.arange(len(order)) - np.searchsorted(choice[order], choice[order])
        settled = order[turn < room - count_V[choice[order]]]
        new_H[waiting[settled]] = choice[settled]
        count_V = count_V + np.bincount(choice[settled], minlength=len(count_V))
        waiting = np.setdiff1d(waiting, waiting[settled])
    held.ask("recode", row_H[homeless], new_H)
    return count_V


def _nearest_of(vectors_HF: Array, centroids_VF: Array, free: Array) -> tuple[Array, Array]:
    import faiss

    index = faiss.IndexFlatL2(centroids_VF.shape[1])
    index.add(np.ascontiguousarray(centroids_VF[free]))
    distance_H1, place_H1 = index.search(np.ascontiguousarray(vectors_HF), 1)
    return free[place_H1[:, 0]], distance_H1[:, 0]


def to_grid(held: Shards) -> float:
    """Bring what is left of the vectors to the grid on which their sums are exact, and the step of that grid."""
    largest = squares(held)[1]
    step = float(2.0 ** (math.ceil(math.log2(largest)) - 23)) if largest > 0 else 1.0
    held.ask("to_grid", step)
    return step


def squares(held: Shards, rows: Array | None = None) -> tuple[float, float, int]:
    """Mean squared length of what is left of the vectors (of these rows), its largest entry, their number."""
    parts = held.ask("squares", rows)
    count = sum(part[2] for part in parts)
    return math.fsum(total for part in parts for total in part[0]) / max(count, 1), max(part[1] for part in parts), count


def farthest(parts: Sequence[tuple[Array, Array, Array]], count: int) -> tuple[Array, Array, Array]:
    """Of several answers to `worst` the worst `count` different vectors, farthest first, then by row."""
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    row_H, distance_H, left_HF = (np.concatenate([part[place] for part in parts]) for place in range(3))
    order = np.lexsort((row_H, -distance_H))
    best = order[different(left_HF[order])[:count]]
    return row_H[best], distance_H[best], left_HF[best]


def different(vectors_NF: Array) -> Array:
    """Row numbers, rising, of the vectors that equal no earlier one. -0.0 equals 0.0. Equal rows are found by a key of 64 bits, since to
    sort whole rows takes as long as to cluster them; rows of one key are then compared."""
    key_N = _keys(vectors_NF)
    order = np.argsort(key_N, kind="stable")
    same = np.flatnonzero(key_N[order[1:]] == key_N[order[:-1]])
    if not np.array_equal(vectors_NF[order[same]], vectors_NF[order[same + 1]]):
        return np.sort(np.unique(vectors_NF, axis=0, return_index=True)[1])
    return np.sort(np.delete(order, same + 1))


def _keys(vectors_NF: Array) -> Array:
    factor_F = np.random.default_rng(0).integers(1, 2**63, vectors_NF.shape[1], dtype=np.uint64)
    key_N = np.empty(len(vectors_NF), dtype=np.uint64)
    for begin in range(0, len(vectors_NF), BLOCK):
        block_NF = np.ascontiguousarray(vectors_NF[begin : begin + BLOCK], dtype=np.float32) + np.float32(0)
        key_N[begin : begin + BLOCK] = block_NF.view(np.uint32).astype(np.uint64) @ factor_F
    return key_N
