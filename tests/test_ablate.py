"""Tables of the paper: what the jobs measured is put together right, and two variants run for real."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from oxyray.cli.ablate import TABLES, collected, markdown, picture
from oxyray.cli.compose import choices
from oxyray.errors import ConfigError, RunError
from oxyray.files import read_json, write_json
from tests.test_cli import said


def results(hit: float) -> dict[str, object]:
    def line(scenario: str | None, value: float) -> dict[str, object]:
        metrics = {"HR@1": value / 4, "HR@10": value, "NDCG@10": value / 2}
        return {"model": "policy", "protocol": "all", "level": "item", "scenario": scenario, "metrics": metrics}

    return {"table": [line(None, hit), line("home", hit + 0.1), line("search", hit - 0.1)]}


def test_jobs_become_rows_with_their_seeds_and_failed_ones_are_left_out(tmp_path: Path) -> None:
    hits = {("right", 1): 0.30, ("right", 2): 0.34, ("none", 1): 0.20, ("none", 2): 0.26}
    jobs = []
    for number, ((variant, seed), hit) in enumerate(hits.items()):
        folder = tmp_path / str(number)
        error = "it broke" if (variant, seed) == ("none", 2) else None
        jobs.append({"folder": str(folder), "words": f"ablation=position_{variant} train.seed={seed}", "error": error})
        (folder / "evaluate").mkdir(parents=True)
        write_json(folder / "evaluate" / "metrics.json", results(hit))
    write_json(tmp_path / "sweep.json", jobs)
    rows = collected(tmp_path, "position", ["position_none", "position_right"])
    assert [(row.name, row.values["HR@10"]) for row in rows] == [("none", [0.20]), ("right", [0.30, 0.34])]
    text = markdown("position", rows)
    assert f"**0.3200 ± {statistics.stdev([0.30, 0.34]):.4f}**" in text
    assert "| none | 0.0500 | 0.2000 |" in text
    assert "HR@10 search" in text
    assert TABLES["position"] in text
    drawn = picture(rows)
    assert drawn.count("<rect") == 2
    assert "0.3200" in drawn


def test_a_table_of_which_no_job_went_well_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.json", [{"folder": str(tmp_path), "words": "ablation=position_none train.seed=1", "error": "it broke"}])
    with pytest.raises(RunError, match="no job went well"):
        collected(tmp_path, "position", ["position_none"])


def test_every_table_has_variants_and_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for table in TABLES:
        assert sum(name.startswith(f"{table}_") for name in choices()["ablation"]) >= 3
    assert ConfigError
    code, _, err = said(capsys, "ablate", "positon")
    assert code == 2
    assert "expected a table first, one of position, composition, retrieval, scaling" in err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_two_variants_for_real(tmp_path: Path) -> None:
    words = ["debug=fast", "data.mall.items=140", "sid.width=64", f"run_dir={tmp_path}/run", "cluster.object_store_gb=0.1"]
    words += ["train.seed=3", "ablation=composition_fused,composition_trigger", "train.max_steps=2"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "oxyray", "ablate", "composition", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run" / "ablation" / "composition"
    rows = read_json(folder / "table.json")["rows"]
    assert [row["name"] for row in rows] == ["fused", "trigger"]
    for number, row in enumerate(rows):
        metrics = json.loads((folder / str(number) / "evaluate" / "metrics.json").read_text())
        overall = next(e for e in metrics["table"] if e["model"] == "policy" and e["protocol"] == "all" and e["scenario"] is None)
        assert row["values"]["HR@10"] == [overall["metrics"]["HR@10"]]
        assert f"content: {row['name']}" in (folder / str(number) / "config.yaml").read_text()
    assert "| fused |" in (folder / "table.md").read_text()
    assert "<svg" in (folder / "table.svg").read_text()
