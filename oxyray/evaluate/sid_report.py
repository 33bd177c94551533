"""`oxyray sid --report`: semantic IDs to look at, on one page: the paper's Table 2 beside other runs' catalogues, how full the codes are,
the tree of codes with what lies in it, items that share a SID, and the nearest neighbours of some items.

Legend: I items, L levels, V codes a level, J dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from oxyray.data.prepared import Prepared
from oxyray.evaluate.report_people import Goods
from oxyray.evaluate.report_plots import profile_chart
from oxyray.evaluate.report_sections import card, page, section, table
from oxyray.files import read_json, whole
from oxyray.run import Run
from oxyray.sid.rqkmeans import RQKMeans
from oxyray.sid.tokenizer import Tokenizer

Array = np.ndarray

SHOWN_CODES, SHOWN_BELOW, SAMPLES = 64, 6, 3
SHOWN_SHARED, SHOWN_ITEMS, NEIGHBOURS = 30, 12, 5


def sid_report(run: Run, others: Sequence[Run] = ()) -> None:
    """Write `RUN/sid_report.html` and print where it is. Raises RunError where a run has no semantic IDs."""
    text = render(run, others)
    with whole(run.path("sid_report.html")) as part:
        part.write_text(text, encoding="utf-8")
    print(f"semantic IDs: {run.path('sid_report.html')} ({len(text) / 1e6:.1f} MB)", flush=True)


def render(run: Run, others: Sequence[Run] = (), seed: int = 7) -> str:
    """The page."""
    tokenizer, prepared = Tokenizer.load(run.folder), Prepared.load(run.need("data", stage="prepare"))
    catalog, goods, random = tokenizer.catalog, Goods(prepared), np.random.default_rng(seed)
    codes_IL = catalog.codes_IL
    figures = {each.folder.name: read_json(each.need("sid", "quality.json", stage="sid")) for each in (run, *others)}
    category_I = _finest(prepared)
    body = [
        section("quality", "Quality", "The paper's Table 2, computed from codes and categories.", card("", versions(figures))),
        section("load", "Load", "How many items each code holds, most used first.", card("Items per code", _load(codes_IL, catalog.width))),
        section("tree", "The tree of codes", _about_tree(codes_IL), _tree(codes_IL, category_I, goods, random)),
        section("shared", "Shared SIDs", *_shared(codes_IL, goods)),
        section("near", "Nearest neighbours", "Items drawn by chance, and those whose codes stand for the nearest vectors.",
                _neighbours(tokenizer.codebook, codes_IL, goods, random)),
    ]  # fmt: skip
    header = f"""<div class="kicker">OxyRay semantic IDs</div><h1>{escape(prepared.meta.name)}</h1>
<p class="lead">{len(codes_IL):,} items, {codes_IL.shape[1]} levels of {catalog.width:,} codes, catalogue {catalog.version}.</p>
<nav>{"".join(f'<a href="#{key}">{key}</a>' for key in ("quality", "load", "tree", "shared", "near"))}</nav>"""
    return page(f"{prepared.meta.name} - semantic IDs", header, body, run.folder.name)


def versions(figures: dict[str, dict[str, Any]]) -> str:
    """A column a run."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, of: Any) -> None:
        cells = []
        for each in figures.values():
            try:
                value = of(each)
            except (KeyError, IndexError):
                value = None
            cells.append("–" if value is None else value)
        rows.append((name, cells))

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.4g}%"

    most = max(each["levels"] for each in figures.values())
    row("distinct SIDs", lambda q: f"{q['distinct']:,} of {q['items']:,}")
    for depth in range(most):
        row(f"coverage, depth {depth + 1}", lambda q, d=depth: percent(q["coverage"][d]))
    for name in sorted({name for each in figures.values() for name in each["purity"]}):
        row(f"purity of {name}, by SID", lambda q, n=name: percent(q["purity"][n]["sid"]))
        row(f"purity of {name}, by level-1 code", lambda q, n=name: percent(q["purity"][n]["code_1"]))
    for name in ("p90", "p99", "p999", "largest"):
        row(f"items a SID, {name.upper() if name != 'largest' else name}", lambda q, n=name: f"{q['collision'][n]:g}")
    row("items that share a SID", lambda q: percent(q["collision"]["sharing"]))
    for name in ("p25", "p75", "p90"):
        row(f"level-1 load, {name.upper()} of even", lambda q, n=name: percent(q["load"][n]))
    row("level-1 Gini index", lambda q: f"{q['load']['gini']:.3f}")
    for level in range(most):
        row(f"variance left after level {level + 1}", lambda q, d=level: percent(q["left"][d]))
        row(f"the same, items held out, level {level + 1}", lambda q, d=level: percent(q["left_out"][d]))
    return table(["", *map(escape, figures)], [("", (escape(name), *map(escape, cells))) for name, cells in rows], "figures")


def _load(codes_IL: Array, width: int) -> str:
    sizes = [np.bincount(codes_IL[:, level], minlength=width).tolist() for level in range(codes_IL.shape[1])]
    return profile_chart(sizes, [f"level {n + 1}" for n in range(len(sizes))], "codes, most used first (%)", len(codes_IL) / width)


def _about_tree(codes_IL: Array) -> str:
    count = len(np.unique(codes_IL[:, 0]))
    return f"The {min(SHOWN_CODES, count)} fullest of {count:,} first codes; open one for its second codes. Items are drawn by chance."


def _tree(codes_IL: Array, category_I: list[str | None], goods: Goods, random: np.random.Generator) -> str:
    parts = []
    for code, size in Counter(codes_IL[:, 0].tolist()).most_common(SHOWN_CODES):
        inside = np.flatnonzero(codes_IL[:, 0] == code)
        below = "".join(
            f"<h4>{code} – {second} <small>{count:,} items</small></h4>{_some(inside[codes_IL[inside, 1] == second], goods, random)}"
            for second, count in Counter(codes_IL[inside, 1].tolist()).most_common(SHOWN_BELOW)
        ) if codes_IL.shape[1] > 1 else ""  # fmt: skip
        name, share = _mostly([category_I[item] for item in inside])
        about = f"{size:,} items" + (f", {share:.0%} {escape(name)}" if name else "")
        parts.append(
            f'<details class="card"><summary><b>{code}</b> <small>{about}</small>{_some(inside, goods, random)}</summary>{below}</details>'
        )
    return f'<div class="grid">{"".join(parts)}</div>'


def _some(item_n: Array, goods: Goods, random: np.random.Generator) -> str:
    drawn = random.choice(item_n, min(SAMPLES, len(item_n)), replace=False)
    return f'<ul class="goods">{"".join(goods.entry(int(item)) for item in drawn)}</ul>'


def _mostly(values: list[str | None]) -> tuple[str, float]:
    known = [value for value in values if value]
    if not known:
        return "", 0.0
    name, count = Counter(known).most_common(1)[0]
    return name, count / len(known)


def _shared(codes_IL: Array, goods: Goods) -> tuple[str, str]:
    """What the section says, and its cards: the fullest SIDs with more than one item."""
    sids, place_I, count_S = np.unique(codes_IL, axis=0, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(count_S > 1)
    if not len(shared):
        return "Every item has a SID of its own.", ""
    fullest = shared[np.argsort(-count_S[shared], kind="stable")][:SHOWN_SHARED]
    cards = []
    for sid in fullest:
        items = np.flatnonzero(place_I.reshape(-1) == sid)[:SAMPLES]
        title = f"{' – '.join(map(str, sids[sid]))} <small>{count_S[sid]} items</small>"
        cards.append(card(title, f'<ul class="goods">{"".join(goods.entry(int(item)) for item in items)}</ul>'))
    about = f"{len(shared):,} SIDs belong to more than one item, {int(count_S[shared].sum()):,} items in all. The {len(fullest)} fullest:"
    return about, f'<div class="grid">{"".join(cards)}</div>'


def _neighbours(codebook: RQKMeans, codes_IL: Array, goods: Goods, random: np.random.Generator) -> str:
    vectors_IJ = codebook.reconstruct(codes_IL[:, : codebook.levels])
    cards = []
    for item in random.choice(len(codes_IL), min(SHOWN_ITEMS, len(codes_IL)), replace=False).tolist():
        distance_I = np.square(vectors_IJ - vectors_IJ[item]).sum(axis=1)
        distance_I[item] = np.inf
        near = np.argsort(distance_I, kind="stable")[: min(NEIGHBOURS, len(codes_IL) - 1)]
        entries = goods.entry(item, hit=True, note=_name(codes_IL[item])) + "".join(
            goods.entry(int(n), note=_name(codes_IL[n])) for n in near
        )
        cards.append(card("", f'<ul class="goods">{entries}</ul>'))
    return f'<div class="grid">{"".join(cards)}</div>'


def _name(codes_L: Array) -> str:
    return " – ".join(map(str, codes_L))


def _finest(prepared: Prepared) -> list[str | None]:
    held = prepared.item_columns("category_3", "category_2", "category_1")
    return held[held.column_names[0]].to_pylist() if held.column_names else [None] * prepared.meta.items
