"""The doctor: the version rule, real imports on this machine, and that it never raises."""

from __future__ import annotations

import pytest

import oxyray.doctor as doctor
from oxyray.cli.command import main
from oxyray.config import ClusterConfig
from oxyray.doctor import Check, examine, pair_state, render, verdict


@pytest.mark.parametrize(
    ("torch", "fbgemm", "state"),
    [
        ("2.13.0+cpu", "1.8.0", "good"),
        ("2.13.0", "1.8.0", "good"),
        ("2.13.0", "1.7.0", "bad"),
        ("2.12.1", "1.8.0", "bad"),
        ("2.12.1", "1.7.3", "good"),
        ("3.0.0", "2.0.0", "note"),
        (None, "1.8.0", "bad"),
        ("2.13.0", None, "bad"),
    ],
)
def test_fbgemm_1_x_goes_with_torch_2_x_plus_5(torch: str | None, fbgemm: str | None, state: str) -> None:
    assert pair_state(torch, fbgemm).state == state


def test_a_wrong_pair_names_the_right_one() -> None:
    assert "needs fbgemm 1.8.*" in pair_state("2.13.0", "1.9.0").mend


@pytest.mark.ray
def test_this_machine_is_examined_for_real(no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The machine that runs the tests has the pinned set, so nothing may be bad."""
    code = main(["doctor", "cluster.cpus=1"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "this machine is fit" in out
    assert "started Ray with 1 CPUs, a task ran" in out
    for name in (
        "python",
        "cores",
        "memory",
        "/dev/shm",
        "disk here",
        "packages",
        "torch and fbgemm",
        "cuda",
        "deepspeed",
        "ray",
        "browser",
    ):
        assert name in out


def test_a_check_that_breaks_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Check]:
        raise OSError("no such device")

    quick = [Check("quick", "good", "yes")]
    for name in ("_packages", "_devices", "_browser"):
        monkeypatch.setattr(doctor, name, lambda: quick)
    monkeypatch.setattr(doctor, "_imports", lambda *words: quick[0])
    monkeypatch.setattr(doctor, "_ray", lambda cluster: quick[0])
    monkeypatch.setattr(doctor, "_memory", broken)
    found = list(examine(ClusterConfig()))
    assert any(check.state == "note" and "OSError: no such device" in check.found for check in found)
    assert found[-1] == quick[0]


def test_a_cluster_that_does_not_answer_is_told_not_waited_for() -> None:
    check = doctor._ray(ClusterConfig(address="127.0.0.1:1"))
    assert check.state == "bad"
    assert "cluster.address=127.0.0.1:1: no answer" in check.found


def test_a_process_that_dies_or_hangs_is_told() -> None:
    assert doctor._python_says("import os; os.abort()", 30) == (False, "the process died of signal 6")
    assert doctor._python_says("import time; time.sleep(60)", 0.5) == (False, "no answer within 0 s")


def test_the_table_and_its_verdict() -> None:
    bad = Check("thing", "bad", "broken " * 30, "Mend it")
    assert render(bad).startswith("BAD   thing ")
    assert max(map(len, render(bad).splitlines())) <= 145
    assert verdict([bad, bad]) == "2 things to mend"
    assert verdict([Check("thing", "note", "so so")]) == "this machine is fit"
