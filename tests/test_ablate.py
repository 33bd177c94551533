"""Tables of the paper: what the jobs measured is put together right. Two variants run for real in `test_sweep.py`."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from oxyray.cli.ablate import TABLES, _variants, collected, markdown, picture
from oxyray.cli.compose import check, choices, compose_config
from oxyray.cli.jobs import _beside
from oxyray.errors import RunError
from oxyray.files import write_json
from oxyray.pipeline import STAGES, run_all
from tests.test_cli import said


def results(hit: float) -> dict[str, object]:
    requests = {None: 40, "home": 30, "search": 10}

    def line(scenario: str | None, value: float) -> dict[str, object]:
        metrics = {"HR@1": value / 4, "HR@10": value, "NDCG@10": value / 2}
        return {
            "model": "policy",
            "protocol": "all",
            "level": "item",
            "scenario": scenario,
            "requests": requests[scenario],
            "metrics": metrics,
        }

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


def test_one_variant_alone_is_a_row_though_its_jobs_are_told_apart_by_their_seeds(tmp_path: Path) -> None:
    jobs = [{"folder": str(tmp_path / str(seed)), "words": f"train.seed={seed}", "error": None} for seed in (1, 2)]
    for job, hit in zip(jobs, (0.3, 0.4), strict=True):
        (Path(str(job["folder"])) / "evaluate").mkdir(parents=True)
        write_json(Path(str(job["folder"])) / "evaluate" / "metrics.json", results(hit))
    write_json(tmp_path / "sweep.json", jobs)
    assert [(row.name, row.values["HR@10"]) for row in collected(tmp_path, "position", ["position_left"])] == [("left", [0.3, 0.4])]


def test_a_model_for_each_scenario_is_put_together_by_the_requests_of_each(tmp_path: Path) -> None:
    hits = {"all": 0.5, "home": 0.6, "search": 0.3}  # overall; `results` gives home 0.1 more and search 0.1 less
    jobs = []
    for name, hit in hits.items():
        folder = tmp_path / name
        jobs.append({"folder": str(folder), "words": f"ablation=unified_{name} train.seed=1", "error": None})
        (folder / "evaluate").mkdir(parents=True)
        write_json(folder / "evaluate" / "metrics.json", results(hit))
    write_json(tmp_path / "sweep.json", jobs)
    *_, own = collected(tmp_path, "unified", [f"unified_{name}" for name in hits])
    assert own.name == "each its own"
    assert (own.values["HR@10 home"], own.values["HR@10 search"]) == ([pytest.approx(0.7)], [pytest.approx(0.2)])
    assert own.values["HR@10"] == [pytest.approx((30 * 0.7 + 10 * 0.2) / 40)]
    assert [row.name for row in collected(tmp_path, "unified", ["unified_all", "unified_home"])] == ["all", "home"]


def test_a_table_of_which_no_job_went_well_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.json", [{"folder": str(tmp_path), "words": "ablation=position_none train.seed=1", "error": "it broke"}])
    with pytest.raises(RunError, match="no job went well"):
        collected(tmp_path, "position", ["position_none"])


def test_every_table_has_variants_and_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for table in TABLES:
        assert sum(name.startswith(f"{table}_") for name in choices()["ablation"]) >= 3
    code, _, err = said(capsys, "ablate", "positon")
    assert code == 2
    assert f"expected a table first, one of {', '.join(TABLES)}" in err


def test_models_of_one_scenario_are_asked_for_where_the_data_has_that_scenario(tmp_path: Path) -> None:
    config = compose_config(check(["data=mall", "data.mall.size=tiny", f"run_dir={tmp_path}"]))
    before = _variants("unified", config, None).split(",")
    assert {"unified_all", "unified_search", "unified_amazon_beauty"} <= set(before)
    run_all(config, [stage for stage in STAGES if stage.name == "prepare"])
    after = _variants("unified", config, None).split(",")
    assert set(before) - set(after) == {"unified_amazon_beauty", "unified_amazon_sports"}


def test_a_job_looks_for_its_policy_in_the_other_tables_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    made = [base / "ablation" / "position" / "0", base / "ablation" / "masked" / "1", tmp_path / "sweep" / "0"]
    for folder in made:
        (folder / "stages").mkdir(parents=True)
    assert _beside(str(base / "ablation" / "masked" / "0"), base) == [made[1], made[0]]
    assert _beside(str(made[1]), base) == [made[0]]
    assert _beside(str(tmp_path / "sweep" / "1"), base) == [*sorted(made[:2]), made[2]]
