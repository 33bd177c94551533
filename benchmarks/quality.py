"""Recommendation quality of the main job: `python -m benchmarks.quality data=amazon_beauty [overrides]`, the policy beside its baselines.

Runs (or reuses, where fresh) the stages that it needs with the same words, then writes what `evaluate` measured on the test split to
`benchmarks/results/DATA.json`: of the supervised policy, or with `--aligned` of the whole `oxyray run`. With `--seeds 1,2,3` the policy is
trained once a seed, on the same data and semantic IDs; told is the mean, and the standard deviation over seeds. Baselines are those of the
first. Goals: recall@10 of small public sets, and on the embedded shop to beat every baseline. `--quick` runs a tiny shop for a few steps.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

from benchmarks.harness import Report, arguments, spread
from oxyray.cli.compose import check, compose_config
from oxyray.config import Config, to_dict
from oxyray.evaluate.table import ALONE, MODEL_TITLES, OPTIMUM_TITLES, entry
from oxyray.files import read_json
from oxyray.pipeline import STAGES, Stage, borrow, run_all
from oxyray.run import Run

# Item-level recall@10 by protocol.
GOALS = {"amazon_beauty": {"all": 0.0924, "seen_out": 0.105}, "amazon_sports": {"all": 0.055}}
OURS = ("policy", ALONE)
PROTOCOLS = {"all": "as specified", "seen_out": "seen items left out"}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("words", nargs="*", help="what `oxyray run` would be given")
    parser.add_argument("--aligned", action="store_true", help="with the stages rank and align")
    parser.add_argument("--seeds", help="seeds of the policy's training, as 1,2,3; train.seed unless given")
    options = parser.parse_intermixed_args()
    words = ["data=mall", "debug=fast", *options.words] if options.quick else options.words
    asked = compose_config(check(words))
    needless = set() if options.aligned else {"align"} if asked.generate.ranker else {"rank", "align"}
    stages = [stage for stage in STAGES if stage.name not in needless]
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else [asked.train.seed]
    runs = [one(words, stages, seed, first=seed == seeds[0]) for seed in seeds]
    config, run = runs[0]
    found = [read_json(each.path("evaluate", "metrics.json")) for _, each in runs]
    results = over_seeds(copy.deepcopy(found))
    report = Report(results["data"], to_dict(config), seeds)
    minutes = config.evaluate.sasrec.max_minutes
    limit = f"; SASRec was stopped after {minutes:g} minutes" if minutes else ""
    if len(seeds) > 1:
        show_seeds(report, found, seeds)
    for protocol, title in PROTOCOLS.items():
        for level in ("item", "sid"):
            show(report, results, protocol, level, f"{level} level, {title}: {results['requests']:,} test requests{limit}")
    scenarios(report, results)
    training(report, run)
    goals(report, results)
    report.finish(options.quick)


def one(words: list[str], stages: list[Stage], seed: int, first: bool) -> tuple[Config, Run]:
    """A run with this seed; all but the first share the first one's data and semantic IDs, and leave the baselines out."""
    base = compose_config(check(words))
    if first:
        config = compose_config(check([*words, f"train.seed={seed}"]))
    else:
        config = compose_config(check([*words, f"train.seed={seed}", f"run_dir={base.run_dir}-seed{seed}", "evaluate.baselines=[]"]))
        borrow(Run(base.run_dir), Run(config.run_dir), config, "pretrain")
    run_all(config, stages)
    return config, Run(config.run_dir)


def over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run's results, the policy's metrics being means over all runs."""
    results = found[0]
    for line in results["table"]:
        if line["model"] in OURS:
            same = [entry(each, line["model"], line["protocol"], line["level"], line["scenario"]) for each in found]
            line["metrics"] = {name: statistics.fmean(e["metrics"][name] for e in same if e) for name in line["metrics"]}
    return results


def show_seeds(report: Report, found: list[dict[str, Any]], seeds: list[int]) -> None:
    """Recall@10 and NDCG@10 by seed, item level."""
    rows: list[list[Any]] = []
    for model in (name for name in OURS if name in found[0]["models"]):
        for protocol, title in PROTOCOLS.items():
            for metric in ("Recall@10", "NDCG@10"):
                values = [e["metrics"][metric] for each in found if (e := entry(each, model, protocol))]
                rows.append([f"{MODEL_TITLES[model]}: {metric}, {title}", spread(values), *(round(value, 4) for value in values)])
    report.table("The policy by seed, item level", ["", "mean", *(f"seed {seed}" for seed in seeds)], rows)


def show(report: Report, results: dict[str, Any], protocol: str, level: str, title: str) -> None:
    """Every model's overall metrics; published rows where they are of this protocol or do not say."""
    found = [(MODEL_TITLES[model], e["metrics"]) for model in results["models"] if (e := entry(results, model, protocol, level))]
    if not found:
        return
    names = list(found[0][1])
    rows: list[list[Any]] = [[model, *(round(metrics[name], 4) for name in names)] for model, metrics in found]
    optimum = results.get("optimum") or {}
    for kind, label in OPTIMUM_TITLES.items() if optimum and (protocol, level) == ("all", "item") else ():
        best = next(e["metrics"] for e in optimum[kind] if e["scenario"] is None)
        rows.append([label, *(round(best[name], 4) if name in best else None for name in names)])
    report.table(title, ["model", *names], rows)


def scenarios(report: Report, results: dict[str, Any]) -> None:
    """HR@10 by scenario, where there are several."""
    names = sorted({e["scenario"] for e in results["table"] if e["scenario"]})
    if len(names) < 2:
        return
    optimum = results.get("optimum") or {}
    kinds = [kind for kind in OPTIMUM_TITLES if kind in optimum]
    rows: list[list[Any]] = []
    for name in names:
        cells = [entry(results, model, "all", "item", name) for model in results["models"]]
        cells += [next((e for e in optimum[kind] if e["scenario"] == name), None) for kind in kinds]
        rows.append([name, *(None if e is None else round(e["metrics"]["HR@10"], 4) for e in cells)])
    columns = ["scenario", *(MODEL_TITLES[model] for model in results["models"]), *(OPTIMUM_TITLES[kind] for kind in kinds)]
    report.table("HR@10 by scenario, as specified", columns, rows)


def training(report: Report, run: Run) -> None:
    """What training took and how it went."""
    lines = run.metrics("pretrain")
    steps = [line for line in lines if "targets_per_second" in line]
    valid = [line for line in lines if "valid_hit" in line]
    progress = read_json(run.path("pretrain", "progress.json"))
    report.table(
        "training",
        ["minutes", "steps", "best validation HR@10", "at step", "targets a second (median)"],
        [
            [
                round(progress["minutes"], 1),
                progress["step"],
                max((line["valid_hit"] for line in valid), default=None),
                progress["best_step"],
                round(sorted(line["targets_per_second"] for line in steps)[len(steps) // 2]) if steps else None,
            ]
        ],
    )


def goals(report: Report, results: dict[str, Any]) -> None:
    metrics = {protocol: e["metrics"] for protocol in PROTOCOLS if (e := entry(results, "policy", protocol))}
    for model in (name for name in OURS if name in results["models"]):
        for protocol, goal in GOALS.get(results["data"], {}).items():
            if e := entry(results, model, protocol):
                title = f"item-level recall@10 of {MODEL_TITLES[model]}, {PROTOCOLS[protocol]}"
                report.claim(title, e["metrics"]["Recall@10"], goal, "share")
    for model in results["models"]:
        other = entry(results, model, "all")
        if model not in OURS and other:
            ratio = metrics["all"]["HR@10"] / max(other["metrics"]["HR@10"], 1e-9)
            report.claim(f"HR@10 beside {MODEL_TITLES[model]}, as specified", ratio, 1.0, "ratio")
    if results.get("optimum"):
        best = next(e["metrics"]["HR@10"] for e in results["optimum"]["public"] if e["scenario"] is None)
        report.claim("share of the best HR@10 that the log allows", metrics["all"]["HR@10"] / best, 0.5, "share")


if __name__ == "__main__":
    main()
