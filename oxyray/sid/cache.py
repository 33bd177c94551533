"""Vectors kept by content: the same text or picture under the same encoder is encoded once on a machine, whatever run asks for it.

One folder an encoder identity, in it one folder a write (`keys.npy`, `vectors.npy`), made beside and renamed when whole. Nothing is ever
changed in place, so any number of processes may read and write at once; two that encode the same text merely store it twice. A write that
is damaged is named and passed over: its texts are encoded again.

Legend: N texts or pictures, F dimensions.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oxyray.files import whole

Array = np.ndarray

_log = logging.getLogger(__name__)


def content_keys(contents: Sequence[str | bytes]) -> Array:
    """(N, 2) uint64: 128 bits of the hash of each text or picture."""
    held = (each.encode(errors="surrogatepass") if isinstance(each, str) else each for each in contents)
    joined = b"".join(hashlib.blake2b(each, digest_size=16).digest() for each in held)
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)


class VectorCache:
    """`get` what is known, `put` what was missing. `identity` names the encoder (its content, not its path)."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder = Path(folder).expanduser() / identity

    def get(self, keys_N2: Array, dim: int) -> tuple[Array, Array]:
        """Vectors (N, dim) float32, with zeros where unknown, and which are known (N,) bool."""
        vectors_NF = np.zeros((len(keys_N2), dim), dtype=np.float32)
        known_N = np.zeros(len(keys_N2), dtype=bool)
        for part in sorted(self.folder.glob("part-*")) if len(keys_N2) else []:
            held = _read(part, dim)
            if held is None:
                continue
            held_keys, held_vectors = held
            missing = np.flatnonzero(~known_N)
            place, found = _find(held_keys, keys_N2[missing])
            vectors_NF[missing[found]] = held_vectors[place[found]]
            known_N[missing[found]] = True
            if known_N.all():
                break
        return vectors_NF, known_N

    def put(self, keys_N2: Array, vectors_NF: Array) -> None:
        """Store vectors (N, F) float32 as one whole write."""
        order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))
        with whole(self.folder / f"part-{uuid.uuid4().hex}") as folder:
            folder.mkdir(parents=True)
            np.save(folder / "keys.npy", keys_N2[order])
            np.save(folder / "vectors.npy", vectors_NF[order].astype(np.float32))


def _read(part: Path, dim: int) -> tuple[Array, Array] | None:
    """Keys, sorted, and vectors (a memory map); None where the write is damaged or from something else."""
    try:
        keys_M2 = np.load(part / "keys.npy", allow_pickle=False)
        vectors_MF = np.load(part / "vectors.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s is damaged (%s): its texts are encoded again; delete it to silence this", part, error)
        return None
    if (
        keys_M2.shape != (len(vectors_MF), 2)
        or keys_M2.dtype != np.uint64
        or vectors_MF.shape[1:] != (dim,)
        or vectors_MF.dtype != np.float32
    ):
        _log.warning("%s does not hold keys with vectors of %d dimensions: passed over", part, dim)
        return None
    return keys_M2, vectors_MF


def _find(held_M2: Array, want_N2: Array) -> tuple[Array, Array]:
    """Where each wanted key stands among the sorted held ones (N,), and whether it does (N,).

    The search is by the first 64 bits. Two held keys that agree in them and not in the rest (never seen) cost one text its place in the
    cache."""
    if len(held_M2) == 0:
        return np.zeros(len(want_N2), dtype=np.int64), np.zeros(len(want_N2), dtype=bool)
    place_N = np.minimum(np.searchsorted(held_M2[:, 0], want_N2[:, 0]), len(held_M2) - 1)
    return place_N, (held_M2[place_N] == want_N2).all(axis=1)
