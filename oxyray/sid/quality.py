"""How good a set of semantic IDs is: the paper's Table 2 (section 4.2), computed from the codes and the items' categories alone.

Choices: percentiles interpolate linearly (numpy's default). Purity is a plain mean over groups (a SID with one item counts as pure, as in
the paper), so it is read beside the number of distinct SIDs; items without the category are left out. Load balance counts unused codes as
clusters of size 0.

Legend: I items, L levels, V codes a level, G groups of items with the same prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def quality(codes_IL: Array, width: int, categories: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    """All figures of the table, JSON-able. `categories` maps each category level that exists to one value an item (None: unknown).

    `coverage`: distinct prefixes of length d / V^d for d = 1..L. `purity`: per category level, mean share of the dominant category over
    full SIDs and over level-1 codes. `collision`: items per distinct SID at P90, P99, P999 and the largest, the share of items that share
    their SID. `load`: items per level-1 code over I / V at P25, P75, P90, and the Gini index (0 even, 1 all in one)."""
    items, levels = codes_IL.shape
    groups = [_groups(codes_IL[:, : depth + 1]) for depth in range(levels)]
    sizes_G = np.bincount(groups[-1])
    load_V = np.bincount(codes_IL[:, 0], minlength=width)
    return {
        "items": items,
        "levels": levels,
        "width": width,
        "distinct": len(sizes_G),
        "coverage": [float(group.max() + 1) / float(width) ** (depth + 1) for depth, group in enumerate(groups)],
        "purity": {name: {"sid": _purity(groups[-1], values), "code_1": _purity(groups[0], values)} for name, values in categories.items()},
        "collision": {
            **{name: float(np.percentile(sizes_G, q)) for name, q in (("p90", 90), ("p99", 99), ("p999", 99.9))},
            "largest": int(sizes_G.max()),
            "sharing": float((sizes_G[groups[-1]] > 1).mean()),
        },
        "load": {**{f"p{q}": float(np.percentile(load_V, q) * width / items) for q in (25, 75, 90)}, "gini": gini(load_V)},
    }


def gini(sizes_G: Array) -> float:
    """Gini index of sizes: mean absolute difference of all pairs over twice the mean."""
    sorted_G = np.sort(np.asarray(sizes_G, dtype=np.float64))
    count = len(sorted_G)
    return float(((2 * np.arange(1, count + 1) - count - 1) * sorted_G).sum() / (count * sorted_G.sum()))


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a table for people."""
    collision, load = figures["collision"], figures["load"]
    rows = [
        (
            "Semantic IDs",
            "distinct",
            f"{figures['distinct']:,} of {figures['items']:,} items ({figures['levels']} x {figures['width']:,} codes)",
        )
    ]
    rows += [("Codebook coverage", f"depth {depth + 1}", _percent(share)) for depth, share in enumerate(figures["coverage"])]
    for name, purity in figures["purity"].items():
        rows.append(("Cluster purity", name, f"{_percent(purity['sid'])} by SID, {_percent(purity['code_1'])} by level-1 code"))
    rows += [("SID collision", name.upper(), f"{collision[name]:,.4g} items a SID") for name in ("p90", "p99", "p999")]
    rows += [
        ("SID collision", "largest", f"{collision['largest']:,} items"),
        ("SID collision", "sharing", f"{_percent(collision['sharing'])} of the items"),
    ]
    rows += [("Load balance", name.upper(), _percent(load[name])) for name in ("p25", "p75", "p90")]
    rows.append(("Load balance", "Gini", f"{load['gini']:.3f}"))
    rows += [("Quantisation", *extra) for extra in _fit_rows(figures)]
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows)
    lines, before = [], ""
    for name, what, value in rows:
        lines.append(f"{name if name != before else '':<{first}}  {what:<{second}}  {value}")
        before = name
    return "\n".join(lines)


def _fit_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "left" in figures:
        rows.append(("left over", " -> ".join(_percent(share) for share in figures["left"]) + " of the variance"))
    if figures.get("left_out"):
        left = " -> ".join(_percent(share) for share in figures["left_out"])
        rows.append(("held out", f"{left}, of {figures['held_out']:,} items that the codebook has not seen"))
    if "unused" in figures:
        rows.append(("unused codes", ", ".join(map(str, figures["unused"])) + " (level by level)"))
    if figures.get("moved"):
        rows.append(("moved", f"{figures['moved']:,} items that shared a SID took the nearest free one"))
    if "duplicates" in figures:
        rows.append(("duplicates", f"{figures['duplicates']:,} items whose vector equals another's"))
    return rows


def _groups(prefix_Id: Array) -> Array:
    """The number of each row's group, 0..G-1, rows with equal prefixes in the same one."""
    return np.unique(prefix_Id, axis=0, return_inverse=True)[1].reshape(-1)


def _purity(group_I: Array, values: Sequence[str | None]) -> float | None:
    known = np.array([value is not None for value in values])
    if not known.any():
        return None
    group_K = group_I[known]
    category_K = np.unique(np.array([str(value) for value in values if value is not None]), return_inverse=True)[1]
    pairs, count = np.unique(np.stack([group_K, category_K]), axis=1, return_counts=True)
    largest_G = np.zeros(group_I.max() + 1)
    np.maximum.at(largest_G, pairs[0], count)
    size_G = np.bincount(group_K, minlength=len(largest_G))
    return float((largest_G[size_G > 0] / size_G[size_G > 0]).mean())


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.4g}%"
