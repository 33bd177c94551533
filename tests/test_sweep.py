"""Sweeps, for real: Hydra's basic launcher, a Ray of the sweep's own, and a cluster that is already running."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oxyray.cli.compose import check
from oxyray.cli.jobs import Job, Outcome
from oxyray.cli.sweep import sweep
from oxyray.errors import Stopped

# A shop that is made in a moment.
SMALL = [
    "data.mall.size=tiny",
    "data.mall.items=140",
    "sid.width=64",
    "data.mall.users=20",
    "data.mall.days=20",
    "cluster.object_store_gb=0.1",
]


def oxyray(*words: str, cwd: Path, limit: float = 280, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | more
    return subprocess.run([sys.executable, "-m", "oxyray", *words], capture_output=True, text=True, timeout=limit, cwd=cwd, env=environment)


def jobs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())
    return found


def test_each_job_has_its_own_run_and_takes_what_fits_from_the_base(tmp_path: Path) -> None:
    assert oxyray("prepare", *SMALL, f"run_dir={tmp_path}/base", cwd=tmp_path).returncode == 0
    done = oxyray("run", "-m", "--dry-run", "seed=1,2", *SMALL, f"run_dir={tmp_path}/base", f"hydra.sweep.dir={tmp_path}/dry", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [job["words"] for job in jobs(tmp_path / "dry")] == ["seed=1", "seed=2"]
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "bookshop.yaml").write_text("name: bookshop\nsource: mall\nsplit: time\nmall: {size: tiny}\n")
    mine = ["data=bookshop", f"--config-dir={tmp_path}/mine", *SMALL[1:], f"run_dir={tmp_path}/base", f"hydra.sweep.dir={tmp_path}/own"]
    done = oxyray(
        "sid", "-m", "--dry-run", "sid.iterations=2,3", *SMALL, f"run_dir={tmp_path}/base", f"hydra.sweep.dir={tmp_path}/sid", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sid: would run") == 2
    done = oxyray("run", "-m", "--dry-run", "seed=1,2", *mine, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = oxyray("prepare", "-m", "data.core=0,2", *SMALL, f"run_dir={tmp_path}/base", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.glob("multirun/*/*")
    assert [job["error"] for job in jobs(folder)] == [None, None]
    for number, core in enumerate((0, 2)):
        run = folder / str(number)
        assert f"core: {core}" in (run / "config.yaml").read_text()
        assert (run / "data" / "meta.json").is_file()
        assert (run / "logs" / "latest" / "main.log").is_file()
    assert "2 of 2 jobs done" in done.stdout


def test_a_failing_job_is_told_when_it_fails_and_the_others_go_on(tmp_path: Path) -> None:
    done = oxyray(
        "prepare",
        "-m",
        "data.core=100000,0",  # nobody has so many events
        *SMALL,
        f"hydra.sweep.dir={tmp_path}/sweep",
        cwd=tmp_path,
        PYTHONUNBUFFERED="1",
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: job 0 (data.core=100000): ")
    assert "Traceback" not in done.stderr
    assert [job["error"] is None for job in jobs(tmp_path / "sweep")] == [False, True]
    assert "1 of 2 jobs done" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_jobs_that_train_share_the_base_and_one_ray(tmp_path: Path) -> None:
    """`oxyray ablate` on Ray: the base is prepared once, then the variants train and are measured side by side, each on workers of its
    own."""
    words = [*SMALL, "model=tiny", f"sid.cache_dir={tmp_path}/cache", f"run_dir={tmp_path}/base", "hydra/launcher=ray"]
    words += ["train.max_steps=2", "train.eval_requests=20", "cluster.cpus=2", "cluster.start_timeout_s=300"]
    words += [
        "experiment=null",
        "generate.beams=30",
        "train.seed=3",
        "ablation=composition_fused,composition_trigger",
        "evaluate.bootstrap=2",
    ]
    done = oxyray("ablate", "composition", *words, cwd=tmp_path, limit=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 jobs, 2 at a time") == 2, "training, then measuring"
    folder = tmp_path / "base" / "ablation" / "composition"
    assert [job["error"] for job in jobs(folder)] == [None, None]
    rows = json.loads((folder / "table.json").read_text())["rows"]
    for number, content in enumerate(("fused", "trigger")):
        run = folder / str(number)
        assert f"content: {content}" in (run / "config.yaml").read_text()
        assert (run / "sid").resolve() == tmp_path / "base" / "sid"
        assert json.loads((run / "pretrain" / "progress.json").read_text())["step"] == 2
        assert (run / "pretrain" / "model" / "model.json").is_file()
        measured = json.loads((run / "evaluate" / "metrics.json").read_text())["table"]
        overall = next(e for e in measured if (e["model"], e["protocol"], e["level"], e["scenario"]) == ("policy", "all", "item", None))
        assert (rows[number]["name"], rows[number]["values"]["HR@10"]) == (content, [overall["metrics"]["HR@10"]])
    assert not (tmp_path / "base" / "pretrain").exists()
    assert "| fused |" in (folder / "table.md").read_text()
    assert "<svg" in (folder / "table.svg").read_text()


def test_a_sweep_that_is_asked_to_end_starts_no_other_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def stopped(job: Job) -> Outcome:
        ran.append(job.number)
        raise Stopped("pretrain: stopped, give the same command again")

    monkeypatch.setattr("oxyray.cli.sweep.run_job", stopped)
    words = check(["seed=1,2,3", f"run_dir={tmp_path}/base", f"hydra.sweep.dir={tmp_path}/sweep"], sweep=True)
    (tmp_path / "sweep").mkdir()
    log = logging.getLogger("oxyray.of_a_sweep")
    with pytest.raises(Stopped, match="give the same command again"):
        sweep("pretrain", words)
    assert not log.disabled, "a job's warnings must reach its log"
    assert ran == [0]
    assert [job["error"].split(",")[0] for job in jobs(tmp_path / "sweep")] == ["stopped: pretrain: stopped", "not started", "not started"]


@pytest.mark.ray
def test_a_sweep_joins_a_cluster_that_is_already_running_and_tells_of_jobs_that_fail(
    tmp_path: Path, running_cluster: tuple[str, Path]
) -> None:
    address = running_cluster[0]
    words = ["data.core=100000,0", *SMALL, "data.mall.workers=2", "cluster=running"]  # nobody has so many events
    words += [f"hydra.sweep.dir={tmp_path}/sweep", "hydra.launcher.jobs_at_once=1"]
    done = oxyray("prepare", "-m", "hydra/launcher=ray", *words, cwd=tmp_path, RAY_ADDRESS=address)
    assert done.returncode == 1, done.stdout + done.stderr
    port = address.rpartition(":")[2]
    assert re.search(rf"^joined the Ray cluster at [0-9.]+:{port}$", done.stdout, re.M), done.stdout
    assert "2 jobs, 1 at a time" in done.stdout
    assert "error: job 0 (data.core=100000): " in done.stderr
    assert [job["error"] is None for job in jobs(tmp_path / "sweep")] == [False, True]
    assert (tmp_path / "sweep" / "1" / "data" / "meta.json").is_file()
