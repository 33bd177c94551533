"""`oxyray ablate TABLE`: the variants of one of the paper's tables, each with several seeds, by Hydra multirun.

The variants are the choices `ablation=TABLE_*`: `conf/ablation/` says what each changes. Data and semantic IDs are made once, in the base
run (for the tables of `CODES`, which compare them, once a variant); every job pre-trains a policy and measures it on the test split, its
lists in no ranker's order. What is finished is kept, so the same command goes on where it was stopped, and a policy that is a row of
several tables is trained once. Below `RUN/ablation/TABLE` lie the jobs and the table as Markdown, JSON and a picture.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from oxyray import pipeline
from oxyray.cli.compose import check, choices, compose_config
from oxyray.cli.sweep import sweep
from oxyray.cluster.start import one_ray
from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.errors import RunError
from oxyray.evaluate.table import entry
from oxyray.files import read_json, write_json
from oxyray.run import Run

TABLES = {
    "tokenizer": "what semantic IDs are made of (paper, Table 2)",
    "sources": "what semantic IDs learn from, beside texts (paper 4.2)",
    "position": "where the instruction stands (paper, Table 5)",
    "composition": "what the instruction holds (paper, Table 6)",
    "retrieval": "query-to-item alignment and instruction-guided retrieval (paper, Table 7)",
    "unified": "one model for all scenarios beside one for each (paper, Table 8)",
    "masked": "requests of one model asked without a part of their instruction (paper, Table 9)",
    "missing": "texts that fail to come in serving, beside a policy that never had any (paper 2.3.2)",
    "scaling": "the size of the policy (paper, Tables 3 and 4)",
}
CODES = ("tokenizer", "sources")  # tables that compare semantic IDs: each variant has its own
SEEDS = "1,2,3"
LOWER = ("load p75", "load p90", "left", "held out")  # metrics that are the better the lower they are
METRICS = ("HR@1", "HR@10", "NDCG@10")
Results = dict[str, Any]  # a run's evaluate/metrics.json


@dataclass(frozen=True)
class Row:
    """One variant: its metrics by name, a value for each seed."""

    name: str
    values: dict[str, list[float]]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric])

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds; 0 for one."""
        return statistics.stdev(self.values[metric]) if len(self.values[metric]) > 1 else 0.0


def ablate(table: str, overrides: Sequence[str], config_dir: Path | None = None, dry_run: bool = False) -> int:
    """Run what is missing of the table, write and print it; gives the exit code, 0 when every job went well. `ablation=a,b` and
    `train.seed=1,2` among the overrides choose fewer variants and other seeds."""
    asked = [word for word in overrides if word.startswith(("ablation=", "train.seed="))]
    shared = [word for word in overrides if word not in asked]
    config = compose_config(check([word for word in shared if not word.startswith("hydra")], config_dir=config_dir))
    folder = Run(config.run_dir).folder.absolute() / "ablation" / table
    if not dry_run:
        pipeline.run_all(config, [stage for stage in pipeline.STAGES if stage.name in ("prepare", "fuse", "sid")])
    axes = {"ablation": _variants(table, config, config_dir), "train.seed": SEEDS} | dict(word.split("=", 1) for word in asked)
    policy_alone = ["evaluate.baselines=[]", "generate.ranker=0"]
    words = [*shared, *policy_alone, *(f"{key}={values}" for key, values in axes.items()), f"hydra.sweep.dir={folder}"]
    swept = check(words, sweep=True, config_dir=config_dir)
    if dry_run:
        return sweep("prepare", swept, dry_run)
    shares = "hydra/launcher=ray" not in shared  # jobs one after the other; else the launcher has a Ray of its own
    with one_ray(config.processes) if shares else nullcontext():
        stages = ("fuse", "sid", "pretrain", "evaluate") if table in CODES else ("pretrain", "evaluate")
        failed = max([sweep(stage, swept, used=False) for stage in stages])  # of a row that is the base's own policy, not as it was aligned
    variants = axes["ablation"].split(",")
    rows = collected(folder, table, variants)
    (folder / "table.md").write_text(markdown(table, rows))
    (folder / "table.svg").write_text(picture(rows))
    write_json(
        folder / "table.json", {"table": table, "about": TABLES[table], "data": config.data.name, "rows": [vars(row) for row in rows]}
    )
    print(f"\n{markdown(table, rows)}\n{folder / 'table.md'}, with table.json and table.svg beside it")
    return failed


def _variants(table: str, config: Config, config_dir: Path | None) -> str:
    """The table's choices of `ablation`; of those that are named after a scenario, the ones that the data has, once it is prepared."""
    names, data = [name for name in choices(config_dir)["ablation"] if name.startswith(f"{table}_")], Run(config.run_dir).path("data")
    if table == "unified" and data.exists():
        known = [f"unified_{name}" for name in ("all", *Prepared.load(data).meta.scenarios)]
        names = [name for name in names if name in known]
    return ",".join(names)


def collected(folder: Path, table: str, variants: Sequence[str]) -> list[Row]:
    """What the jobs below `folder` measured, in the order of `variants`; those that failed are left out. Raises RunError without any."""
    found: dict[str, list[Results]] = {name.removeprefix(f"{table}_"): [] for name in variants}
    quality: dict[str, list[Results]] = {name: [] for name in found}
    for job in json.loads((folder / "sweep.json").read_text()):
        results = Path(job["folder"]) / "evaluate" / "metrics.json"
        words = job["words"] if "ablation=" in job["words"] else f"ablation={variants[0]}"  # a sweep does not name what it does not vary
        variant = next((name for name in found if f"ablation={table}_{name}" in words.split()), None)
        if variant is not None and job["error"] is None and results.is_file():
            found[variant].append(read_json(results))
            if table in CODES:
                quality[variant].append(read_json(Path(job["folder"]) / "sid" / "quality.json"))
    rows = [Row(name, _values(seeds) | _quality(quality[name])) for name, seeds in found.items() if seeds]
    if not rows:
        raise RunError(f"{folder}: no job went well; the messages above say why")
    return rows + (_each_its_own(found) if table == "unified" else [])


def _values(seeds: list[Results]) -> dict[str, list[float]]:
    """Metrics over all requests, and HR@10 of every scenario where there are several."""
    names = _scenarios(seeds[0])
    return {metric: [_told(results, metric) for results in seeds] for metric in METRICS} | {
        f"HR@10 {name}": [_told(results, "HR@10", name) for results in seeds] for name in (names if len(names) > 1 else ())
    }


def _quality(seeds: list[Results]) -> dict[str, list[float]]:
    """Of semantic IDs: the paper's Table 2, where a table compares them."""
    if not seeds:
        return {}
    figures = {f"coverage {depth + 1}": [each["coverage"][depth] for each in seeds] for depth in range(seeds[0]["levels"])}
    for name in seeds[0]["purity"]:
        for by in ("sid", "code_1"):
            figures[f"purity {name} by {by}"] = [each["purity"][name][by] for each in seeds]
    figures |= {f"load {name}": [each["load"][name] for each in seeds] for name in ("p25", "p75", "p90")}
    for key, about in (("left", "left after"), ("left_out", "held out, left after")):
        figures |= {f"{about} {level + 1}": [each[key][level] for each in seeds] for level in range(len(seeds[0].get(key, ())))}
    return figures


def _each_its_own(found: dict[str, list[Results]]) -> list[Row]:
    """Every scenario's requests answered by the variant that has its name; nothing where one misses."""
    names = _scenarios(next(seeds[0] for seeds in found.values() if seeds))
    seeds = range(min(len(found.get(name, [])) for name in names))
    if not seeds:
        return []
    own = {f"HR@10 {name}": [_told(found[name][seed], "HR@10", name) for seed in seeds] for name in names}
    together = {metric: [_mean({name: found[name][seed] for name in names}, metric) for seed in seeds] for metric in METRICS}
    return [Row("each its own", together | own)]


def _mean(models: dict[str, Results], metric: str) -> float:
    """Over all requests, where each scenario has a model of its own."""
    counts = {name: _entry(results, name)["requests"] for name, results in models.items()}
    return sum(count * _told(models[name], metric, name) for name, count in counts.items()) / sum(counts.values())


def _scenarios(results: Results) -> list[str]:
    return sorted({line["scenario"] for line in results["table"] if line["scenario"]})


def _told(results: Results, metric: str, scenario: str | None = None) -> float:
    value: float = _entry(results, scenario)["metrics"][metric]
    return value


def _entry(results: Results, scenario: str | None) -> dict[str, Any]:
    found = entry(results, "policy", "all", scenario=scenario)
    assert found is not None
    return found


def markdown(table: str, rows: Sequence[Row]) -> str:
    """Means over the seeds ± their standard deviation; the best mean of a column is bold, where they differ."""
    names = list(rows[0].values)
    seeds = max(len(row.values["HR@10"]) for row in rows)
    lines = [f"{TABLES[table]}: test split, as specified, {seeds} seed{'s' if seeds > 1 else ''}", ""]
    lines += ["| " + " | ".join([table, *names]) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = []
        for name in names:
            text = f"{row.mean(name):.4f}" + (f" ± {row.spread(name):.4f}" if row.spread(name) else "")
            means = [other.mean(name) for other in rows]
            best = (min if name.startswith(LOWER) else max)(means)
            cells.append(f"**{text}**" if row.mean(name) == best and min(means) < max(means) else text)
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], metric: str = "HR@10") -> str:
    """Bars of one metric with the spread over seeds, as SVG."""
    top = max(row.mean(metric) + row.spread(metric) for row in rows) or 1.0
    height, parts = 34, []
    for place, row in enumerate(rows):
        y, long, wide = 30 + place * height, 360 * row.mean(metric) / top, 360 * row.spread(metric) / top
        parts.append(f'<text x="140" y="{y + 15}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(f'<rect x="150" y="{y}" width="{long:.1f}" height="22" fill="#3b6fb6"/>')
        parts.append(f'<path d="M{150 + long - wide:.1f},{y + 11} h{2 * wide:.1f}" stroke="#111" stroke-width="2"/>')
        parts.append(f'<text x="{160 + long + wide:.1f}" y="{y + 15}">{row.mean(metric):.4f}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 {40 + len(rows) * height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<text x="150" y="18">{escape(metric)}</text>', *parts, "</svg>"]) + "\n"
