"""Generation speed: our search against Hugging Face's `generate` and STATIC's algorithm, all on one T5's weights, taking turns.

The requests' memory is given (decode only): 200 slots, 4 decoder layers, width 256, 8,192 codes a level, fp32. The catalogue keeps the
paper's density of the last level, some 18 children a node (Table 2: 70% of the pairs and 0.15% of the triples are in use); all first codes
are in use. Every peer's SIDs are compared with ours before anything is timed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.harness import RESULTS, Cell, Report, arguments, medians
from benchmarks.large_beams import large_beams
from benchmarks.peers_generate import CsrMask, Static, T5Steps, hugging_face, t5
from oxyray.generate.beam import beam_search
from oxyray.generate.pools import Legal
from oxyray.generate.sample import Sampling, sample
from oxyray.generate.score import Normalise
from oxyray.model.head import Tree
from oxyray.sid.prefix import PrefixIndex

SEED = 7
CHILDREN = 17.6
NAMES = ("ours, vocabulary", "ours, children", "ours, beam sampling", "STATIC, vocabulary", "HF, vocabulary", "HF, children")


class Bench:
    """One model, one catalogue, and every way to answer `requests` x `beams`."""

    def __init__(self, codes: int, items: int, slots: int, width: int) -> None:
        self.model, self.slots = t5(codes, width, seed=SEED), slots
        self.codes_IL = random_sids(items, codes)
        self.index = PrefixIndex.from_codes(self.codes_IL, codes)
        self.tree, self.static = Tree(self.index), Static(self.index)
        self.masks: dict[Normalise, CsrMask] = {
            "vocabulary": CsrMask(self.index, "vocabulary"),
            "children": CsrMask(self.index, "children"),
        }

    def ways(self, requests: int, beams: int) -> dict[str, Callable[[], object]]:
        memory_BSD = torch.randn(requests, self.slots, self.model.config.d_model, generator=torch.Generator().manual_seed(SEED))
        visible_BS = torch.ones(requests, self.slots, dtype=torch.bool)
        legal = Legal(self.tree, [None] * requests)

        def steps() -> T5Steps:
            return T5Steps(self.model, memory_BSD, visible_BS, self.tree)

        return {
            "ours, vocabulary": lambda: beam_search(steps(), legal, beams, "vocabulary"),
            "ours, children": lambda: beam_search(steps(), legal, beams),
            "ours, beam sampling": lambda: sample(steps(), legal, beams, Sampling()),
            "STATIC, vocabulary": lambda: self.static.search(steps(), beams),
            "HF, vocabulary": lambda: hugging_face(self.model, memory_BSD, visible_BS, self.masks["vocabulary"], beams),
            "HF, children": lambda: hugging_face(self.model, memory_BSD, visible_BS, self.masks["children"], beams),
        }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    quick = options.quick
    warnings.filterwarnings("ignore", message=".*a request's pool holds")
    codes, items, many, slots, width = (256, 5_000, 20_000, 20, 64) if quick else (8192, 200_000, 10_000_000, 200, 256)
    shapes = [(1, 16), (2, 8)] if quick else [(1, 256), (8, 128)]
    rounds = 2 if quick else 15
    config = {"codes": codes, "items": items, "many_items": many, "slots": slots, "width": width, "layers": 4, "rounds": rounds}
    report = Report("generate", config | {"threads": torch.get_num_threads(), "children": CHILDREN}, [SEED])
    with torch.no_grad():
        bench = Bench(codes, items, slots, width)
        for requests, beams in shapes:
            peers(report, bench, requests, beams, rounds)
        parts(report, bench, shapes, rounds)
        growth(report, bench, (1, 4) if quick else (1, 2, 4, 8, 16, 32), (4, 16) if quick else (32, 64, 128, 256, 512), rounds, quick)
        indexes(report, bench, many, codes, shapes[0], rounds)
        large_beams(report, bench.index, bench.codes_IL, quick, rounds)
    report.finish(quick)


def peers(report: Report, bench: Bench, requests: int, beams: int, rounds: int) -> None:
    ways = bench.ways(requests, beams)
    want = {normalise: sids(bench, ways[f"ours, {normalise}"]()) for normalise in ("vocabulary", "children")}
    shared = {name: overlap(sids(bench, way()), want[name.split(", ")[1]]) for name, way in ways.items() if name.split(", ")[1] in want}
    times = medians(ways, rounds, calls=2)
    ours = times["ours, vocabulary"]
    title = f"{requests} × {beams}: milliseconds a batch (medians of {rounds} turns, the second call of each)"
    report.table(
        title,
        ["way", "ms", "against ours", "same SIDs %"],
        [[name, 1e3 * times[name], times[name] / ours, 100 * shared[name] if name in shared else None] for name in NAMES],
    )
    large = beams * requests >= 512
    at, children = f"at {requests} × {beams}", times["ours, children"]
    report.claim(f"against HF {at}, both over the vocabulary", times["HF, vocabulary"] / ours, 30 if large else 20, "×")
    report.claim(f"against HF {at}, both over the children", times["HF, children"] / children, 80 if large else 50, "×")
    report.claim(f"against STATIC {at}, both over the vocabulary", times["STATIC, vocabulary"] / ours, 1.5, "×")
    report.claim(f"against STATIC {at}, ours over the children", times["STATIC, vocabulary"] / children, 2.5, "×")
    report.claim(f"beam sampling against beam search {at}: time", times["ours, beam sampling"] / children, 1.1, "×", better="lower")
    report.claim(f"same SIDs as HF and STATIC {at}", 100 * min(shared.values()), 99.9, "%")


def parts(report: Report, bench: Bench, shapes: list[tuple[int, int]], rounds: int) -> None:
    """Shares of the profiler's time under the sections of `walk`, and the encoder for the same requests beside them."""
    sections = {"start": "cross-KV, start token", "trie": "trie", "decoder": "decoder", "head": "head", "choose": "top-k"}
    rows: list[list[Cell]] = []
    for requests, beams in shapes:
        ways = bench.ways(requests, beams)
        x_BSD = torch.randn(requests, bench.slots, bench.model.config.d_model)
        encoder = medians({"encoder": partial(bench.model.encoder, inputs_embeds=x_BSD)}, rounds, warm=1)["encoder"]
        for normalise in ("vocabulary", "children"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(rounds):
                    ways[f"ours, {normalise}"]()
            spent = {event.key: event.cpu_time_total for event in profile.key_averages() if event.key.startswith("generate/")}
            rows.append(
                [f"{requests} × {beams}, {normalise}", 1e3 * encoder, *(spent[f"generate/{key}"] / 1e3 / rounds for key in sections)]
            )
    report.table("Where the time goes (milliseconds a batch, under the profiler)", ["batch", "encoder", *sections.values()], rows)


def growth(report: Report, bench: Bench, batches: tuple[int, ...], widths: tuple[int, ...], rounds: int, quick: bool) -> None:
    """Milliseconds a request, over the children."""
    ways = {(requests, beams): bench.ways(requests, beams)["ours, children"] for beams in widths for requests in batches}
    turns = max(2, rounds // 3)
    found = {size: 1e3 * medians({"ours": way}, turns, warm=1)["ours"] / size[0] for size, way in ways.items()}
    rows: list[list[Cell]] = [[f"K = {beams}", *(found[requests, beams] for requests in batches)] for beams in widths]
    report.table("Milliseconds a request, as beams and requests grow (over the children)", ["beams", *(f"B = {b}" for b in batches)], rows)
    if not quick:
        plot(found, batches, widths)


def plot(found: dict[tuple[int, int], float], batches: tuple[int, ...], widths: tuple[int, ...]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for requests in batches:
        axes.plot(widths, [found[requests, beams] for beams in widths], marker="o", label=f"B = {requests}")
    axes.set(xlabel="beams K", ylabel="milliseconds a request", xscale="log", yscale="log", xticks=widths, xticklabels=map(str, widths))
    axes.legend()
    figure.savefig(RESULTS / "generate.svg")


def indexes(report: Report, bench: Bench, items: int, codes: int, shape: tuple[int, int], rounds: int) -> None:
    """Building and size of the index, and the time of a search in the large one beside the small one."""
    codes_IL = random_sids(items, codes)
    begin = time.perf_counter()
    index = PrefixIndex.from_codes(codes_IL, codes)
    built = time.perf_counter() - begin
    del codes_IL
    requests, beams = shape
    tree = Tree(index)
    legal = Legal(tree, [None] * requests)
    memory_BSD = torch.randn(requests, bench.slots, bench.model.config.d_model, generator=torch.Generator().manual_seed(SEED))
    visible_BS = torch.ones(requests, bench.slots, dtype=torch.bool)
    times = medians(
        {
            "small": bench.ways(requests, beams)["ours, children"],
            "large": lambda: beam_search(T5Steps(bench.model, memory_BSD, visible_BS, tree), legal, beams),
        },
        rounds,
        warm=1,
    )
    static = Static(index)
    ours, tail = without_items(index), sum(t.nbytes for t in (*static.row, *static.edge))
    rows: list[list[Cell]] = [
        ["distinct SIDs", index.leaves],
        ["seconds to build", built],
        ["MB, with the items of each SID", index.nbytes() / 1e6],
        ["MB, without", ours / 1e6],
        ["MB of STATIC's (no items)", static.nbytes() / 1e6],
        ["MB of STATIC's without its dense tables", tail / 1e6],
        [f"ms of a search, {requests} × {beams}", 1e3 * times["large"]],
        [f"the same with {bench.index.leaves:,} SIDs", 1e3 * times["small"]],
    ]
    report.table(f"The index of {items:,} items", ["what", "value"], rows)
    report.claim(f"index of {items:,} items: size", index.nbytes() / 1e6, 100, "MB", better="lower")
    report.claim(f"index of {items:,} items: time to build", built, 2, "s", better="lower")
    report.claim(f"{items:,} items against {len(bench.index.leaf_items):,}: time", times["large"] / times["small"], 2, "×", better="lower")
    report.claim("STATIC's index against ours: size", static.nbytes() / ours, 3, "×")


def random_sids(items: int, codes: int) -> np.ndarray:
    """All first codes in use, some 18 last codes under each pair of the first two, uneven as clusters are."""
    random = np.random.default_rng(SEED)
    pairs = int(items / CHILDREN)
    pair_N2 = np.stack([np.arange(pairs) % codes, random.integers(0, codes, pairs)], axis=1)
    share_N = random.lognormal(sigma=0.5, size=pairs)
    pair_I = random.choice(pairs, items, p=share_N / share_N.sum())
    return np.concatenate([pair_N2[pair_I], random.integers(0, codes, (items, 1))], axis=1).astype(np.int32)


def without_items(index: PrefixIndex) -> int:
    return sum(a.nbytes for a in (*index.code, *index.first_child))


def sids(bench: Bench, found: object) -> list[set[int]]:
    """The SIDs of each request, as leaves of the index."""
    if isinstance(found, tuple):
        return [set(bench.index.leaf_of(codes_KL.numpy()).tolist()) for codes_KL in found[0]]
    leaf_BK = found.leaf_BK  # type: ignore[attr-defined]
    return [set(leaf_K[leaf_K >= 0].tolist()) for leaf_K in leaf_BK]


def overlap(one: list[set[int]], two: list[set[int]]) -> float:
    return sum(len(a & b) for a, b in zip(one, two, strict=True)) / sum(map(len, two))


if __name__ == "__main__":
    main()
