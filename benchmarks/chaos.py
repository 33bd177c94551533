"""A soak: the alignment of a small shop, run again and again on a real Ray while its processes are killed at random.

An undisturbed run says what is to be learned. Then each run has a seed, which draws when a process is killed (SIGKILL, seconds after the
one before) and of which role. A run is *finished* when it ended well, has *lost* the steps that it does not tell of, and *differs* when a
step's loss is not that of the undisturbed run (2 learners add up in a fixed order, so the same numbers are expected to the last bit).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness import Cell, Report, arguments
from oxyray.align.stage import align
from oxyray.cli.compose import check, compose_config
from oxyray.cluster.start import ray_for
from oxyray.config import Config, to_dict
from oxyray.errors import OxyrayError
from oxyray.pipeline import STAGES, run_all
from oxyray.run import Run
from tests.chaos.victims import ROLES, processes

WORDS = ("data=mall", "debug=fast", "rank.baselines=[]", "align.candidates=distinct", "align.learners=2", "align.rollouts=2",
         "align.judges=2", "align.staleness=0", "align.save_every_steps=3", "align.eval_every_steps=10", "align.max_restarts=100",
         "align.timeout_s=120")  # fmt: skip
LONGEST_S = 2.5  # between two kills


class Killer(threading.Thread):
    """Kills until told to stop, or until it has killed `most`."""

    def __init__(self, seed: int, most: int) -> None:
        super().__init__(daemon=True)
        self.random, self.most, self.killed, self.over = random.Random(seed), most, Counter[str](), threading.Event()

    def run(self) -> None:
        while self.killed.total() < self.most and not self.over.wait(self.random.uniform(0.1, LONGEST_S)):
            role = self.random.choice(sorted(ROLES))
            if found := processes(role):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(found), signal.SIGKILL)
                    self.killed[role] += 1


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=4, help="the most in one run")
    options = parser.parse_args()
    runs, steps = (1, 8) if options.quick else (options.runs, 30)
    with tempfile.TemporaryDirectory(prefix="oxyray-bench-") as folder:
        words = [*WORDS, f"align.steps={steps}", f"run_dir={folder}/run", f"sid.cache_dir={folder}/vectors", "cluster.object_store_gb=0.2"]
        config = compose_config(check(words))
        report = Report("chaos", to_dict(config) | {"kills": options.kills}, list(range(runs)))
        with ray_for(config.cluster, config.processes):
            with contextlib.redirect_stdout(io.StringIO()):
                run_all(config, [stage for stage in STAGES if stage.name in ("prepare", "fuse", "sid", "pretrain", "rank")])
                calm, _, _ = once(config, Path(folder) / "calm", None)
            rows = [soaked(config, Path(folder) / str(seed), Killer(seed, options.kills), calm) for seed in range(runs)]
    columns = ["run", "killed", "restarts", "seconds", "finished", "steps lost", "steps differing", "worst difference", "said"]
    report.table(f"{runs} runs of {steps} steps, processes killed at random", columns, [[n, *row] for n, row in enumerate(rows)])
    report.claim("runs finished", sum(row[3] == "yes" for row in rows) / runs, 1.0, "share")
    report.claim("steps lost", float(sum(int(row[4] or 0) for row in rows)), 0.0, "steps", better="lower")
    report.claim("steps differing", float(sum(int(row[5] or 0) for row in rows)), 0.0, "steps", better="lower")
    report.finish(options.quick)


def soaked(config: Config, folder: Path, killer: Killer, calm: dict[int, float]) -> list[Cell]:
    """A row of the table."""
    with contextlib.redirect_stdout(io.StringIO()):
        losses, seconds, said = once(config, folder, killer)
    killed = ", ".join(f"{count} {role}" for role, count in sorted(killer.killed.items())) or "none"
    restarts = max((int(line.get("restarts/learners", 0)) for line in Run(folder).metrics("align")), default=0)
    gaps = [abs(losses[step] - value) / abs(value) for step, value in calm.items() if step in losses]
    shutil.rmtree(folder)
    print(f"killed {killed}: {len(losses)} of {len(calm)} steps in {seconds:.0f} s {said}", flush=True)
    return [killed, restarts, round(seconds, 1), "no" if said else "yes", len(calm.keys() - losses.keys()), sum(gap > 0 for gap in gaps),
            max(gaps, default=None), said]  # fmt: skip


def once(config: Config, folder: Path, killer: Killer | None) -> tuple[dict[int, float], float, str]:
    """Align in a folder of its own: the loss of each step, seconds, and why it ended if it ended badly."""
    shutil.copytree(config.run_dir, folder, ignore=shutil.ignore_patterns("align", "metrics.jsonl"))
    run, began, said = Run(folder), time.monotonic(), ""
    if killer:
        killer.start()
    try:
        align(dataclasses.replace(config, run_dir=str(folder)), run)
    except OxyrayError as error:
        said = str(error)
    finally:
        if killer:
            killer.over.set()
            killer.join()
    return {line["step"]: line["loss"] for line in run.metrics("align") if "loss" in line}, time.monotonic() - began, said


if __name__ == "__main__":
    main()
