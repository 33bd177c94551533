"""The table of results for people: every model by protocol and level, published rows beside, scenarios, and how sure the
differences are."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from oxyray.data.prepared import Meta
from oxyray.evaluate.lists import PROTOCOLS

Results = dict[str, Any]

TITLES = {"all": "as specified: the scenario's whole pool", "seen_out": "seen out: items of the user's history left out"}
LEVEL_TITLES = {"item": "item level", "sid": "SID level (items that share a SID count as one)"}
ALONE = "beams"  # the policy without a second opinion on the order
MODEL_TITLES = {
    "policy": "OxyRay policy",
    ALONE: "its beams alone",
    "supervised": "before alignment",
    "popularity": "popularity",
    "knn": "co-visitation KNN",
    "sasrec": "SASRec",
}
OPTIMUM_TITLES = {"public": "best possible, from the log", "hidden": "best possible, shopper known"}
VALUE_KINDS = ("clicks", "carts", "purchases", "turnover")
_SHORT = {"Recall": "R", "NDCG": "N"}


def published(meta: Meta) -> list[dict[str, Any]]:
    """Published rows of this data set; none unless its users, items and events are those of the published set."""
    known = json.loads(importlib.resources.files("oxyray.evaluate").joinpath("published.json").read_text())
    sizes = {"users": meta.users_with_events, "items": meta.items, "events": meta.events}
    ours = [name for name, said in known["sets"].items() if said == sizes and meta.split == "leave_one_out"]
    return [row for row in known["rows"] if row["set"] in ours]


def entry(results: Results, model: str, protocol: str, level: str = "item", scenario: str | None = None) -> dict[str, Any] | None:
    """The entry of the results' table, None where there is none."""
    wanted = (model, protocol, level, scenario)
    return next((e for e in results["table"] if (e["model"], e["protocol"], e["level"], e["scenario"]) == wanted), None)


def text(results: Results) -> str:
    """All tables, as `oxyray evaluate` prints them."""
    models, ks = results["models"], results["ks"]
    lines = [
        f"Test of {results['data']}: {results['requests']:,} of {results['requests_in_split']:,} requests, split {results['split']}, "
        f"seed {results['seed']}"
    ]
    for level in dict.fromkeys(e["level"] for e in results["table"]):
        for protocol in PROTOCOLS:
            lines += ["", f"{LEVEL_TITLES[level]} - {TITLES[protocol]}", *_block(results, models, protocol, level, ks)]
    lines += _distance(results, models, ks) + _value(results) + _scenarios(results, models, ks)
    lines += _against(results, ks)
    outside = ", ".join(f"{model} {share:.2%}" for model, share in results["outside_pool"].items())
    lines += ["", f"  recommended places that held an item outside the scenario's pool: {outside}"]
    return "\n".join(lines)


def _block(results: Results, models: Sequence[str], protocol: str, level: str, ks: Sequence[int]) -> list[str]:
    rows = [(MODEL_TITLES.get(model, model), e) for model in models if (e := entry(results, model, protocol, level))]
    same = all(abs(e["metrics"][f"HR@{k}"] - e["metrics"][f"Recall@{k}"]) < 1e-12 for _, e in rows for k in ks)
    columns = [f"{kind}@{k}" for kind in (("Recall", "NDCG") if same else ("HR", "Recall", "NDCG")) for k in ks]
    head = [name.replace("Recall", "R" if not same else "HR=R").replace("NDCG", "N") for name in columns]
    outside = results["published"] if level == "item" else []
    outside = [row for row in outside if row["protocol"] in (None, protocol)]
    optimum = results.get("optimum") if (level, protocol) == ("item", "all") else None
    best = [(title, best_possible(optimum, name, None)) for name, title in OPTIMUM_TITLES.items()] if optimum else []
    wide = max([len(title) for title, _ in [*rows, *best]] + [len(cited(row)) for row in outside] + [len("model")])
    lines = [f"  {'model':<{wide}}" + "".join(f"{name:>10}" for name in head)]
    lines += [f"  {title:<{wide}}" + "".join(f"{e['metrics'][name]:>10.4f}" for name in columns) for title, e in rows]
    for title, metrics in best:
        lines.append(f"  {title:<{wide}}" + "".join(f"{_number(metrics.get(name)):>10}" for name in columns))
    for row in outside:
        values = [row.get(f"{_SHORT.get(kind, kind)}@{k}") for kind, k in (name.split("@") for name in columns)]
        lines.append(f"  {cited(row):<{wide}}" + "".join(f"{_number(value):>10}" for value in values))
    if any(row["protocol"] is None for row in outside):
        lines.append("  * published; its source does not say which protocol and level it used")
    return lines


def _distance(results: Results, models: Sequence[str], ks: Sequence[int]) -> list[str]:
    """How far each model is on the way to the computable optimum."""
    if not results.get("optimum"):
        return []
    name, rows = f"HR@{shown_k(ks)}", [(model, entry(results, model, "all")) for model in models]
    goal = best_possible(results["optimum"], "public", None)[name]
    reached = ", ".join(f"{MODEL_TITLES.get(model, model)} {row['metrics'][name] / goal:.0%}" for model, row in rows if row)
    return ["", f"share of the best possible {name} ({goal:.4f}, on {results['optimum']['requests']:,} of the requests): {reached}"]


def _value(results: Results) -> list[str]:
    """What the models' slates are worth in the embedded shop."""
    found = results.get("value")
    if not found:
        return []
    rows = value_rows(found)
    wide = max(len(title) for title, _ in rows)
    lines = ["", f"expected of showing the best {found['k']} once, by the shop's true utility, on {found['requests']:,} of the requests"]
    lines.append(f"  {'model':<{wide}}" + "".join(f"{kind:>20}" for kind in VALUE_KINDS))
    return lines + [f"  {title:<{wide}}" + "".join(f"{cell:>20}" for cell in cells) for title, cells in rows]


def value_rows(value: dict[str, Any], scenario: str | None = None) -> list[tuple[str, list[str]]]:
    """Title of each model and its cells, each with its standard error."""
    return [
        (MODEL_TITLES.get(row["model"], row["model"]), [f"{row['metrics'][kind]:.4f} ± {row['errors'][kind]:.4f}" for kind in VALUE_KINDS])
        for row in value["table"]
        if row["scenario"] == scenario
    ]


def best_possible(optimum: dict[str, Any], knowledge: str, scenario: str | None) -> dict[str, float]:
    """The embedded shop's best HR@K in one scenario (None: overall); empty where it was not computed."""
    return next((row["metrics"] for row in optimum[knowledge] if row["scenario"] == scenario), {})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def cited(row: dict[str, Any]) -> str:
    return f"{row['system']} ({row['source']})" + ("" if row["protocol"] else " *")


def _scenarios(results: Results, models: Sequence[str], ks: Sequence[int]) -> list[str]:
    scenarios = list(dict.fromkeys(e["scenario"] for e in results["table"] if e["scenario"]))
    if len(scenarios) < 2:
        return []
    k = shown_k(ks)
    lines = ["", f"by scenario - HR@{k} at item level, as specified / seen out"]
    wide = max(map(len, scenarios))
    lines.append(f"  {'scenario':<{wide}}{'requests':>10}" + "".join(f"{MODEL_TITLES.get(model, model):>20}" for model in models))
    for scenario in scenarios:
        cells, requests = [], 0
        for model in models:
            pair = [entry(results, model, protocol, "item", scenario) for protocol in PROTOCOLS]
            cells.append(" / ".join("-" if e is None else f"{e['metrics'][f'HR@{k}']:.4f}" for e in pair))
            requests = max([requests, *(e["requests"] for e in pair if e)])
        lines.append(f"  {scenario:<{wide}}{requests:>10,}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def _against(results: Results, ks: Sequence[int]) -> list[str]:
    if not results["against"]:
        return []
    name, ours = f"HR@{shown_k(ks)}", MODEL_TITLES.get(results["models"][0], results["models"][0])
    lines = ["", f"{ours} less each other model - {name} at item level, paired, users resampled"]
    for row in results["against"]:
        if row["level"] != "item":
            continue
        figure, theirs = row["metrics"][name], MODEL_TITLES.get(row["baseline"], row["baseline"])
        interval = f"  95% [{figure['interval'][0]:+.4f}, {figure['interval'][1]:+.4f}]" if "interval" in figure else ""
        lines.append(f"  {theirs:<18} {row['protocol']:<9}{figure['difference']:+.4f}{interval}  p {figure['p']:.2g}")
    return lines


def shown_k(ks: Sequence[int]) -> int:
    """The K that stands for all where one must: 10, or the nearest to it."""
    return min(ks, key=lambda k: (abs(k - 10), k))
