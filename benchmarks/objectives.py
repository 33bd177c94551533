"""What alignment is worth, by objective (paper, Table 10), by SA-GCPO's temperatures (Table 11) and by the share of synthetic requests
(Figure 7): `python -m benchmarks.objectives methods|stale|longer|tau|synthetic data=mall [overrides] [--seeds 1 2 3]`. `stale` is `methods`
with candidates that are several versions old, so that ratios leave 1, which is where the objectives differ; `longer` is SA-GCPO and its
control on two and a half times as many steps.

One supervised policy, which has held the newest training events back, is aligned again and again, from the same start, on the same budget;
a seed draws requests and candidates. What is told is the test split's, of the weights that validation chose (`align` keeps the start where
nothing was better). Beside the objectives stand two controls. `supervised`: the same loop on the same requests in which nothing but the
item really taken is learned, without candidates. And no alignment at all: a policy pre-trained on everything, nothing held back, for as
many minutes as the start and SA-GCPO took together (`--no-plain` leaves it out). Finished runs are kept in `runs/`, so a stopped benchmark
goes on where it was.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import Cell, Report, arguments, spread
from oxyray.cli.compose import check, compose_config
from oxyray.cluster.start import one_ray
from oxyray.config import Config, to_dict
from oxyray.evaluate.table import entry
from oxyray.files import read_json
from oxyray.pipeline import STAGES, borrow, run_all, run_one
from oxyray.run import Run

OTHERS = ("supervised", "grpo", "gspo", "ecpo", "gbpo")
RIVALS: dict[str, list[str]] = {"methods": [], "stale": ["align.staleness=8"], "longer": []}
TAUS = ((1.0, 1.05), (1.0, 1.0), (1.0, 0.95), (1.0, 2.0), (1.0, 0.5))  # the paper's three, and two that can be told apart
SHARES = (0.0, 0.17, 0.33, 0.5)
METRICS = ("HR@1", "HR@10", "NDCG@10")
START = "before alignment"
PLAIN = "not aligned, trained on everything for as long"
Figures = dict[str, float]


def ways(part: str, steps: int) -> dict[str, list[str]]:
    """Title of each way to align, and its overrides; `steps` are those of the configuration."""
    if part == "longer":
        more = [f"align.steps={5 * steps // 2}", f"align.eval_every_steps={steps // 2}"]
        return {name: [f"align.objective.name={name}", *more] for name in ("sa_gcpo", "supervised")}
    if part in RIVALS:
        return {name: [f"align.objective.name={name}", *RIVALS[part]] for name in ("sa_gcpo", *OTHERS)}
    if part == "tau":
        return {f"τ+ {a:g}, τ- {b:g}": [f"align.objective.tau_positive={a}", f"align.objective.tau_negative={b}"] for a, b in TAUS}
    return {
        f"{name}, {share:.0%} synthetic": [f"align.objective.name={name}", f"align.synthetic_share={share}"]
        for name in ("sa_gcpo", "grpo")
        for share in SHARES
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("part", choices=(*RIVALS, "tau", "synthetic"))
    parser.add_argument("words", nargs="*", help="overrides, as of `oxyray run`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-plain", action="store_true", help="without the policy that is trained on everything and not aligned")
    options = parser.parse_intermixed_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    words = ["evaluate.baselines=[]", "generate.ranker=0", *(["debug=fast"] if options.quick else []), *options.words]
    start = compose_config(check([*words, "run_dir=runs/objectives"]))
    base = Path(f"runs/objectives-{start.data.name}{'-quick' if options.quick else ''}")
    words.append(f"run_dir={base}")
    config = compose_config(check(words))
    report = Report(f"objectives_{options.part}_{config.data.name}", to_dict(config), seeds)
    found: dict[str, list[Figures]] = {}
    with one_ray(config.processes):
        run_all(config, [stage for stage in STAGES if stage.name in ("prepare", "fuse", "sid", "pretrain", "rank")])
        for seed in seeds:
            for title, overrides in ways(options.part, config.align.steps).items():
                folder = base / f"{options.part}-{slug(title)}-{seed}"
                told = f"evaluate.before={str(START not in found).lower()}"  # all begin at the same policy
                aligned, begun = once([*words, *overrides, told, f"align.seed={seed}"], Run(config.run_dir), folder)
                found.setdefault(START, [begun])
                found.setdefault(title, []).append(aligned)
                print(f"seed {seed}, {title}: {aligned}", flush=True)
            if options.part in RIVALS and not options.no_plain:
                longer = read_json(base / "pretrain" / "progress.json")["minutes"] + found["sa_gcpo"][-1]["minutes"]
                found.setdefault(PLAIN, []).append(plain(words, Run(config.run_dir), base / f"plain-{seed}", seed, longer))
                print(f"seed {seed}, {PLAIN}: {found[PLAIN][-1]}", flush=True)
    show(report, found, options.part)
    report.finish(options.quick)


def once(words: list[str], base: Run, folder: Path) -> tuple[Figures, Figures]:
    """Align and measure in a folder of its own: figures after, and before."""
    config: Config = compose_config(check([*words[:-1], words[-1], f"run_dir={folder}"]))
    run = Run(config.run_dir)
    borrow(base, run, config, "align")
    run_one("align", config)
    run_one("evaluate", config)
    results = read_json(run.path("evaluate", "metrics.json"))
    outcome = read_json(run.path("align", "outcome.json"))
    told = {"minutes": outcome["minutes"], "best step": outcome["best_step"], "validation": outcome["best"]}
    return figures(results, results["models"][0]) | told, figures(results, results["models"][-1])


def plain(words: list[str], base: Run, folder: Path, seed: int, minutes: float) -> Figures:
    """Pre-train on everything for so many minutes and measure, in a folder of its own."""
    longer = [f"train.seed={seed}", "train.hold_back=0", "train.epochs=1000", f"train.max_minutes={minutes:.2f}"]
    config: Config = compose_config(check([*words[:-1], *longer, f"run_dir={folder}"]))
    run = Run(config.run_dir)
    borrow(base, run, config, "pretrain")
    run_one("pretrain", config)
    run_one("evaluate", config)
    results = read_json(run.path("evaluate", "metrics.json"))
    return figures(results, results["models"][0]) | {"minutes": minutes}


def figures(results: dict[str, Any], model: str) -> Figures:
    """Test metrics of one model, and what its slates are worth where that can be known."""
    found = entry(results, model, "all")
    assert found is not None
    told: Figures = {"requests": results["requests"]} | {name: found["metrics"][name] for name in METRICS}
    for row in (results.get("value") or {"table": []})["table"]:
        if row["model"] == model and row["scenario"] is None:
            told |= {"clicks": row["metrics"]["clicks"], "purchases": row["metrics"]["purchases"]}
    return told


def show(report: Report, found: dict[str, list[Figures]], part: str) -> None:
    requests = int(found[START][0]["requests"])
    names = [name for name in dict.fromkeys(name for each in found.values() for figure in each for name in figure) if name != "requests"]
    rows: list[list[Cell]] = [
        [title, *(spread([figure[name] for figure in each if name in figure]) for name in names)] for title, each in found.items()
    ]
    seeds = len(report.seeds)
    about = f"mean over {seeds} seeds ± their standard deviation" if seeds > 1 else "one seed"
    report.table(f"{part}: {about}; {requests:,} test requests, as specified", ["", *names], rows)

    def mean(title: str, name: str) -> float:
        return statistics.fmean(figure[name] for figure in found[title])

    ours = "sa_gcpo" if part in RIVALS else next(title for title in found if title != START)
    for name in METRICS[:2]:
        report.claim(f"{name} of {ours} beside its start", mean(ours, name) / mean(START, name), 1.0, "ratio")
    if "clicks" in names:
        report.claim(
            f"clicks of a slate by the true utility, {ours} beside its start", mean(ours, "clicks") / mean(START, "clicks"), 1.0, "ratio"
        )
    for other in found if part in RIVALS else ():
        if other not in (START, ours):
            report.claim(f"HR@10 of {ours} beside {other}", mean(ours, "HR@10") / mean(other, "HR@10"), 1.0, "ratio")


def slug(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", title.replace("τ", "tau")).strip("_")


if __name__ == "__main__":
    main()
