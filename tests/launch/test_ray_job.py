"""A stage as a job on a real head: started with launch/cluster/start.sh, behind a token, and sent to with launch/ray_job.sh."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from oxyray.cluster.upload import knock
from oxyray.errors import ClusterError

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Place:
    """A checkout of its own, and a head that was started from it."""

    checkout: Path
    environment: dict[str, str]
    address: str
    logs: Path

    def job(self, *words: str, **more: str) -> Done:
        words = ("bash", "launch/ray_job.sh", "--address", self.address, *words)
        return subprocess.run(words, cwd=self.checkout, env=self.environment | more, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if not (ROOT / ".venv" / "bin" / "ray").exists():
        pytest.skip("the scripts use the checkout's own .venv, and there is none")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:  # a short path: sockets lie in it
        folder = Path(name)
        copy_checkout(folder / "checkout")
        (folder / "home").mkdir()
        for last in (False, False, True):  # Ray gives its own processes 30 seconds, which a loaded machine may pass
            head, found = start(folder)
            try:
                if answers(head, found, folder / "said"):
                    yield found
                    assert head.poll() is None, f"the head ended by itself: {(folder / 'said').read_text()[-3000:]}"
                    return
                assert not last, f"the head does not answer: {(folder / 'said').read_text()[-3000:]}"
            finally:
                end(head, found)


def copy_checkout(to: Path) -> None:
    for part in ("oxyray", "conf", "hydra_plugins", "launch"):
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", to)
    (to / ".venv").symlink_to(ROOT / ".venv")
    # A choice that only this checkout has: who knows it runs what was uploaded.
    (to / "conf" / "data" / "corner.yaml").write_text("# A corner shop.\nname: corner\nsource: mall\nmall:\n  size: tiny\n")
    (to / "runs").mkdir()
    (to / "runs" / "left.txt").write_text("not uploaded")


def start(folder: Path) -> tuple[subprocess.Popen[bytes], Place]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    environment |= {"HOME": str(folder / "home"), "no_proxy": "127.0.0.1"}
    environment |= {"RAY_ADDRESS": "127.0.0.1:1"}  # an old address, which must not matter
    environment |= {"RAY_health_check_timeout_ms": "60000"}  # nobody is dead because the machine is loaded
    ports = dict(zip(("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"), free_ports(4), strict=True))
    words = ["bash", "launch/cluster/start.sh", "--block", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}/ray"]
    words += ["--node-ip-address=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
    with open(folder / "said", "wb") as said:
        head = subprocess.Popen(words, cwd=folder / "checkout", env=environment, stdout=said, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    return head, Place(folder / "checkout", environment, address, folder / "ray" / "session_latest" / "logs")


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def answers(head: subprocess.Popen[bytes], place: Place, said: Path) -> bool:
    """Whether the head comes up, its dashboard too, and stays up when Ray looks after its processes for the first time."""
    os.environ["RAY_AUTH_TOKEN_PATH"] = f"{place.environment['HOME']}/.ray/auth_token"
    ends = time.monotonic() + 240
    try:
        while head.poll() is None and time.monotonic() < ends:
            if "block forever" in said.read_text():
                with suppress(ClusterError):
                    assert knock(place.address) == "token"
                    time.sleep(1.5)
                    return head.poll() is None
            time.sleep(0.3)
        return False
    finally:
        del os.environ["RAY_AUTH_TOKEN_PATH"]


def end(head: subprocess.Popen[bytes], place: Place) -> None:
    """The head, and what it started and left: whoever has this test's home, and nobody else."""
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(timeout=30)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == place.environment["HOME"]:
                process.kill()
    head.wait(timeout=30)


@pytest.fixture(scope="module")
def ended(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done, Done]:
    """A run folder, the job that made it, and one that cannot work, sent at the same time."""
    run = tmp_path_factory.mktemp("shared") / "run"
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(place.job, "prepare", "debug=fast", "data=corner", "data.mall.workers=2", f"run_dir={run}")
        bad = pool.submit(place.job, "prepare", "data=corner", "model.heads=7", f"run_dir={run}-none")
        return run, good.result(), bad.result()


def test_a_stage_runs_there_and_its_log_is_followed_to_the_end(place: Place, ended: tuple[Path, Done, Done]) -> None:
    run, done, _ = ended
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^upload: \d+ files, [\d.]+ MiB zipped", done.stderr, re.M)
    assert re.search(r"^  left out: .*runs", done.stderr, re.M)
    assert re.search(r"^prepare: done in ", done.stdout, re.M)
    assert (run / "data" / "meta.json").is_file()
    config = (run / "config.yaml").read_text()
    assert "name: corner" in config
    assert "address: auto" in config
    # It joined, for two blocks of users: somebody worked for another driver than the dashboard's, which is the first.
    assert list(place.logs.glob("worker-*-02000000-*.out"))


def test_a_job_that_cannot_work_ends_with_its_own_error_and_status(ended: tuple[Path, Done, Done]) -> None:
    run, _, done = ended
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"^error: model.heads: .*", done.stdout, re.M)
    assert re.search(r"^error: job oxyray-prepare-\S+ failed with exit status 2$", done.stderr, re.M)
    assert "Traceback" not in done.stdout + done.stderr
    assert not Path(f"{run}-none").exists()


def test_nothing_is_sent_with_a_wrong_token_or_when_rehearsing(place: Place, tmp_path: Path) -> None:
    done = place.job("prepare", f"run_dir={tmp_path}/run", RAY_AUTH_TOKEN="wrong")
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {place.address} refuses the token: bring the head's own")
    assert done.stdout == ""
    done = place.job("--dry-run", "prepare", "debug=fast", f"run_dir={tmp_path}/run", HOME=str(tmp_path))
    assert done.returncode == 0
    assert f"would run on the cluster: python -m oxyray prepare debug=fast run_dir={tmp_path}/run cluster.address=auto" in done.stderr


def test_interrupting_leaves_the_job_and_says_how_to_follow_and_to_stop_it(place: Place, tmp_path: Path) -> None:
    words = ["bash", "launch/ray_job.sh", f"--address={place.address}", "prepare", "data.mall.size=medium", f"run_dir={tmp_path}/run"]
    with open(tmp_path / "said", "w") as file:
        both = {"stdout": file, "stderr": subprocess.STDOUT}
        # Who runs the tests may have told their processes to pass over an interrupt; a person's shell has not.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        job = subprocess.Popen(words, cwd=place.checkout, env=place.environment, start_new_session=True, preexec_fn=heed, **both)
    try:
        for _ in range(240):
            if (tmp_path / "run" / "logs").exists():
                break
            time.sleep(0.5)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(timeout=60) == 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    assert re.search(
        r"^  follow it again: +RAY_API_SERVER_ADDRESS=\S+ RAY_AUTH_MODE=token \S+/ray job logs --follow oxyray-prepare-", said, re.M
    )
    (stop,) = re.findall(r"^  stop it: +(.*)$", said, re.M)
    done = subprocess.run(["bash", "-c", stop], cwd=tmp_path, env=place.environment, capture_output=True, text=True, timeout=120)
    assert "was stopped" in done.stdout + done.stderr, done.stdout + done.stderr
