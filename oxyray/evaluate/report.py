"""The stage `report`: the whole run on one page, `RUN/report/report.html`, with nothing outside it: no script, no font, no address.

It can be written after any stage; what is not there yet is said, with the stage that makes it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.evaluate import report_results
from oxyray.evaluate import report_sections as sections
from oxyray.evaluate.report_align import align_section
from oxyray.evaluate.report_people import people
from oxyray.evaluate.table import entry
from oxyray.files import read_json, whole
from oxyray.run import Run
from oxyray.sid.catalog import Catalog

_STAGES = ("prepare", "fuse", "sid", "pretrain", "rank", "align", "evaluate")


def report(config: Config, run: Run) -> None:
    """Write RUN/report whole or not at all, from whatever the run folder holds."""
    page = render(config, run)
    with whole(run.path("report")) as part:
        part.mkdir(parents=True)
        (part / "report.html").write_text(page, encoding="utf-8")
    print(f"report: {run.path('report', 'report.html')} ({len(page) / 1e6:.1f} MB)", flush=True)


def render(config: Config, run: Run) -> str:
    """The page."""
    prepared = Prepared.load(run.path("data")) if run.path("data", "meta.json").exists() else None
    meta = prepared.meta if prepared else None
    results = read_json(run.path("evaluate", "metrics.json")) if run.path("evaluate", "metrics.json").exists() else None
    name = meta.name if meta else config.data.name
    body = [
        report_results.results_section(results),
        sections.data_section(meta),
        sections.training_section(last_training(run.metrics("pretrain")), _sasrec(run)),
        align_section(last_training(run.metrics("align")), _json(run, "align", "outcome.json"), _json(run, "rank", "metrics.json")),
        sections.sid_section(*_sids(run)),
        sections.people_section(_people(config, run, prepared, results), _found(results)),
        sections.about_section(*_about(run)),
    ]
    links = (
        ("results", "Results"),
        ("data", "Data"),
        ("training", "Training"),
        ("align", "Alignment"),
        ("sids", "Semantic IDs"),
        ("people", "Ten users"),
        ("about", "How it was made"),
    )
    header = f"""<div class="kicker">OxyRay report</div><h1>{escape(name)}</h1><p class="lead">{escape(report_results.verdict(results))}</p>
{report_results.header_tiles(meta, results)}
<nav>{"".join(f'<a href="#{key}">{title}</a>' for key, title in links)}</nav>"""
    return sections.page(f"{name} - OxyRay report", header, body, run.folder.name)


def last_training(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the latest training, in step order: where a run went back (resumed, or begun anew), what it did again replaces
    what it did before."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if "step" not in line:
            continue
        again = "loss" in line and any("loss" in earlier and earlier["step"] == line["step"] for earlier in kept[-3:])
        if kept and (line["step"] < kept[-1]["step"] or again):
            kept = [earlier for earlier in kept if earlier["step"] < line["step"]]
        kept.append(line)
    return kept


def _sasrec(run: Run) -> list[dict[str, Any]]:
    path = run.path("baselines", "sasrec", "about.json")
    return list(read_json(path)["history"]) if path.exists() else []


def _json(run: Run, *parts: str) -> dict[str, Any] | None:
    return read_json(run.path(*parts)) if run.path(*parts).exists() else None


def _sids(run: Run) -> tuple[dict[str, Any] | None, list[list[int]]]:
    """quality.json, and the items of each code by level."""
    if not run.path("sid", "quality.json").exists():
        return None, []
    catalog = Catalog.load(run.path("sid", "catalog"))
    sizes = [np.bincount(catalog.codes_IL[:, level], minlength=catalog.width).tolist() for level in range(catalog.levels)]
    return read_json(run.path("sid", "quality.json")), sizes


def _people(config: Config, run: Run, prepared: Prepared | None, results: dict[str, Any] | None) -> str | None:
    path = run.path("evaluate", "predictions.parquet")
    if prepared is None or results is None or not path.exists():
        return None
    return people(path, prepared, results["models"][0], config.seed)


def _found(results: dict[str, Any] | None) -> str:
    found = entry(results, results["models"][0], "all") if results else None
    share = found["metrics"].get("HR@10") if found else None
    return "" if share is None else f"Over all test requests the share of hits is {share:.1%}."


def _about(run: Run) -> tuple[dict[str, str], str, list[tuple[str, str, str]]]:
    versions = read_json(run.path("versions.json")) if run.path("versions.json").exists() else {}
    config = run.path("config.yaml").read_text() if run.path("config.yaml").exists() else ""
    stages = []
    for name in _STAGES:
        stamp = read_json(run.stamp(name)) if run.stamp(name).exists() else {}
        if {"finished", "seconds"} <= stamp.keys():
            ended = datetime.fromtimestamp(stamp["finished"], UTC).strftime("%d %b %Y, %H:%M UTC")
            stages.append((name, ended, f"{stamp['seconds']:,.0f} s"))
    return versions, config, stages
