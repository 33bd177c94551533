"""The paper's tables as results: `python -m benchmarks.ablations TABLE [overrides]`, TABLE as of `oxyray ablate`.

`oxyray ablate TABLE` with the same words does the work, and keeps what is finished; here its table is written down, with the paper's order
of the variants as claims.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.harness import Cell, Report, arguments, spread
from oxyray.cli.ablate import TABLES, ablate
from oxyray.cli.compose import check, compose_config
from oxyray.config import to_dict
from oxyray.files import read_json

# What the paper found: (metric, better variant, the others).
FOUND: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tokenizer": ("HR@10", "v4", ("v3", "v2", "v1")),
    "sources": ("HR@10", "peers", ("swing", "text")),
    "position": ("HR@10", "right", ("add", "left", "replace", "none")),
    "composition": ("HR@10", "fused", ("concatenated", "scenario", "trigger")),
    "retrieval": ("HR@10 search", "igr", ("q2i", "without")),
    "unified": ("HR@10", "all", ("each its own",)),
    "masked": ("HR@10", "nothing", ("trigger",)),
    "missing": ("HR@10", "hidden", ("never",)),
    "scaling": ("HR@10", "128", ("64", "32")),
}
# The ratio that is to be reached, where better is not the point: what is missing may cost less than 5%.
GOALS = {"missing": 0.95}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("words", nargs="*", help="overrides, as of `oxyray ablate`")
    options = parser.parse_intermixed_args()
    words = [*options.words, *(["debug=fast", "train.seed=1"] if options.quick else [])]
    config = compose_config(check([word for word in words if not word.startswith(("ablation=", "train.seed=", "hydra"))]))
    if failed := ablate(options.table, words):
        raise SystemExit(failed)
    found = read_json(Path(config.run_dir) / "ablation" / options.table / "table.json")
    values: dict[str, dict[str, list[float]]] = {row["name"]: row["values"] for row in found["rows"]}
    names = list(next(iter(values.values())))
    seeds = len(next(iter(values.values()))["HR@10"])
    report = Report(f"ablation_{options.table}_{config.data.name}", to_dict(config), [*range(1, seeds + 1)])
    rows: list[list[Cell]] = [[name, *(spread(metrics[metric]) for metric in names)] for name, metrics in values.items()]
    about = f"mean over {seeds} seeds ± their standard deviation" if seeds > 1 else "one seed"
    report.table(f"{TABLES[options.table]}: {about}; test split, as specified", ["", *names], rows)
    metric, best, others = FOUND[options.table]
    for other in others:
        if best in values and other in values and metric in names:
            ratio = statistics.fmean(values[best][metric]) / max(statistics.fmean(values[other][metric]), 1e-9)
            report.claim(f"{metric} of {best} beside {other}, as in the paper", ratio, GOALS.get(options.table, 1.0), "ratio")
    report.finish(options.quick)


if __name__ == "__main__":
    main()
