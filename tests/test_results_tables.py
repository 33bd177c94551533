"""The README's result tables are what the result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import main, markdown, renewed

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


def test_writing_anew_keeps_the_rest_and_is_stable() -> None:
    readme = "before\n<!-- results: here -->\nformer\n<!-- /results -->\nafter\n"
    once = renewed(readme, [RESULT])
    assert once.startswith("before\n<!-- results: here -->\n")
    assert once.endswith("<!-- /results -->\nafter\n")
    assert "former" not in once
    assert renewed(once, [RESULT]) == once
    assert renewed(once, []) == "before\n<!-- results: here -->\n<!-- /results -->\nafter\n"


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="marks"):
        renewed("nothing", [RESULT])


def test_the_readme_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    assert main() == 0, "python -m benchmarks.tables"


def test_every_link_in_the_documents_leads_somewhere() -> None:
    import re

    root = Path(__file__).parents[1]
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
