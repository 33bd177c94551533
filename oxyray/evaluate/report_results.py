"""The report's results: the figures at the top, bars beside the baselines, differences, the full tables with published rows."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import Any

from oxyray.data.prepared import Meta
from oxyray.evaluate.lists import PROTOCOLS
from oxyray.evaluate.report_plots import Bar, bars, legend
from oxyray.evaluate.report_sections import card, missing, section, table, tile
from oxyray.evaluate.table import (
    LEVEL_TITLES,
    MODEL_TITLES,
    OPTIMUM_TITLES,
    TITLES,
    VALUE_KINDS,
    best_possible,
    cited,
    entry,
    shown_k,
    value_rows,
)

Results = dict[str, Any]

SHORT = {"all": "as specified", "seen_out": "seen out"}


def header_tiles(meta: Meta | None, results: Results | None) -> str:
    tiles = []
    if results:
        name = f"HR@{shown_k(results['ks'])}"
        for protocol, label in (("all", "as specified"), ("seen_out", "seen items left out")):
            found = entry(results, results["models"][0], protocol)
            if found:
                tiles.append(tile(f"{found['metrics'][name]:.4f}", f"{name} on test, {label}", strong=True))
    if meta:
        tiles += [
            tile(f"{value:,}", name) for name, value in (("users", meta.users_with_events), ("items", meta.items), ("events", meta.events))
        ]
    if results:
        tiles.append(tile(f"{results['requests']:,}", "test requests asked"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def verdict(results: Results | None) -> str:
    """One sentence: how the policy stands to the best of the others."""
    if not results or len(results["models"]) < 2:
        return ""
    name, ours = f"HR@{shown_k(results['ks'])}", results["models"][0]
    said = []
    for protocol, words in (("all", "over the whole pool"), ("seen_out", "with seen items left out")):
        rows = {model: entry(results, model, protocol) for model in results["models"]}
        value = {model: row["metrics"][name] for model, row in rows.items() if row}
        best = max((model for model in value if model != ours), key=lambda model: value[model])
        figure = next(r for r in results["against"] if (r["baseline"], r["protocol"], r["level"]) == (best, protocol, "item"))["metrics"][
            name
        ]
        sure = "" if figure["p"] < 0.05 else " (not a sure difference)"
        than = f"{value[ours] / value[best] - 1:+.0%}" if value[best] else f"{value[ours]:.4f} to 0"
        said.append(f"{than} against {MODEL_TITLES.get(best, best)}, the best of the others, {words}{sure}")
    return f"{name} of the policy: " + "; ".join(said) + "."


def results_section(results: Results | None) -> str:
    if results is None:
        return section("results", "Results", "", missing("evaluate", "Nothing was measured yet."))
    about = (
        f"{results['requests']:,} of {results['requests_in_split']:,} test requests, the same for every model. Item level counts the very "
        "item, SID level any item with the target's semantic ID. Whiskers are 95% intervals (users resampled)."
    )
    k = shown_k(results["ks"])
    cards = [_overall(results, protocol, k) for protocol in PROTOCOLS]
    body = f'<div class="grid two">{"".join(cards)}</div>' + _scenarios(results, k) + _value(results) + _against(results, k)
    body += "".join(
        _full(results, level, protocol)
        for level in LEVEL_TITLES
        for protocol in PROTOCOLS
        if entry(results, results["models"][0], protocol, level)
    )
    return section("results", "Results", about, f'<div class="stack">{body}</div>')


def _overall(results: Results, protocol: str, k: int) -> str:
    name = f"HR@{k}"
    best = best_possible(results["optimum"], "public", None).get(name) if results.get("optimum") and protocol == "all" else None
    rows = _model_bars(results, protocol, None, name, best)
    top = max([row.value for row in rows] + [row.interval[1] for row in rows if row.interval] + [best or 0])
    key = legend([(f"best possible {best:.4f}", "optimum")]) if best else ""
    return card(f"{name}, {escape(TITLES[protocol])}", bars(rows, top) + key)


def _model_bars(results: Results, protocol: str, scenario: str | None, name: str, best: float | None) -> list[Bar]:
    rows = []
    for model in results["models"]:
        found = entry(results, model, protocol, "item", scenario)
        if found:
            interval = found.get("intervals", {}).get(name)
            colour = model if model in MODEL_TITLES else "popularity"
            bar = Bar(MODEL_TITLES.get(model, model), found["metrics"][name], colour, model == results["models"][0])
            rows.append(replace(bar, interval=tuple(interval) if interval else None, best=best))
    return rows


def _scenarios(results: Results, k: int) -> str:
    names = list(dict.fromkeys(e["scenario"] for e in results["table"] if e["scenario"]))
    if len(names) < 2:
        return ""
    cards, name = [], f"HR@{k}"
    for scenario in names:
        best = best_possible(results["optimum"], "public", scenario).get(name) if results.get("optimum") else None
        rows = _model_bars(results, "all", scenario, name, best)
        found = entry(results, results["models"][0], "all", "item", scenario)
        count = f"{found['requests']:,} requests" if found else ""
        top = max([row.value for row in rows] + [best or 0])
        cards.append(card(f'{escape(scenario)} <small class="caption">{count}</small>', bars(rows, top)))
    key = legend([("best possible in the embedded shop", "optimum")]) if results.get("optimum") else ""
    return f'<h3 style="margin-top:24px">By scenario: {name} as specified</h3><div class="grid">{"".join(cards)}</div>{key}'


def _value(results: Results) -> str:
    """What slates are worth in the embedded shop, overall and by scenario."""
    found = results.get("value")
    if not found:
        return ""
    body: list[tuple[str, tuple[str, ...]]] = []
    for scenario in dict.fromkeys(row["scenario"] for row in found["table"]):
        body.append(("group", (escape(scenario or "all scenarios"), *("" for _ in VALUE_KINDS))))
        body += [("", (escape(title), *cells)) for title, cells in value_rows(found, scenario)]
    note = f"Expected of showing the best {found['k']} once, with its standard error: an aligned policy should be worth more, not only hit."
    return card("Value of the slates, by the shop's true utility", table(["model", *VALUE_KINDS], body) + f'<p class="note">{note}</p>')


def _against(results: Results, k: int) -> str:
    name, rows = f"HR@{k}", []
    for row in results["against"]:
        if row["level"] == "item":
            figure = row["metrics"][name]
            interval = "[{:+.4f}, {:+.4f}]".format(*figure["interval"]) if "interval" in figure else "–"
            cells = (
                escape(MODEL_TITLES.get(row["baseline"], row["baseline"])),
                SHORT[row["protocol"]],
                f"{figure['difference']:+.4f}",
                interval,
                f"{figure['p']:.2g}",
            )
            rows.append(("", cells))
    if not rows:
        return ""
    ours = MODEL_TITLES.get(results["models"][0], results["models"][0])
    body = table(["against", "protocol", "difference", "95% interval", "p"], rows, "figures")
    return card(f"{escape(ours)} less each other model: {name}, item level, paired", body)


def _full(results: Results, level: str, protocol: str) -> str:
    ks = results["ks"]
    rows = [(model, e) for model in results["models"] if (e := entry(results, model, protocol, level))]
    same = all(abs(e["metrics"][f"HR@{k}"] - e["metrics"][f"Recall@{k}"]) < 1e-12 for _, e in rows for k in ks)
    columns = [f"{kind}@{k}" for kind in (("HR", "NDCG") if same else ("HR", "Recall", "NDCG")) for k in ks]
    heads = [column.replace("Recall", "R").replace("NDCG", "N") for column in columns]
    body = [(model, (escape(MODEL_TITLES.get(model, model)), *(f"{e['metrics'][c]:.4f}" for c in columns))) for model, e in rows]
    if results.get("optimum") and (level, protocol) == ("item", "all"):
        for knowledge, title in OPTIMUM_TITLES.items():
            found = best_possible(results["optimum"], knowledge, None)
            body.append(("optimum", (escape(title), *(_number(found.get(c)) for c in columns))))
    outside = [row for row in results["published"] if level == "item" and row["protocol"] in (None, protocol)]
    if outside:
        body.append(("group", ("published", *("" for _ in columns))))
        short = {c: ("R" if c.startswith("HR") else "N") + c[c.index("@") :] for c in columns if not c.startswith("Recall")}
        body += [("outside", (escape(cited(row)), *(_number(row.get(short.get(c, ""))) for c in columns))) for row in outside]
    notes = (
        ["HR: hit rate, N: NDCG. Recall equals HR here: one positive a day."] if same else ["HR: hit rate, R: recall of the day, N: NDCG."]
    )
    notes += ["* the source does not say which protocol and level it used."] if any(row["protocol"] is None for row in outside) else []
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return card(f"{escape(LEVEL_TITLES[level])}, {escape(TITLES[protocol])}", table(["model", *heads], body, "figures") + note)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
