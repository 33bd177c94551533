"""What all tests share: one thread a process, no network, no Ray or wandb of somebody else's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so; else its workers are nice by 15 and starve beside other work
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112
os.environ.pop("RAY_ADDRESS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with a long one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public data sets:

    $OXYRAY_TEST_DATA, else ../shared/data beside the checkout. Tests that need it are skipped without it.
    """
    folder = Path(os.environ.get("OXYRAY_TEST_DATA", "") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no public data: set OXYRAY_TEST_DATA to a folder like {folder}")
    return folder


@pytest.fixture(scope="module")
def shared_ray() -> None:
    """A Ray of this process with room for six, started once for all tests that work on any: starting one takes eight seconds of a core.
    Whoever needs a Ray of his own asks for `no_ray`."""
    from oxyray.cluster.start import start
    from oxyray.config import ClusterConfig

    start(ClusterConfig(object_store_gb=0.2, start_timeout_s=300), local_cpus=6, quiet=True)


@pytest.fixture(scope="module")
def no_ray() -> None:
    """This process has no Ray when the tests begin."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def running_cluster() -> Iterator[tuple[str, Path]]:
    """A Ray cluster of its own, started as a person would, ended by its own process: its address, and the folder of its logs."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a short path: sockets lie in it
    for last in (False, False, True):  # Ray gives its own processes 30 seconds, which a loaded machine may pass
        cluster, address, said = _ray_start(folder)
        if "Ray runtime started" in said:
            break
        _end(cluster)
        assert not last, f"`ray start` did not work: {said[-2000:]}"
    try:
        yield address, folder / "session_latest" / "logs"
    finally:
        _end(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def _ray_start(folder: Path) -> tuple[subprocess.Popen[bytes], str, str]:
    """The process, the address and what it said until it was up, ended, or two minutes had passed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    words += ["--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder}"]
    log = folder / "said"
    with open(log, "wb") as file:
        cluster = subprocess.Popen([str(Path(sys.executable).parent / "ray"), *words], stdout=file, stderr=subprocess.STDOUT)
    for _ in range(240):
        if cluster.poll() is not None or "Ray runtime started" in log.read_text():
            break
        time.sleep(0.5)
    return cluster, f"127.0.0.1:{port}", log.read_text()


def _end(cluster: subprocess.Popen[bytes]) -> None:
    cluster.send_signal(signal.SIGTERM)
    try:
        cluster.wait(timeout=60)
    except subprocess.TimeoutExpired:
        cluster.kill()
