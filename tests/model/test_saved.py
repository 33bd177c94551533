"""Which of a run's exported policies is served."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oxyray.errors import RunError
from oxyray.files import write_json
from oxyray.model.saved import model_folder
from oxyray.run import Run


def exported(run: Run, stage: str, seconds: int, stamp: dict[str, object] | None = None) -> Path:
    folder = run.path(stage, "model")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model.json", {})
    os.utime(folder / "model.json", (seconds, seconds))
    if stamp is not None:
        run.path("stages").mkdir(exist_ok=True)
        write_json(run.path("stages", f"{stage}.json"), stamp)
    return folder


def test_the_aligned_policy_is_served_unless_the_supervised_one_was_made_since(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match="oxyray pretrain"):
        model_folder(run)
    supervised = exported(run, "pretrain", 20)
    assert model_folder(run) == supervised
    aligned = exported(run, "align", 30)
    assert model_folder(run) == aligned
    assert model_folder(run, aligned=False) == supervised
    exported(run, "align", 10)  # without stamps the files' times are all there is
    assert model_folder(run) == supervised


def test_a_copy_that_lost_the_files_times_serves_the_same_policy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    supervised = exported(run, "pretrain", 20, {"made": "first"})
    aligned = exported(run, "align", 10, {"made": "later", "inputs": {"pretrain": "first"}})
    assert model_folder(run) == aligned
    exported(run, "pretrain", 5, {"made": "again"})
    assert model_folder(run) == supervised
