"""The result tables of README.md and docs/results.md are what the result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import main, markdown, renewed, summary

RESULT = {
    "name": "speed",
    "date": "2026-01-02",
    "commit": "abc",
    "hardware": {"cores": 2, "cpu": "some cpu", "gpus": []},
    "seeds": [1, 2],
    "claims": [{"claim": "fast | enough", "value": 1.5, "goal": 2, "unit": "x", "holds": False}],
    "tables": [{"title": "Speeds", "columns": ["what", "per second"], "rows": [["ours", 12345.678], ["theirs", None]]}],
}


def test_a_result_is_told_with_its_machine_and_a_claim_that_fails_as_such() -> None:
    text = markdown(RESULT)
    assert "2026-01-02, 2 × some cpu, seeds 1, 2, commit `abc`" in text
    assert "| ours | 12,345.7 |" in text
    assert "| theirs | – |" in text
    assert "| fast \\| enough | 1.5000 x | 2 | **does not hold** |" in text


def test_the_summary_sets_models_beside_data_and_protocols() -> None:
    def quality(name: str, policy: float) -> dict:
        columns = ["model", "HR@1", "HR@10"]
        rows = [["OxyRay policy", 0.01, policy], ["SASRec", 0.02, 0.05]]
        titles = [
            f"item level, as specified: 9 test requests{'; cut short' if name == 'b_shop' else ''}",
            "SID level, as specified: 9 test requests",
        ]
        return {"name": name, "tables": [{"title": title, "columns": columns, "rows": rows} for title in titles]}

    text = summary([RESULT, quality("a_shop", 0.1), quality("b_shop", 0.2)])
    assert text.splitlines()[0] == "| HR@10, item level | a shop, as specified | b shop, as specified |"
    assert "| OxyRay policy | 0.1000 | 0.2000 |" in text
    assert text.endswith("\n\nb shop: cut short.\n\n")
    assert summary([RESULT]) == ""


def test_writing_anew_keeps_the_rest_and_is_stable() -> None:
    page = "before\n<!-- results: here -->\nformer\n<!-- /results -->\nafter\n"
    once = renewed("x.md", page, "body\n")
    assert once == "before\n<!-- results: here -->\n\nbody\n<!-- /results -->\nafter\n"
    assert renewed("x.md", once, "body\n") == once
    assert renewed("x.md", once, "") == "before\n<!-- results: here -->\n<!-- /results -->\nafter\n"


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"x\.md: the marks"):
        renewed("x.md", "nothing", "body")


def test_the_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    assert main() == 0, "python -m benchmarks.tables"


def test_every_link_in_the_documents_leads_somewhere() -> None:
    import re

    root = Path(__file__).parents[1]
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
