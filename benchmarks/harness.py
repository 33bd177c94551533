"""What the benchmarks share: the result file, the tables on the screen, `--quick`.

A benchmark runs its claim and the claim's peer in the same process tree, interleaved, so that both meet the same machine. It prints its
tables and writes `benchmarks/results/NAME.json`: `{name, date, commit, hardware, versions, config, seeds, claims: [{claim, value, goal,
unit, holds}], tables}`. `--quick` shows that it works, within two minutes on two cores, and writes nothing. A claim that does not hold is
written as such.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from oxyray.files import write_json
from oxyray.run import versions

RESULTS = Path(__file__).parent / "results"
Cell = str | float | int | None


@dataclass
class Report:
    """One benchmark's outcome. `claim` and `table` collect; `finish` prints and, in a full run, writes."""

    name: str
    config: dict[str, Any]
    seeds: Sequence[int]
    claims: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def claim(self, claim: str, value: float, goal: float, unit: str, better: Literal["higher", "lower"] = "higher") -> None:
        """`value` holds when it is at least (`lower`: at most) `goal`."""
        holds = value >= goal if better == "higher" else value <= goal
        self.claims.append({"claim": claim, "value": value, "goal": goal, "unit": unit, "better": better, "holds": bool(holds)})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        print(f"\n{title}\n{text(columns, rows)}", flush=True)

    def finish(self, quick: bool) -> None:
        if self.claims:
            rows = [[c["claim"], _shown(c["value"]), f"{'≥' if c['better'] == 'higher' else '≤'} {_shown(c['goal'])}", c["unit"],
                     "holds" if c["holds"] else "DOES NOT HOLD"] for c in self.claims]  # fmt: skip
            print(f"\n{text(['claim', 'value', 'goal', 'unit', ''], rows)}", flush=True)
        if quick:
            print("\n--quick: nothing is written, and nothing here is a result", flush=True)
            return
        path = RESULTS / f"{self.name}.json"
        facts = {
            "name": self.name,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(path, facts | {"config": portable(self.config), "seeds": list(self.seeds), "claims": self.claims, "tables": self.tables})
        print(f"\nwritten to {path}", flush=True)


def in_turns(
    ways: dict[str, Callable[[], Any]], rounds: int, warm: int = 0, calls: int = 1
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round of each way, and what it gave last. The ways take turns, so that all meet the same machine; `warm` rounds
    before are not counted. With several `calls` a turn only the last is timed: then no way pays for the caches and the memory that the one
    before it took. A GPU's work is waited for."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for turn in range(-warm, rounds):
        for name, way in ways.items():
            for _ in range(calls - 1):
                way()
            begin = time.perf_counter()
            given[name] = way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds, given


def medians(ways: dict[str, Callable[[], Any]], rounds: int, warm: int = 0, calls: int = 1) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in in_turns(ways, rounds, warm, calls)[0].items()}


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser with `--quick`, to which a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works; writes nothing")
    return parser


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, over seeds."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    wide = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.4f} ± {wide:.4f}" if wide else f"{mean:.4g}"


def text(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A plain table: the first column to the left, numbers to the right."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(len(column), *(len(row[k]) for row in cells), 0) if cells else len(column) for k, column in enumerate(columns)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines
    )


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """Without folders of this machine: they change no figure."""
    kept = {key: portable(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: None if isinstance(value, str) and value.startswith(("/", "~")) else value for key, value in kept.items()}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, and how busy the machine was: what a time depends on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def commit() -> str:
    """The checkout's commit, with `+` when the code differs from it; empty outside a checkout."""
    try:
        here = Path(__file__).parent
        name = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "../oxyray", "."], cwd=here, capture_output=True, text=True, timeout=20, check=True
        )
        return name + ("+" if any(not line.endswith(".json") for line in changed.stdout.splitlines()) else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _shown(value: Cell) -> str:
    if value is None:
        return "–"
    return (
        f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}" if isinstance(value, float) else str(value)
    )
