"""RQ-KMeans: k-means on the vectors gives level-1 codes, k-means on what is left over gives the next level's, and so on (paper 2.2.2).

The rounds are `lloyd.py`'s, here or on Ray workers with the same outcome. Codes that no vector uses are re-seeded at the vectors that are
worst described, and the level is refined again, until all codes are used or no error is left to seed from. A level with fewer different
residuals than codes therefore ends with an exact description and some unused codes; that is stated in `Fit`. Given the same vectors,
settings and seed, the codes are the same. A share of the vectors may be held out: they get codes, and no level learns from them, so that
the error on them is that of items yet to come.

Legend: N vectors, F dimensions, L levels, V codes a level, O vectors held out.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oxyray.config import ClusterConfig
from oxyray.errors import CatalogueError
from oxyray.files import whole
from oxyray.progress import bar
from oxyray.sid.lloyd import BLOCK, Nearest, Shards, different, farthest, lloyd, shards, squares, to_grid, within

Array = np.ndarray

_POINTS_PER_CODE = 1024  # k-means trains on at most this many vectors a code; beyond that, more of them move no centroid visibly
_RESEED_ROUNDS = 8
_RESEED_ITERATIONS = 4
_LEAST_POINTS_PER_CODE = 4  # with fewer different vectors a code none is held out


@dataclass(frozen=True, eq=False)
class RQKMeans:
    """The codebook: `centroids_LVF` float32. A vector's reconstruction is the sum of its codes' centroids."""

    centroids_LVF: Array

    @property
    def levels(self) -> int:
        return int(self.centroids_LVF.shape[0])

    @property
    def width(self) -> int:
        return int(self.centroids_LVF.shape[1])

    def assign(self, vectors_NF: Array) -> Array:
        """Codes (N, L) int32 of vectors, each level the nearest centroid to the residual. Raises CatalogueError on another
        dimension or NaN."""
        residual_NF = _checked(vectors_NF).copy()
        if residual_NF.shape[1] != self.centroids_LVF.shape[2]:
            raise CatalogueError(
                f"vectors have {residual_NF.shape[1]} dimensions, the codebook {self.centroids_LVF.shape[2]}: "
                "use the encoder that the codebook was made with"
            )
        codes_NL = np.empty((len(residual_NF), self.levels), dtype=np.int32)
        for level in range(self.levels):
            codes_NL[:, level], _ = Nearest(self.centroids_LVF[level])(residual_NF)
            residual_NF -= self.centroids_LVF[level][codes_NL[:, level]]
        return codes_NL

    def reconstruct(self, codes_NL: Array) -> Array:
        """(N, F): the vectors that these codes, or their first levels, stand for."""
        vectors_NF = np.zeros((len(codes_NL), self.centroids_LVF.shape[2]), dtype=np.float32)
        for level in range(codes_NL.shape[1]):
            vectors_NF += self.centroids_LVF[level][codes_NL[:, level]]
        return vectors_NF

    def errors(self, vectors_NF: Array, codes_NL: Array) -> Array:
        """Squared distance of each vector to what its codes stand for: (N,) float64."""
        left_NF = np.asarray(vectors_NF, dtype=np.float32) - self.reconstruct(codes_NL)
        return np.einsum("nf,nf->n", left_NF, left_NF, dtype=np.float64)

    def save(self, path: Path) -> None:
        with whole(Path(path)) as part, open(part, "wb") as file:
            np.savez(file, centroids_LVF=self.centroids_LVF)

    @classmethod
    def load(cls, path: Path) -> RQKMeans:
        """Raises CatalogueError when the file is absent, damaged, or holds something else than finite centroids (L, V, F)."""
        centroids_LVF = read_arrays(path, ["centroids_LVF"])["centroids_LVF"]
        if (
            centroids_LVF.ndim != 3
            or centroids_LVF.dtype != np.float32
            or min(centroids_LVF.shape) == 0
            or not np.isfinite(centroids_LVF).all()
        ):
            raise CatalogueError(f"{path}: not finite float32 centroids (levels, codes, dimensions): run `oxyray sid` again")
        return cls(centroids_LVF)


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit gave: the codebook, the codes (N, L) of the vectors it was fitted on, and per level what a person should know.

    `unused_L`: codes that no vector has; `left_L`: what is left over after the level, as a share of the vectors' variance; `duplicates`:
    vectors that equal an earlier one (equal vectors share a SID, whatever the settings). `row_O` are the rows that were held out, and
    `left_out_L` is what is left over of them (empty without any)."""

    codebook: RQKMeans
    codes_NL: Array
    unused_L: tuple[int, ...]
    left_L: tuple[float, ...]
    duplicates: int
    row_O: Array
    left_out_L: tuple[float, ...]


def fit(
    vectors_NF: Array,
    *,
    levels: int,
    width: int,
    iterations: int = 25,
    seed: int = 7,
    balance: float | None = None,
    held_out: float = 0.0,
    workers: int = 1,
    cluster: ClusterConfig | None = None,
) -> Fit:
    """Fit `levels` codebooks of `width` codes; with `balance` no code of a level has more than that many times the mean of vectors. A share
    `held_out` of the vectors is not learned from, where that leaves enough to learn from. Raises
    CatalogueError on NaN or infinite values, all-zero vectors, and fewer different vectors than codes (level 1 could never use them all),
    RunError when the cluster is smaller than `workers`."""
    vectors_NF = _checked(vectors_NF)
    distinct = len(different(vectors_NF))
    if distinct < width:
        raise CatalogueError(
            f"{len(vectors_NF)} items have {distinct} different vectors, fewer than the {width} codes of a level: "
            f"set sid.width={power_below(distinct)} or lower"
        )
    zero = np.flatnonzero(~vectors_NF.any(axis=1))
    if len(zero):
        raise CatalogueError(
            f"{len(zero)} vectors are all zeros, the first in row {zero[0]}: such an item has nothing to be told apart by; give it a text"
        )
    codes_NL = np.empty((len(vectors_NF), levels), dtype=np.int32)
    centroids, unused, left, left_out = [], [], [], []
    mean_F = vectors_NF.mean(axis=0, dtype=np.float64)
    rest, row_O = _learned(len(vectors_NF), held_out if distinct >= _LEAST_POINTS_PER_CODE * width else 0.0, seed)
    variance, variance_out = (_spread(some_NF, mean_F) for some_NF in (vectors_NF, vectors_NF[row_O]))
    progress = bar(levels, "RQ-KMeans", "level")
    with shards(vectors_NF, workers, cluster) as held:
        for level in range(levels):
            centroids_VF, count_V = _level(held, rest, width, iterations, seed + level, balance)
            for first, code_N in (block for part in held.ask("subtract", centroids_VF) for block in part):
                codes_NL[first : first + len(code_N), level] = code_N
            centroids.append(centroids_VF)
            unused.append(int((count_V == 0).sum()))
            left.append(squares(held)[0] / variance)
            left_out += [squares(held, row_O)[0] / variance_out] if len(row_O) else []
            progress.update(1)
    progress.close()
    codebook = RQKMeans(np.stack(centroids))
    return Fit(codebook, codes_NL, tuple(unused), tuple(left), len(vectors_NF) - distinct, row_O, tuple(left_out))


def read_arrays(path: Path, names: list[str]) -> dict[str, Array]:
    """The named arrays of an npz file. Raises CatalogueError when it is absent, damaged, or lacks one; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in names}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise CatalogueError(f"{path}: not readable ({type(error).__name__}: {str(error).strip()}): run `oxyray sid` again") from error


def _learned(count: int, held_out: float, seed: int) -> tuple[Array, Array]:
    """Rows to learn from, and rows held out: both sorted."""
    out = np.sort(np.random.default_rng([seed, count]).choice(count, round(held_out * count), replace=False))
    return np.delete(np.arange(count), out), out


def _level(held: Shards, row_N: Array, width: int, iterations: int, seed: int, balance: float | None) -> tuple[Array, Array]:
    """k-means on the rows `row_N` with dead codes re-seeded: centroids (V, F) and loads (V,). All vectors have their codes then."""
    random, step = np.random.default_rng(seed), to_grid(held)
    if len(row_N) > width * _POINTS_PER_CODE:
        row_N = np.sort(random.choice(row_N, width * _POINTS_PER_CODE, replace=False))
    held.ask("train_on", row_N)
    start = random.choice(row_N, min(width, len(row_N)), replace=False)
    centroids_VF = _rows(held, np.resize(start, width))
    above = 1e-5 * max(squares(held)[0], 1e-30)
    centroids_VF = lloyd(held, centroids_VF, iterations, step, above, balance is not None)
    count_V = _assigned(held, centroids_VF)
    for _ in range(_RESEED_ROUNDS):
        dead = np.flatnonzero(count_V == 0)
        seeds_HF = farthest(held.ask("worst", len(dead), above), len(dead))[2] if len(dead) else ()
        if len(seeds_HF) == 0:
            break
        centroids_VF[dead[: len(seeds_HF)]] = seeds_HF
        centroids_VF = lloyd(held, centroids_VF, _RESEED_ITERATIONS, step, above, balance is not None)
        count_V = _assigned(held, centroids_VF)
    return centroids_VF, count_V if balance is None else within(held, centroids_VF, count_V, balance)


def _assigned(held: Shards, centroids_VF: Array) -> Array:
    return np.sum(held.ask("assign", centroids_VF), axis=0)


def _rows(held: Shards, rows: Array) -> Array:
    found = held.ask("rows", rows)
    vectors = np.concatenate([vectors for _, vectors in found])
    vectors[np.concatenate([place for place, _ in found])] = vectors.copy()
    return vectors


def _checked(vectors_NF: Array) -> Array:
    vectors_NF = np.ascontiguousarray(vectors_NF, dtype=np.float32)
    if vectors_NF.ndim != 2 or vectors_NF.shape[1] == 0:
        raise CatalogueError(f"vectors must be (items, dimensions), got shape {vectors_NF.shape}")
    sound = [np.isfinite(vectors_NF[first : first + BLOCK]).all(axis=1) for first in range(0, len(vectors_NF), BLOCK)]
    bad = np.flatnonzero(~np.concatenate([*sound, np.zeros(0, dtype=bool)]))
    if len(bad):
        raise CatalogueError(
            f"{len(bad)} vectors hold NaN or infinite values, the first in row {bad[0]}: look at that item's text and at the encoder"
        )
    return vectors_NF


def _spread(vectors_NF: Array, mean_F: Array) -> float:
    """Mean squared distance to `mean_F`, 0 of none; block by block, as the vectors may fill the memory."""
    apart = (vectors_NF[first : first + BLOCK] - mean_F for first in range(0, len(vectors_NF), BLOCK))
    return math.fsum(float((apart_NF**2).sum()) for apart_NF in apart) / max(len(vectors_NF), 1)


def power_below(count: int) -> int:
    """The largest power of two up to `count`, at least 2: a width that works."""
    return 1 << max(count.bit_length() - 1, 1)
