"""The report's sections as HTML. Each takes what was read from the run folder and gives a section, or a note that names the stage
still missing."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from oxyray.data.prepared import Meta
from oxyray.evaluate.report_plots import Bar, Line, bars, line_chart, profile_chart


def page(title: str, header: str, body: Sequence[str], made_from: str) -> str:
    """A whole page with nothing outside it: no script, no font, no address. `header` and `body` are HTML already."""
    style = importlib.resources.files("oxyray.evaluate").joinpath("report.css").read_text()
    written = datetime.now(UTC).strftime("%d %b %Y, %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><title>{escape(title)}</title>
<style>{style}</style>
</head>
<body><main>
<header>{header}</header>
{"".join(body)}
<footer>Written {written} from {escape(made_from)}.</footer>
</main></body></html>
"""


def section(key: str, title: str, about: str, body: str) -> str:
    return f'<section id="{key}"><h2>{escape(title)}</h2><p class="about">{about}</p>{body}</section>'


def card(title: str, body: str) -> str:
    """`title` and `body` are HTML already."""
    return f'<div class="card"><h3>{title}</h3>{body}</div>'


def missing(stage: str, what: str) -> str:
    again = f"Run <code>oxyray {escape(stage)}</code> with the same run_dir, then <code>oxyray report</code> again."
    return f'<div class="missing">{escape(what)} {again}</div>'


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """`rows` are (class, cells); cells are HTML already. It scrolls in itself where it is wider than the page."""
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f'<tr class="{name}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for name, cells in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, plain text, without a head."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def tile(value: str, label: str, strong: bool = False) -> str:
    return f'<div class="tile{" strong" if strong else ""}"><b>{value}</b><span>{escape(label)}</span></div>'


def data_section(meta: Meta | None) -> str:
    if meta is None:
        return section("data", "Data", "", missing("prepare", "The data is not prepared yet."))
    total = sum(meta.splits.values())
    split = table(["split", "events", "share"], [("", (name, f"{count:,}", f"{count / total:.1%}")) for name, count in meta.splits.items()])
    actions = table(
        ["scenario", *map(escape, meta.actions)],
        [("", (escape(s), *(f"{n:,}" for n in counts))) for s, counts in zip(meta.scenarios, meta.scenario_actions, strict=True)],
        "figures",
    )
    more = [
        ("density", f"{meta.events / max(meta.users_with_events * meta.items, 1):.4%}"),
        ("requests", f"{meta.requests:,}"),
        *((f"events per user, {name}", f"{value:,}") for name, value in meta.history_quantiles.items()),
        ("rows left out as unsound", f"{sum(meta.quarantined.values()):,}"),
    ]
    first, last = (_when(meta, time) for time in meta.time_range)
    about = f"{escape(meta.name)}: {first} to {last}, split {escape(meta.split.replace('_', ' '))}."
    cards = [
        ("Split", split),
        ("Events by scenario and action", actions),
        ("More", facts(more)),
    ]
    return section("data", "Data", about, '<div class="grid">' + "".join(card(t, b) for t, b in cards) + "</div>")


def _when(meta: Meta, time: int) -> str:
    if meta.time_unit != "seconds":
        return f"position {time}"
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%d %b %Y")
    except (ValueError, OverflowError, OSError):
        return str(time)


def training_section(lines: Sequence[dict[str, Any]], sasrec: Sequence[dict[str, Any]]) -> str:
    """`lines` are pretrain's lines of metrics.jsonl with a step, `sasrec` the baseline's epochs."""
    about = "Losses are weighted means per target; validation asks a fixed sample of the validation split by beam search."
    if not any("loss" in line for line in lines):
        return section("training", "Training", about, missing("pretrain", "The policy is not trained yet."))
    charts = [
        ("Loss", curves(lines, {"loss": ("training", "policy"), "valid_loss": ("validation", "knn")}), "step", False),
        (
            "Validation, first ten places",
            curves(lines, {"valid_hit": ("HR@10", "policy"), "valid_ndcg": ("NDCG@10", "sasrec")}),
            "step",
            True,
        ),
        ("Learning rate", curves(lines, {"lr": ("learning rate", "policy")}), "step", True),
        ("Targets per second", curves(lines, {"targets_per_second": ("targets per second", "policy")}), "step", True),
    ]
    if sasrec:
        curve = Line("HR@10", [line["epoch"] for line in sasrec], [line["valid_recall@10"] for line in sasrec], "sasrec")
        charts.append(("SASRec baseline: validation HR@10", [curve], "epoch", True))
    cards = "".join(card(title, line_chart(curves, x, zero)) for title, curves, x, zero in charts if curves)
    return section("training", "Training", about, f'<div class="grid">{cards}{_shares(lines)}</div>')


def curves(lines: Sequence[dict[str, Any]], names: dict[str, tuple[str, str]]) -> list[Line]:
    """One curve for each key that the lines have: `names` gives its title and colour."""
    found = []
    for key, (name, colour) in names.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            found.append(Line(name, [x for x, _ in points], [y for _, y in points], colour))
    return found


def _shares(lines: Sequence[dict[str, Any]]) -> str:
    """Where the time of a step goes, a mean over the run."""
    names = list(dict.fromkeys(key for line in lines for key in line if key.startswith("share_")))
    if not names:
        return ""
    values = {name: [line[name] for line in lines if name in line] for name in names}
    rows = [Bar(name.removeprefix("share_"), sum(v) / len(v)) for name, v in values.items()]
    return card("Time of a training step", bars(rows, max(row.value for row in rows), ".1%"))


def sid_section(quality: dict[str, Any] | None, sizes: Sequence[Sequence[int]]) -> str:
    """`sizes[l][v]` is the number of items with code v at level l + 1."""
    about = "How evenly the codes are used, and how far an item is known by its semantic ID alone (paper 4.2)."
    if quality is None:
        return section("sids", "Semantic IDs", about, missing("sid", "Items have no semantic IDs yet."))
    even = quality["items"] / quality["width"]
    load = profile_chart(sizes, [f"level {n + 1}" for n in range(len(sizes))], "codes, most used first (%)", even) if sizes else ""
    coverage = bars([Bar(f"depth {d + 1}", share) for d, share in enumerate(quality["coverage"])], 1.0, ".2%")
    collision, spread = quality["collision"], quality["load"]
    more = [
        ("distinct SIDs", f"{quality['distinct']:,} of {quality['items']:,} items"),
        ("items that share a SID", f"{collision['sharing']:.1%}"),
        ("items a SID, P90 / P99 / P99.9", " / ".join(f"{collision[q]:g}" for q in ("p90", "p99", "p999"))),
        ("largest SID", f"{collision['largest']:,} items"),
        ("level-1 load, P25 / P75 / P90 of even", " / ".join(f"{spread[q]:.0%}" for q in ("p25", "p75", "p90"))),
        ("level-1 Gini index", f"{spread['gini']:.3f}"),
    ]
    for name, pure in quality["purity"].items():
        shown = " / ".join("–" if pure[key] is None else f"{pure[key]:.1%}" for key in ("sid", "code_1"))
        more.append((f"purity of {name}, by SID / by level-1 code", shown))
    cards = [("Items per code", load), ("Coverage: prefixes used of those possible", coverage), ("Quality", facts(more))]
    return section(
        "sids",
        "Semantic IDs",
        about,
        '<div class="grid">' + "".join(card(t, b) for t, b in cards if b) + "</div>",
    )


def people_section(cards: str | None, found_share: str) -> str:
    about = (
        "Half drawn at random among the test requests whose item was found in the first ten places, half among the others; no picking. "
        f"{found_share}"
    )
    body = f'<div class="stack">{cards}</div>' if cards else missing("evaluate", "No recommendations were written yet.")
    return section("people", "Ten users", about, body)


def about_section(versions: dict[str, str], config: str, stages: Sequence[tuple[str, str, str]]) -> str:
    parts = []
    if stages:
        ran = table(["stage", "ended", "took"], [("", tuple(map(escape, row))) for row in stages])
        parts.append(f"<details open><summary>Stages</summary>{ran}</details>")
    if versions:
        listed = table(["package", "version"], [("", (escape(a), escape(b))) for a, b in versions.items()])
        parts.append(f"<details><summary>Versions</summary>{listed}</details>")
    if config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>")
    body = f'<div class="card">{"".join(parts)}</div>' if parts else missing("prepare", "The run folder is empty.")
    return section("about", "How it was made", "Everything that is needed to make this run again.", body)
