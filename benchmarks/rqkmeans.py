"""RQ-KMeans: training a codebook beside faiss's ResidualQuantizer and its Kmeans, with and without a bound on the load, and how it grows.

The vectors are unit vectors around centres whose sizes are heavy-tailed, as item vectors lie. All ways see the same vectors, run in
turns, with all threads; told are medians. Errors are mean squared distances to what the codes stand for, over the vectors' variance.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from benchmarks.harness import Cell, Report, arguments, in_turns
from oxyray.sid import rqkmeans

SEED, LEVELS, ITERATIONS, BALANCE = 7, 3, 25, 1.2
Array = np.ndarray


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    quick = options.quick
    count, width, dims, rounds = (4_000, 32, 32, 1) if quick else (100_000, 256, 256, 3)
    growth = (2_000, 4_000) if quick else (10_000, 100_000, 1_000_000)
    settings = {"vectors": count, "levels": LEVELS, "codes": width, "dims": dims, "iterations": ITERATIONS, "balance": BALANCE}
    report = Report("rqkmeans", settings | {"threads": faiss.omp_get_max_threads(), "rounds": rounds}, [SEED])
    vectors_NF = items(count, dims)
    quantisers(report, vectors_NF, width, rounds)
    one_level(report, vectors_NF, width, rounds)
    sizes(report, growth, width, dims)
    report.finish(quick)


def items(count: int, dims: int) -> Array:
    random = np.random.default_rng(SEED)
    share = random.pareto(1.2, 400) + 0.05
    centre = random.choice(400, count, p=share / share.sum())
    made = random.normal(size=(400, dims)).astype(np.float32)[centre] + 0.8 * random.normal(size=(count, dims)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def quantisers(report: Report, vectors_NF: Array, width: int, rounds: int) -> None:
    bits = width.bit_length() - 1

    def theirs() -> float:
        quantiser = faiss.ResidualQuantizer(vectors_NF.shape[1], LEVELS, bits)
        quantiser.train(vectors_NF)
        return error(vectors_NF, quantiser.decode(quantiser.compute_codes(vectors_NF)))

    def ours() -> float:
        made = rqkmeans.fit(vectors_NF, levels=LEVELS, width=width, iterations=ITERATIONS, seed=SEED)
        return error(vectors_NF, made.codebook.reconstruct(made.codes_NL))

    seconds, told = in_turns({"ours": ours, "faiss ResidualQuantizer": theirs}, rounds)
    times = {name: statistics.median(found) for name, found in seconds.items()}
    rows: list[list[Cell]] = [[name, seconds, seconds / times["ours"], 100 * told[name]] for name, seconds in times.items()]
    report.table(
        f"{len(vectors_NF):,} vectors, {LEVELS} levels of {width} codes: training and coding all",
        ["way", "s", "against ours", "error %"],
        rows,
    )
    report.claim("against faiss ResidualQuantizer: time", times["faiss ResidualQuantizer"] / times["ours"], 1.3, "×")
    report.claim("beside faiss ResidualQuantizer: error", told["ours"] / told["faiss ResidualQuantizer"], 1.0, "×", better="lower")


def one_level(report: Report, vectors_NF: Array, width: int, rounds: int) -> None:
    def theirs() -> tuple[float, float]:
        kmeans = faiss.Kmeans(vectors_NF.shape[1], width, niter=ITERATIONS, seed=SEED, max_points_per_centroid=1024)
        kmeans.train(vectors_NF)
        assert kmeans.centroids is not None
        code_N = kmeans.index.search(vectors_NF, 1)[1][:, 0]
        return error(vectors_NF, kmeans.centroids[code_N]), load(code_N, width)

    def ours(balance: float | None = None) -> tuple[float, float]:
        made = rqkmeans.fit(vectors_NF, levels=1, width=width, iterations=ITERATIONS, seed=SEED, balance=balance)
        return error(vectors_NF, made.codebook.reconstruct(made.codes_NL)), load(made.codes_NL[:, 0], width)

    ways: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "faiss Kmeans": theirs,
        f"ours, at most {BALANCE} × the mean": lambda: ours(BALANCE),
    }
    seconds, told = in_turns(ways, rounds)
    times = {name: statistics.median(found) for name, found in seconds.items()}
    rows: list[list[Cell]] = [
        [name, seconds, seconds / times["ours"], 100 * told[name][0], told[name][1]] for name, seconds in times.items()
    ]
    report.table(f"One level of {width} codes", ["way", "s", "against ours", "error %", "P90 load / mean"], rows)
    bound = list(ways)[2]
    report.claim("one level against faiss Kmeans: time", times["faiss Kmeans"] / times["ours"], 0.9, "×")
    report.claim("with a bound on the load: time", times[bound] / times["ours"], 2.0, "×", better="lower")
    report.claim("with a bound on the load: P90 load over the mean", told[bound][1], BALANCE, "×", better="lower")


def sizes(report: Report, counts: tuple[int, ...], width: int, dims: int) -> None:
    rows: list[list[Cell]] = []
    for count in counts:
        vectors_NF = items(count, dims)
        begin = time.perf_counter()
        made = rqkmeans.fit(vectors_NF, levels=LEVELS, width=width, iterations=ITERATIONS, seed=SEED)
        seconds = time.perf_counter() - begin
        rows.append([f"{count:,}", seconds, count / seconds, 100 * made.left_L[-1]])
        print(f"{count:,} vectors done", flush=True)
    report.table(
        f"Growth: {LEVELS} levels of {width} codes (k-means learns from at most 1,024 vectors a code)",
        ["vectors", "s", "vectors/s", "error %"],
        rows,
    )


def error(vectors_NF: Array, coded_NF: Array) -> float:
    return float(np.square(vectors_NF - coded_NF).sum() / np.square(vectors_NF - vectors_NF.mean(axis=0)).sum())


def load(code_N: Array, width: int) -> float:
    return float(np.percentile(np.bincount(code_N, minlength=width), 90) / (len(code_N) / width))


if __name__ == "__main__":
    main()
