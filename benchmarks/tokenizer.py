"""Item encoding: texts a second through the text encoder, items a second through the item encoder, pairs a second in its training, with one
worker and with two; and Swing, which finds the pairs, on a million events.

Items are the embedded shop's, texts and pictures. The text encoder's peer is the plain loop that a person writes first: the same model on
batches in the order of the items. All ways take turns; told are medians. Times of two workers begin when Ray is up and include the start of
the workers, as a stage's do. Swing's events are drawn: lengths of users and popularity of items are heavy-tailed, as in a shop's log.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Cell, Report, arguments, medians
from oxyray.cli.compose import check, compose_config
from oxyray.cluster.start import one_ray
from oxyray.config import Config, FusionConfig, SidConfig
from oxyray.data.prepared import Prepared
from oxyray.pipeline import STAGES, borrow, run_all
from oxyray.run import Run
from oxyray.sid.encoder import TEXT_COLUMNS, TextEncoder, encode, encoder_folder, item_texts
from oxyray.sid.fusion import Fusion, ItemTokens
from oxyray.sid.pictures import pixels
from oxyray.sid.swing import swing, taken_by

SEED = 7


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    quick = options.quick
    size, steps, rounds = ("tiny", 8, 1) if quick else ("small", 60, 3)
    with tempfile.TemporaryDirectory(prefix="oxyray-bench-") as folder, one_ray(2):
        words = ["data=mall", f"data.mall.size={size}", "sid=fused", f"sid.cache_dir={folder}/cache"]
        words += ["fuse=sources", "fuse.pictures=small", f"fuse.max_steps={steps}", "fuse.eval_requests=0"]
        config = compose_config(check([*words, f"run_dir={folder}/1"]))
        stages("prepare", config)
        table = Prepared.load(Run(config.run_dir).path("data")).item_columns("item_id", *TEXT_COLUMNS, "image")
        texts = item_texts(table)
        about = {"items": len(texts), "rounds": rounds, "threads": torch.get_num_threads(), "encoder": config.sid.encoder}
        report = Report("tokenizer", about | {"fusion": vars(config.fuse.model)}, [SEED])
        show_texts(report, texts, Path(folder), rounds)
        show_items(report, table["image"].to_pylist(), rounds)
        show_training(report, config, words, Path(folder))
        show_swing(report, 20_000 if quick else 1_000_000)
    report.finish(quick)


def stages(last: str, config: Config) -> None:
    run_all(config, [stage for stage in STAGES if stage.name in ("prepare", last)])


def show_texts(report: Report, texts: list[str], folder: Path, rounds: int) -> None:
    plain = TextEncoder(encoder_folder("minilm"))
    turn = iter(range(10_000))

    def ours(workers: int) -> Callable[[], object]:
        return lambda: encode(texts, SidConfig(workers=workers, cache_dir=str(folder / f"cache-{next(turn)}")))

    def theirs() -> object:
        return [plain.encode(texts[first : first + 64]) for first in range(0, len(texts), 64)]

    seconds = medians({"1 worker": ours(1), "2 workers on Ray Data": ours(2), "plain loop": theirs}, rounds)
    rows: list[list[Cell]] = [[way, len(texts) / value, value, seconds["plain loop"] / value] for way, value in seconds.items()]
    report.table("Texts through the text encoder (nothing cached)", ["way", "texts/s", "s", "against the plain loop"], rows)
    report.claim("text encoding, 1 worker against the plain loop: texts per second", seconds["plain loop"] / seconds["1 worker"], 1.0, "×")


def show_items(report: Report, images: list[bytes | None], rounds: int) -> None:
    """Untrained weights, which take as long as trained ones."""
    count, random = len(images), np.random.default_rng(SEED)
    text_IF = random.standard_normal((count, 384)).astype(np.float32)
    small, seen_I = pixels(images, 32)
    patch_IPG = random.standard_normal((count, 5, 768)).astype(np.float32)
    forms = {
        "text": (Fusion(FusionConfig(), 384, 0, False), ItemTokens(text_IF)),
        "text and pixels": (Fusion(FusionConfig(), 384, 0, True), ItemTokens(text_IF, small, seen_I)),
        "text and patches of a vision model": (Fusion(FusionConfig(), 384, 768, False), ItemTokens(text_IF, patch_IPG, seen_I)),
    }

    def through(fusion: Fusion, tokens: ItemTokens) -> Callable[[], object]:
        return lambda: fusion.eval().vectors(tokens)

    seconds = medians({name: through(*form) for name, form in forms.items()}, rounds)
    report.table("Items through the item encoder", ["reads", "items/s"], [[name, count / value] for name, value in seconds.items()])


def show_training(report: Report, config: Config, words: list[str], folder: Path) -> None:
    """The stage for real, from the same prepared shop: medians over the steps after the first five."""
    rows: list[list[Cell]] = []
    speed: dict[int, float] = {}
    for workers in (1, 2):
        made = compose_config(check([*words, f"fuse.workers={workers}", "fuse.threads_per_worker=1", f"run_dir={folder}/{workers}"]))
        if workers > 1:
            borrow(Run(config.run_dir), Run(made.run_dir), made, "prepare")
        stages("fuse", made)
        steps = [line for line in Run(made.run_dir).metrics("fuse") if "loss" in line][5:]
        speed[workers] = statistics.median(line["pairs_per_second"] for line in steps)
        rows.append([str(workers), speed[workers]])
    report.table("Training of the item encoder, one thread a worker", ["workers", "pairs/s"], rows)
    report.claim("item encoder's training, 2 workers against 1: pairs per second", speed[2] / speed[1], 1.5, "×")


def show_swing(report: Report, events: int) -> None:
    random, users, items = np.random.default_rng(SEED), events // 20, events // 50
    length_U = np.minimum(random.lognormal(2.5, 1.0, users).astype(np.int64) + 1, 1_000)
    user_N = np.repeat(np.arange(users), length_U)[:events]
    chance_I = 1 / np.arange(1, items + 1) ** 0.8
    taken_UI = taken_by([(user_N, random.choice(items, len(user_N), p=chance_I / chance_I.sum()))], items)
    seconds: dict[int, float] = {}
    for workers in (1, 2):
        began = time.perf_counter()
        swing(taken_UI, 20, workers)
        seconds[workers] = time.perf_counter() - began
    rows: list[list[Cell]] = [[str(workers), value / 60, len(user_N) / value] for workers, value in seconds.items()]
    most = int(np.diff(taken_UI.tocsc().indptr).max())
    title = f"Swing on {len(user_N):,} events of {users:,} users, {items:,} items, the most popular taken by {most:,}"
    report.table(title, ["workers", "minutes", "events/s"], rows)
    report.claim(f"Swing on {len(user_N):,} events, 2 workers: time", seconds[2] / 60, 5, "minutes", better="lower")


if __name__ == "__main__":
    main()
