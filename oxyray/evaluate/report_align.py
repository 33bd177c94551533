"""The report's part on alignment: how rewards and hit rates went, whether it helped, and how good the ranker is that judged."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from oxyray.evaluate.report_plots import Line, line_chart
from oxyray.evaluate.report_sections import card, curves, missing, section, table

_REWARDS = ("policy", "knn", "sasrec", "optimum", "popularity", "hit")


def align_section(lines: Sequence[dict[str, Any]], outcome: dict[str, Any] | None, ranker: dict[str, Any] | None) -> str:
    """`lines` are align's lines of metrics.jsonl with a step, `outcome` its outcome.json, `ranker` the ranker's metrics.json."""
    about = "The policy learns from the rewards of what it generates; of all validations the best weights are kept. "
    if outcome is None or not lines:
        return section("align", "Alignment", about, missing("align", "The policy was not aligned.") + _ranker(ranker))
    charts = [
        ("Mean reward of the candidates", curves(lines, {"reward/all/reward": ("reward", "policy")}), False),
        ("Its components, unweighted", _components(lines), True),
        ("Validation", curves(lines, {"valid_hit": ("HR@10", "policy"), "valid_hit1": ("HR@1", "knn")}), True),
        ("Entropy of a candidate, nats", curves(lines, {"entropy": ("entropy", "policy")}), False),
        ("Share of tokens whose gate is under 1/2", curves(lines, {"gate_under_half": ("share", "policy")}), True),
        ("Trainer and rollout apart, in log-probability", curves(lines, {"drift": ("drift", "policy")}), True),
        ("Seconds of a step", _seconds(lines), True),
    ]
    cards = "".join(card(title, line_chart(found, "step", zero)) for title, found, zero in charts if found)
    return section("align", "Alignment", about + told(lines, outcome), f'<div class="grid">{cards}</div>' + _ranker(ranker))


def told(lines: Sequence[dict[str, Any]], outcome: dict[str, Any]) -> str:
    """What alignment did to the validation hit rate, and when it hurt."""
    start, best = outcome["start"], outcome["best"]
    valid = [line["valid_hit"] for line in lines if "valid_hit" in line]
    if start is None or not valid:
        return "There were no validation requests: the last weights were kept."
    if outcome["best_step"] == 0:
        return f"Training hurt: no validation was above the start's HR@10 of {start:.4f} (the last: {valid[-1]:.4f}). The start was kept."
    more = f"HR@10 on validation: {start:.4f} before, {best:.4f} at step {outcome['best_step']}, whose weights were kept."
    hurt = f" Further training hurt: {valid[-1]:.4f} at the end." if valid[-1] < best else ""
    return more + hurt


def _components(lines: Sequence[dict[str, Any]]) -> list[Line]:
    names = dict.fromkeys(key for line in lines for key in line if key.startswith("reward/all/") and key != "reward/all/reward")
    titles = {key: (key.rpartition("/")[2], _REWARDS[number % len(_REWARDS)]) for number, key in enumerate(names)}
    return curves(lines, titles)


def _seconds(lines: Sequence[dict[str, Any]]) -> list[Line]:
    names = ("generate", "judge", "learn", "publish")
    return curves(lines, {f"seconds/{name}": (name, colour) for name, colour in zip(names, _REWARDS, strict=False)})


def _ranker(found: dict[str, Any] | None) -> str:
    """The ranker beside its baselines, all scenarios together."""
    if found is None:
        return ""
    rows = []
    for line in found["table"]:
        if line["scenario"] is None:
            figures = ("–" if line[key] is None else f"{line[key]:.4f}" for key in ("auc", "gauc", "calibration_error"))
            title = found["titles"][line["model"]]
            rows.append(("policy" if line["model"] == "ranker" else "", (escape(title), line["head"], f"{line['positives']:,}", *figures)))
    note = f"{found['items']:,} items on {found['pages']:,} pages of the test split."
    head = ["model", "head", "positives", "AUC", "GAUC", "calibration error"]
    return card("The ranker that judges, beside its baselines", f"{table(head, rows)}<p class='note'>{note}</p>")
