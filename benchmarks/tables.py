"""Bring the result tables up to date with `benchmarks/results/*.json`: `python -m benchmarks.tables` (`--check` only compares).

README.md gets one table of recommendation quality, docs/results.md everything, between their marks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from oxyray.files import read_json, whole

ROOT = Path(__file__).resolve().parent.parent
_BEGIN, _END = "<!-- results:", "<!-- /results -->"


def markdown(result: dict[str, Any]) -> str:
    """One result file: where and when it was measured, its tables, and its claims, held or not."""
    hardware = result["hardware"]
    machine = ", ".join([f"{hardware['cores']} × {hardware['cpu']}", *hardware.get("gpus", [])])
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [f"### {result['name'].replace('_', ' ')}", "", f"{result['date']}, {machine}, seeds {seeds}, commit `{result['commit']}`", ""]
    for table in result["tables"]:
        columns = table["columns"]
        lines += [f"**{table['title']}**", "", _row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
        lines += [_row([_cell(cell) for cell in row]) for row in table["rows"]] + [""]
    if result["claims"]:
        lines += [_row(["claim", "value", "goal", ""]), "|---|---:|---:|---|"]
        lines += [
            _row([c["claim"], f"{_cell(c['value'])} {c['unit']}".strip(), _cell(c["goal"]), "holds" if c["holds"] else "**does not hold**"])
            for c in result["claims"]
        ] + [""]
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """HR@10 at item level of every model on every data set, in both protocols; nothing where there are no quality results."""
    cells: dict[str, dict[str, Any]] = {}
    heads: list[str] = []
    notes: list[str] = []
    for result in results:
        for table in result["tables"]:
            level, _, protocol = table["title"].partition(":")[0].partition(", ")
            if level != "item level" or "HR@10" not in table["columns"]:
                continue
            heads.append(f"{result['name'].replace('_', ' ')}, {protocol}")
            if (note := table["title"].partition("; ")[2]) and (told := f"{result['name'].replace('_', ' ')}: {note}.") not in notes:
                notes.append(told)
            place = table["columns"].index("HR@10")
            for row in table["rows"]:
                cells.setdefault(row[0], {})[heads[-1]] = row[place]
    if not heads:
        return ""
    lines = [_row(["HR@10, item level", *heads]), _row(["---", *["---:"] * len(heads)])]
    lines += [_row([model, *(_cell(found.get(head)) for head in heads)]) for model, found in cells.items()]
    return "\n".join([*lines, "", *notes] if notes else lines) + "\n\n"


def renewed(name: str, page: str, body: str) -> str:
    """`page` with what stands between the marks written anew."""
    before, mark, rest = page.partition(_BEGIN)
    head, _, _ = rest.partition("\n")
    _, end, after = rest.partition(_END)
    if not mark or not end:
        raise SystemExit(f"{name}: the marks {_BEGIN} ... --> and {_END} are missing")
    return f"{before}{mark}{head}\n\n{body}{end}{after}" if body else f"{before}{mark}{head}\n{end}{after}"


def main() -> int:
    results = [read_json(file) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    pages = {"README.md": summary(results), "docs/results.md": "\n".join(markdown(result) for result in results)}
    stale = 0
    for name, body in pages.items():
        old = (ROOT / name).read_text()
        new = renewed(name, old, body)
        stale += new != old
        if "--check" not in sys.argv:
            with whole(ROOT / name) as part:
                part.write_text(new)
    return int(stale > 0) if "--check" in sys.argv else 0


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
