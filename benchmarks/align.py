"""Alignment: where a step's time goes, what it gains to generate while learning, how generation grows with rollout workers, and what a step
takes whose rollouts come from Hugging Face's `generate`.

The first three are read from `metrics.jsonl` of real runs of the stage on Ray: the embedded shop, a policy and a ranker trained for a few
steps (how good they are is of no interest here), one thread a process. The ways to run take turns, a whole run each; the first steps of a
run, which warm up, and its last, which has nothing to generate ahead, are left out.

The last is one process with one thread. In every turn a step is done for real: publish, generate, judge, learn. Beside it the same number
of candidates, for as many requests with pasts as long, is generated from a T5 of the policy's width, layers and catalogue: by our search
and by Hugging Face's `generate`. A step by one of these ways is the real step's publication, judging and learning with that way's
generation; the encoder, and the candidates' log-probabilities for the learner, are left out of all of them alike. It is done for the size
of the runs above, for large beams there, and for large beams at the paper's density of codes: a random shop of 200,000 items and 8,192
codes a level, a policy of width 256 and 4 + 4 layers that reads 500 events of its users.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_shop
from benchmarks.harness import Cell, Report, arguments
from benchmarks.pretrain import run as spawned
from oxyray.align.stage import align
from oxyray.cli.compose import check, compose_config
from oxyray.cluster.start import ray_for
from oxyray.config import AlignConfig, Config, from_dict, to_dict
from oxyray.pipeline import STAGES, run_all
from oxyray.run import Run

SEED, WARM = 7, 2
PARTS = ("data", "sparse", "forward", "backward", "optimizer")
SYNCHRONOUS, AHEAD = "waits for the one before", "one off"
Lines = list[dict[str, Any]]

SHORT = ("train.eval_requests=20", "align.eval_requests=20", "rank.eval_requests=50", "rank.eval_items=2000", "rank.baselines=[]",
         "align.threads_per_process=1", "align.eval_every_steps=1000", "align.save_every_steps=1000")  # fmt: skip
QUICK = ("data.mall.size=tiny", "model=tiny", "sid.iterations=5", "train.max_steps=2", "train.targets_per_step=200", "rank.max_steps=2",
         "rank.items_per_step=500", "align.steps=6", "align.requests_per_step=16", "align.pieces=2", "align.group=8",
         "align.supervised_targets=300")  # fmt: skip
FULL = ("data.mall.size=small", "train.max_steps=10", "rank.max_steps=10", "align.steps=16", "align.requests_per_step=64",
        "align.pieces=4", "align.group=16", "align.supervised_targets=128")  # fmt: skip
WIDE: dict[str, Any] = {"requests_per_step": 16, "group": 256}  # large beams, as the paper's
PAPER = ("model=medium", "model.head=codes", "model.hidden=1024", "model.history=500", "model.text_input=false", "train.max_steps=2",
         "train.targets_per_step=128", "rank.model.text_input=false", "rank.max_steps=2", "rank.items_per_step=500", "sid.iterations=3",
         "align.requests_per_step=16", "align.pieces=4", "align.group=256", "align.supervised_targets=128")  # fmt: skip
QUICK_PAPER = (*PAPER, "model=tiny", "model.hidden=64", "model.history=20", "align.requests_per_step=4", "align.group=16")
WIDE_QUICK: dict[str, Any] = {"requests_per_step": 4, "group": 16}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    quick = options.quick
    rounds, workers = (1, (1, 2)) if quick else (2, (1, 2, 4))
    with tempfile.TemporaryDirectory(prefix="oxyray-bench-") as folder:
        places = (f"run_dir={folder}/run", f"sid.cache_dir={folder}/vectors", f"seed={SEED}")
        config = compose_config(check(["data=mall", *places, *SHORT, *(QUICK if quick else FULL)]))
        report = Report("align", to_dict(config) | {"rounds": rounds, "rollout workers": workers}, [SEED])
        with ray_for(config.cluster, 2 + max(workers)):
            with contextlib.redirect_stdout(io.StringIO()):
                run_all(config, [stage for stage in STAGES if stage.name in ("prepare", "fuse", "sid", "pretrain", "rank")])
            print("policy and ranker are there", flush=True)
            found = in_turns(config, rounds, workers)
            paper = paper_like(Path(folder), quick)
        where_the_time_goes(report, found[SYNCHRONOUS])
        one_step_off(report, found)
        more_workers(report, found, config.align.requests_per_step, workers)
        wide = dataclasses.replace(config, align=dataclasses.replace(config.align, **(WIDE_QUICK if quick else WIDE)))
        sizes = (
            ("", config, 8),
            ("", wide, 4),
            (f", the paper's codes, {paper.model.history} events", paper, 2),
        )
        for title, sized, turns in sizes:
            [steps] = spawned(1, 1, parts_of_steps, to_dict(sized), folder, 2 if quick else turns)
            beside_hugging_face(report, steps, sized.align, title)
    report.finish(quick)


def paper_like(folder: Path, quick: bool) -> Config:
    """A random shop of the paper's density, with a policy and a ranker of a few steps."""
    items, codes, users, events = (2_000, 32, 60, 20) if quick else (200_000, 8192, 300, 600)
    words = random_shop.write(folder / "random", items, codes, users, events, SEED)
    config = compose_config(check([*words, f"run_dir={folder}/paper", f"seed={SEED}", *SHORT, *(QUICK_PAPER if quick else PAPER)]))
    with contextlib.redirect_stdout(io.StringIO()):
        run_all(config, [stage for stage in STAGES if stage.name in ("prepare", "fuse", "sid", "pretrain", "rank")])
    return config


def in_turns(config: Config, rounds: int, workers: tuple[int, ...]) -> dict[str, Lines]:
    """The timed steps of every way to run."""
    ways: dict[str, dict[str, Any]] = {SYNCHRONOUS: {"staleness": 0}, AHEAD: {"staleness": 1}}
    ways |= {_crowd(count): {"staleness": 0, "rollouts": count} for count in workers if count > 1}
    found: dict[str, Lines] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, settings in ways.items():
            found[name] += steps_of_a_run(config, settings)
        print(f"round {turn + 1} of {rounds} done", flush=True)
    return found


def steps_of_a_run(config: Config, settings: dict[str, Any]) -> Lines:
    """Align anew with these settings; what `metrics.jsonl` says of the steps between the first and the last."""
    run = Run(config.run_dir)
    before = len(run.metrics("align"))
    with contextlib.redirect_stdout(io.StringIO()):
        align(dataclasses.replace(config, force=True, align=dataclasses.replace(config.align, **settings)), run)
    return [line for line in run.metrics("align")[before:] if "loss" in line][WARM:-1]


def where_the_time_goes(report: Report, steps: Lines) -> None:
    whole = _total(steps, "step_seconds")
    parts = ("generate", "judge", "learn", "publish")

    def row(title: str, of: str, less: Iterable[str] = ()) -> list[Cell]:
        each = [step[of] - sum(step[f"seconds/{name}"] for name in less) for step in steps]
        return [title, 1e3 * statistics.median(each), 100 * sum(each) / whole]

    rows = [row(name, f"seconds/{name}") for name in parts[:3]]
    rows += [row(f"learn: {name}", f"seconds/{name}") for name in PARTS]
    rows += [row("learn: batches, messages", "seconds/learn", PARTS), row("publish", "seconds/publish")]
    rows += [row("the rest", "step_seconds", parts), row("a step", "step_seconds")]
    report.table(f"Where the time of a step goes that {SYNCHRONOUS} ({len(steps)} steps)", ["part", "ms (median)", "% of the step"], rows)
    report.claim("publication's share of a step", 100 * _total(steps, "seconds/publish") / whole, 5, "%", better="lower")


def one_step_off(report: Report, found: dict[str, Lines]) -> None:
    """What overlaps is generation with judging on one side and learning on the other; the shorter of them is what can be gained."""
    waits = found[SYNCHRONOUS]
    generating = _median(step["seconds/generate"] + step["seconds/judge"] for step in waits)
    learning = _median(step["seconds/learn"] for step in waits)
    step = {name: _median(line["step_seconds"] for line in found[name]) for name in (SYNCHRONOUS, AHEAD)}
    least = step[SYNCHRONOUS] - min(generating, learning)
    rows: list[list[Cell]] = [
        [f"a step that {SYNCHRONOUS}", 1e3 * step[SYNCHRONOUS], 1.0],
        ["of it generating and judging", 1e3 * generating, None],
        ["of it learning", 1e3 * learning, None],
        ["were the shorter of these two free", 1e3 * least, step[SYNCHRONOUS] / least],
        [f"a step {AHEAD}", 1e3 * step[AHEAD], step[SYNCHRONOUS] / step[AHEAD]],
    ]
    report.table("Generating while learning (medians)", ["what", "ms", "times as fast"], rows)
    report.claim("one step off against synchronous: steps a second", step[SYNCHRONOUS] / step[AHEAD], 1.4, "×")


def more_workers(report: Report, found: dict[str, Lines], requests: int, workers: tuple[int, ...]) -> None:
    names = {count: SYNCHRONOUS if count == 1 else _crowd(count) for count in workers}
    rate = {count: requests / _median(step["seconds/generate"] for step in found[name]) for count, name in names.items()}
    rows: list[list[Cell]] = [[str(count), value, value / rate[1]] for count, value in rate.items()]
    report.table("Rollout workers: requests a second of generation (medians)", ["workers", "requests/s", "against one"], rows)
    report.claim("2 rollout workers against 1: requests a second", rate[2] / rate[1], 1.6, "×")


def parts_of_steps(settings: dict[str, Any], folder: str, turns: int) -> dict[str, list[float]]:
    """Seconds of each part of each step, and of each other way to generate its candidates; in a process group of one."""
    from oxyray.align.judge import Judge
    from oxyray.align.learner import Learner
    from oxyray.align.rollout import Rollout

    config = from_dict(Config, settings)
    tables, pieces = Path(folder) / "tables", range(config.align.pieces)
    learner = Learner(config, config.align, tables, Path(folder) / "checkpoints", 0, 1)
    rollout, judge = Rollout(config, config.align), Judge(config, config.align)
    peers = Peers(rollout, config)
    seconds: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        taken: dict[str, float] = {}
        began = time.perf_counter()

        def lap(name: str, taken: dict[str, float] = taken) -> None:
            nonlocal began
            now = time.perf_counter()
            taken[name], began = now - began, now

        step = learner.step
        rollout.load(step, learner.publish(step), tables)
        lap("publish")
        rolled = [rollout.generate(step, piece) for piece in pieces]
        lap("generate")
        judged = [judge.judge(piece)[0] for piece in rolled]
        lap("judge")
        learner.learn(list(zip(rolled, judged, strict=True)))
        lap("learn")
        for name, way in peers.ways(step).items():
            began = time.perf_counter()
            way()
            lap(name)
        for name, value in taken.items() if turn else ():  # the first turn warms up
            seconds.setdefault(name, []).append(value)
    learner.close()
    return seconds


class Peers:
    """Ways to generate a step's candidates from one T5: requests, candidates, catalogue and lengths of the pasts are the step's own."""

    def __init__(self, rollout: Any, config: Config) -> None:
        from benchmarks.peers_generate import CsrMask, PrefixFunction, t5

        self.rollout, self.model, self.group = rollout, config.model, config.align.group
        self.index, self.tree = rollout.inputs.catalog.index, rollout.policy.tree
        self.mask, self.function = CsrMask(self.index, "children"), PrefixFunction(self.index)
        self.t5 = t5(self.index.width, self.model.width, self.model.decoder_layers, self.model.heads, SEED)

    def ways(self, step: int) -> dict[str, Callable[[], object]]:
        from benchmarks.peers_generate import CsrMask, PrefixFunction, T5Steps, hugging_face, hugging_face_draws
        from oxyray.generate.beam import beam_search
        from oxyray.generate.pools import Legal
        from oxyray.generate.sample import sample

        given = [self._encoded(batch) for batch in self.rollout.requests.at(step)]
        legal = [Legal(self.tree, [None] * len(memory_BSD)) for memory_BSD, _ in given]

        def ours(search: Callable[..., object]) -> None:
            for (memory_BSD, visible_BS), rules in zip(given, legal, strict=True):
                search(T5Steps(self.t5, memory_BSD, visible_BS, self.tree), rules, self.group)

        def theirs(search: Callable[..., object], rule: CsrMask | PrefixFunction) -> None:
            for memory_BSD, visible_BS in given:
                search(self.t5, memory_BSD, visible_BS, rule, self.group)

        return {
            "our draws, T5": partial(ours, sample),
            "our beams, T5": partial(ours, beam_search),
            "HF draws, vectorised mask": partial(theirs, hugging_face_draws, self.mask),
            "HF beams, vectorised mask": partial(theirs, hugging_face, self.mask),
            "HF draws, prefix function": partial(theirs, hugging_face_draws, self.function),
            "HF beams, prefix function": partial(theirs, hugging_face, self.function),
        }

    def _encoded(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Random encoder output: a slot for each event of the past and one for the profile."""
        slots_B = torch.diff(batch.history_offset) + 1
        visible_BS = torch.arange(int(slots_B.max())) < slots_B[:, None]
        return torch.randn(*visible_BS.shape, self.model.width, generator=torch.Generator().manual_seed(SEED)), visible_BS


def beside_hugging_face(report: Report, seconds: dict[str, list[float]], settings: AlignConfig, about: str) -> None:
    """Each turn's step by each way: its other parts, and that way's generation."""
    others = [sum(parts) for parts in zip(*(seconds[name] for name in ("publish", "judge", "learn")), strict=True)]
    ways = [name for name in seconds if name not in ("publish", "judge", "learn")]
    alone = {name: statistics.median(seconds[name]) for name in ways}
    step = {name: _median(a + b for a, b in zip(seconds[name], others, strict=True)) for name in ways}
    ours = "our draws, T5"
    rows: list[list[Cell]] = [
        ["the stage's rollout, all of it" if name == "generate" else name, 1e3 * alone[name], alone[name] / alone[ours], 1e3 * step[name],
         step[name] / step[ours]]
        for name in ways
    ]  # fmt: skip
    columns = ["candidates from", "generation, ms", f"against {ours}", "the step, ms", f"against {ours}"]
    size = f"{settings.requests_per_step} requests × {settings.group} candidates{about}"
    report.table(f"A step of {size} in one process, by who generates (medians of {len(others)} steps)", columns, rows)
    for kind in ("vectorised mask", "prefix function"):
        for what in ("draws", "beams"):
            title = f"a step of {size} with HF's {what} by a {kind} against one with ours: time"
            report.claim(title, step[f"HF {what}, {kind}"] / step[f"our {what}, T5"], 10, "×")


def _crowd(count: int) -> str:
    return f"{count} rollout workers"


def _total(steps: Lines, name: str) -> float:
    return float(sum(step[name] for step in steps))


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


if __name__ == "__main__":
    main()
