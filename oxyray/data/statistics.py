"""What the prepared data holds, as the lines that `oxyray prepare` prints and the numbers that go to `metrics.jsonl`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from oxyray.data.prepared import Meta

_LAST_DATE = 253_402_300_799


def text(meta: Meta) -> str:
    """A few lines for a person."""
    density = meta.events / (meta.users_with_events * meta.items)
    quantiles = meta.history_quantiles
    lines = [
        f"Data {meta.name}: {meta.users_with_events:,} users with events ({meta.users:,} known), {meta.items:,} items, "
        f"{meta.events:,} events in {meta.requests:,} requests, density {density:.4%}",
        f"  time      {_time(meta, meta.time_range[0])} to {_time(meta, meta.time_range[1])}",
        "  events per user  " + "  ".join(f"{name} {value:,}" for name, value in quantiles.items()),
        "  split     " + meta.split + ": " + ", ".join(f"{name} {count:,}" for name, count in meta.splits.items()) + _starts(meta),
    ]
    wide = max(map(len, ["scenario", *meta.scenarios]))
    lines.append(f"  {'scenario':<{wide}}" + "".join(f"{action:>13}" for action in meta.actions))
    for scenario, counts in zip(meta.scenarios, meta.scenario_actions, strict=True):
        lines.append(f"  {scenario:<{wide}}" + "".join(f"{count:>13,}" for count in counts))
    if meta.side or meta.profile:
        lines.append("  features  " + ", ".join(f"{f['name']} ({f['size']})" for f in meta.side + meta.profile))
    if meta.merged:
        lines.append(f"  merged    {meta.merged:,} weaker or repeated actions on one item within one request")
    if meta.outside_pool:
        lines.append(f"  outside   {meta.outside_pool:,} events of items outside their scenario's pool (history, but never recommended)")
    if meta.ignored_columns:
        lines.append(f"  ignored   columns of events outside the contract: {', '.join(meta.ignored_columns)}")
    lines += [f"  quarantined  {count:,} × {reason}" for reason, count in meta.quarantined.items()] or ["  quarantined  none"]
    lines += [f"  repaired  {count:,} × {reason}" for reason, count in meta.repaired.items()]
    return "\n".join(lines)


def numbers(meta: Meta) -> dict[str, Any]:
    names = ("users", "users_with_events", "items", "events", "requests", "merged", "splits", "quarantined", "repaired")
    return {name: getattr(meta, name) for name in names}


def _time(meta: Meta, value: int) -> str:
    if meta.time_unit == "position" or value > _LAST_DATE:
        return f"{meta.time_unit} {value}"
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")


def _starts(meta: Meta) -> str:
    if meta.valid_start is None or meta.test_start is None:
        return ""
    return f" (valid from {_time(meta, meta.valid_start)}, test from {_time(meta, meta.test_start)})"
