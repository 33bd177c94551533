"""The command line: one clear line for each mistake, exit codes, help at both levels, dry runs, and no way to name code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import oxyray.cli.command
from oxyray.cli.command import main
from oxyray.errors import DataError, Stopped
from oxyray.pipeline import STAGES


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepar"], "prepar: no such stage; did you mean prepare?"),
        (["model.width=3"], "model.width=3: expected a stage first"),
        (["run", "--frobnicate"], "--frobnicate: no such option; `oxyray --help` lists the options"),
        (["run", "--model.width=3"], "--model.width=3: no such option: keys are written without dashes: model.width=3"),
        (["run", "model.widht=3"], "model.widht: no such key; did you mean model.width?"),
        (["run", "+model.depth=3"], "model.depth: no such key;"),
        (["run", "lr=3"], "lr: no such key; did you mean fuse.optim.lr or train.optim.lr or rank.optim.lr?"),
        (["run", "model"], "model: expected key=value"),
        (["run", "model.width=["], "model.width=[: cannot be read"),
        (["run", "train.optim=3"], "train.optim: a group of keys; set one of them, as in train.optim.lr=..."),
        (["run", "model.width=wide"], "model.width: expected a whole number, got 'wide'"),
        (["run", "model.width=32,64"], "model.width=32,64: several values make a sweep: add -m"),
        (["run", "-m", "model.width=interval(1,5)"], "model.width=interval(1,5): a sweep needs a list of values"),
        (["run", "data=mal"], "data=mal: no such choice; did you mean mall?"),
        (["run", "data=[mall,tables]"], "data=[mall,tables]: data takes one of"),
        (["run", "data@model=mall"], "data@model=mall: a group stays where it is"),
        (["run", "experiment=nope"], "experiment=nope: no such choice;"),
        (["run", "~data"], "~data: data cannot be left out"),
        (["run", "~model.width"], "~model.width: a key cannot be taken away; its default is 64"),
        (["run", "data=tables"], "data.path: must be given: data.path=..."),
        (["run", "data=amazon_beauty"], "data.path: must be given: data.path=..."),
        (["run", "experiment=amazon_beauty", "data.path=/my/tables"], "data.path: is /my/tables, but data=mall makes its shop itself"),
        (["run", "model.heads=5"], "model.heads: 5 heads do not divide model.width=64: set model.width=60"),
        (["run", "generate.beams=5"], "generate.beams: 5 beams cannot fill the top 30 of evaluate.ks"),
        (["run", "data.mall.items=20"], "generate.beams: 50 beams are wider than the catalogue of 20 items at most"),
        (["run", "-m", "model.width=32,30"], "job 1 (model.width=30): model.heads: 4 heads do not divide model.width=30"),
        (["run", "hydra.run.dir=/x"], "hydra.run.dir=/x: Hydra's own settings are for sweeps"),
        (["run", "--config-dir", "/no/such"], "--config-dir /no/such: no such folder"),
        (["run", "--config-dir"], "--config-dir: expected a folder after it"),
        (["recommend", "-m", "user=1"], "recommend: takes neither -m nor --dry-run"),
        (["recommend", "user=1", "model.width=3"], "model.width: recommend uses the configuration of the run"),
        (["recommend", "user=1", "k=0"], "recommend.k: must be at least 1, got 0"),
        (["recommend", "user=1", "k=many"], "recommend.k: expected a whole number, got 'many'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *words)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    "words",
    [
        ["run", "model._target_=os.system"],
        ["run", "+model={_target_: os.system}"],
        ["run", "data.items_columns={_target_: os.system}"],
        ["run", "data.items_columns._target_=os.system"],
        ["run", "train._partial_=true"],
        ["run", "-m", "seed=1,2", "hydra.launcher._target_=os.system"],
        ["run", "-m", "seed=1,2", "hydra.launcher={_target_: os.system}"],
        ["run", "-m", "seed=1,2", "+hydra.callbacks.x._target_=os.system"],
        ["run", "-m", "seed=1,2", "hydra.callbacks={x: {_target_: os.system}}"],
        ["run", "-m", "seed=1,2", "hydra.job_logging={handlers: {x: {class: os.system}}}"],
        ["run", "-m", "seed=1,2", "hydra/callbacks=x"],
        ["run", "-m", "seed=1,2", "hydra.searchpath=[pkg://os]"],
    ],
)
def test_a_configuration_cannot_name_code(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, *words)
    assert code == 2
    assert "refused" in err or "not open" in err
    assert err.count("\n") == 1


def test_a_file_of_ones_own_cannot_name_code_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "evil.yaml").write_text("_target_: os.system\ncommand: touch /tmp/evil\n")
    code, _, err = said(capsys, "run", "model=evil", "--config-dir", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "model._target_: refused" in err


def test_help_names_every_stage_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert all(stage.name in out and stage.about in out for stage in STAGES)
    assert "oxyray run data=mall" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", [*(stage.name for stage in STAGES), "run", "recommend", "doctor"])
def test_help_of_a_stage_lists_its_keys_with_the_values_in_force(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"oxyray {name}: ")
    if name in ("pretrain", "run"):
        assert "model.width=64 " in out
        assert "model.width=128 " in said(capsys, name, "model.width=128", "--help")[1]


def test_no_word_at_all_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys)
    assert code == 2
    assert "usage: oxyray STAGE" in out


def test_a_dry_run_writes_the_configuration_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "run", "--dry-run", f"run_dir={tmp_path}", "model.width=32", "train.optim.lr=3e-3")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()[: len(STAGES) - 1]] == [
        stage.name for stage in STAGES if stage.name != "fuse"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["dry_run.yaml"]
    written = yaml.safe_load((tmp_path / "dry_run.yaml").read_text())
    assert (written["model"]["width"], written["train"]["optim"]["lr"], written["seed"]) == (32, 0.003, 7)


def test_a_dry_run_finds_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "run", "--dry-run", f"run_dir={tmp_path}/run", "data=tables", f"data.path={tmp_path}/none")
    assert (code, err) == (1, f"error: data.path={tmp_path}/none: no such file or folder\n")


def test_a_later_stage_alone_names_the_one_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "pretrain", f"run_dir={tmp_path}")
    assert code == 1
    assert err == f"error: pretrain needs prepare, which {tmp_path} does not hold: run `oxyray prepare` (or `oxyray run`) first\n"


def test_recommend_without_a_run_says_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "recommend", "user=1", f"run_dir={tmp_path}")
    assert code == 1
    assert str(tmp_path) in err
    assert "holds no run" in err


def test_an_error_behind_other_errors_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrapped(RuntimeError):  # as Ray wraps what a worker raised
        cause = DataError("events.parquet, row 3: no such item")

    def fail(name: str, config: object) -> None:
        raise ValueError("several things went wrong") from Wrapped("worker died")

    monkeypatch.setattr(oxyray.cli.command, "perform", fail)
    code, _, err = said(capsys, "run")
    assert (code, err) == (1, "error: events.parquet, row 3: no such item\n")


def test_a_stage_that_was_asked_to_stop_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(command: object) -> int:
        raise Stopped("pretrain: stopped on request after step 7")

    monkeypatch.setattr(oxyray.cli.command, "_carry_out", stopped)
    assert said(capsys, "pretrain") == (0, "pretrain: stopped on request after step 7\n", "")


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(name: str, config: object) -> None:
        raise ZeroDivisionError("by nobody")

    monkeypatch.setattr(oxyray.cli.command, "perform", fail)
    code, _, err = said(capsys, "run")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: unexpected ZeroDivisionError, see above; ")


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "oxyray", "prepar"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: prepar: no such stage")
