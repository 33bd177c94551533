"""The main job, small and whole, as a person runs it: from the embedded shop's logs to a report and recommendations."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import oxyray
from oxyray.cli.command import main
from oxyray.run import Run

STAGES = ["prepare", "sid", "pretrain", "rank", "align", "evaluate", "report"]


def command(folder: Path, *words: str) -> str:
    """What `oxyray WORDS` prints in `folder`; it must end well."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "oxyray", *words], capture_output=True, text=True, timeout=560, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def here(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The same in this process, which has what takes time to import."""
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_from_logs_to_recommendations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["debug=fast", "evaluate=quick", f"run_dir={tmp_path}/run", f"sid.cache_dir={tmp_path}/cache", "cluster.object_store_gb=0.2"]
    words += ["data.mall.items=300"]  # every title is embedded
    first = command(tmp_path, "run", *words)
    run = Run(tmp_path / "run")
    assert [stage for stage in STAGES if run.path("stages", f"{stage}.json").is_file()] == STAGES
    assert first.rstrip().endswith(f"open {run.path('report', 'report.html')} in a browser")
    assert {line["stage"] for line in run.metrics()} >= set(STAGES)
    for name in ("config.yaml", "versions.json", "logs/latest/main.log", "evaluate/predictions.parquet", "report/report.html"):
        assert run.path(name).is_file(), name

    second = here(capsys, "run", *words)
    assert [stage for n, stage in enumerate(STAGES, 1) if f"[{n}/{len(STAGES)}] {stage}: fresh, skipped" in second] == STAGES
    third = here(capsys, "run", "--dry-run", *words, "model.dropout=0.5")
    assert re.findall(r"^(\w+): (fresh|would run)", third, re.M) == [
        (stage, "fresh" if stage in ("prepare", "sid", "rank") else "would run") for stage in STAGES
    ]

    printed = here(capsys, "recommend", f"run_dir={run.folder}", "user=U000001", "scenario=search", "query=linen dress", "k=4")
    recommender = oxyray.Recommender.load(run.folder)
    answered = recommender.recommend("U000001", scenario="search", query="linen dress", k=4)
    assert "user U000001 at search, typing 'linen dress'" in printed
    assert len(answered.items) == 4
    for item in (*answered.recent, *answered.items):
        assert item.item_id in printed
        assert item.title[:40] in printed

    silent = recommender.recommend("U000001", scenario="search", k=4)
    assert [item.score for item in silent.items] != [item.score for item in answered.items], "what was typed counts"

    config = json.loads(run.path("stages", "pretrain.json").read_text())["settings"]
    assert config["train.max_steps"] == 5
