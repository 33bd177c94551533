"""Bring the README's result tables up to date with `benchmarks/results/*.json`: `python -m benchmarks.tables` (`--check` only compares)."""

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


def renewed(readme: str, results: list[dict[str, Any]]) -> str:
    """`readme` with what stands between the marks written anew."""
    before, mark, rest = readme.partition(_BEGIN)
    head, _, _ = rest.partition("\n")
    _, end, after = rest.partition(_END)
    if not mark or not end:
        raise SystemExit(f"README.md: the marks {_BEGIN} ... --> and {_END} are missing")
    body = "\n".join(markdown(result) for result in results)
    return f"{before}{mark}{head}\n\n{body}{end}{after}" if results else f"{before}{mark}{head}\n{end}{after}"


def main() -> int:
    path = ROOT / "README.md"
    results = [read_json(file) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    old = path.read_text()
    new = renewed(old, results)
    if "--check" in sys.argv:
        return int(new != old)
    with whole(path) as part:
        part.write_text(new)
    return 0


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
