"""The one way to Ray: every stage that uses it joins the cluster that is asked for, or says within its limit why not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oxyray.cluster.start import one_ray, ray_for
from oxyray.config import ClusterConfig, Config, MallConfig, SidConfig, from_dict
from oxyray.data import mall
from oxyray.errors import ClusterError
from oxyray.sid.encoder import encode

pytestmark = pytest.mark.usefixtures("no_ray")

# Two blocks of users, so that there is work for more than one worker.
SHOP = {"size": "tiny", "seed": 3, "workers": 2}


@pytest.fixture
def nobody() -> str:
    """An address where no cluster listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_every_stage_asks_the_cluster_that_it_was_given(tmp_path: Path, nobody: str) -> None:
    cluster = ClusterConfig(address=nobody, start_timeout_s=20)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"cluster.address={nobody}: no answer .*data.mall.workers=1 does without Ray"):
        mall.write(MallConfig(**SHOP), tmp_path / "shop", cluster)
    assert not (tmp_path / "shop").exists()
    with pytest.raises(ClusterError, match=rf"cluster.address={nobody}: no answer .*sid.workers=1 does without Ray"):
        encode(["a pan", "a pot"], SidConfig(workers=2, cache_dir=str(tmp_path / "cache")), cluster)
    with pytest.raises(ClusterError, match=rf"cluster.address={nobody}: no answer"), ray_for(cluster, 1):
        pass
    assert time.monotonic() - began < 60


def test_prepare_hands_the_cluster_down(tmp_path: Path, nobody: str) -> None:
    from oxyray.data.prepare import prepare
    from oxyray.run import Run

    values = {"run_dir": str(tmp_path), "cluster": {"address": nobody}, "data": {"name": "shop", "source": "mall", "mall": SHOP}}
    with pytest.raises(ClusterError, match=f"cluster.address={nobody}"):
        prepare(from_dict(Config, values), Run(tmp_path))


@pytest.mark.ray
def test_stages_in_a_row_share_the_ray_that_the_first_one_starts() -> None:
    import ray

    config, seen = ClusterConfig(cpus=1, object_store_gb=0.1, start_timeout_s=200), []
    with one_ray(3):
        assert not ray.is_initialized(), "who needs none starts none"
        for workers in (1, 2):
            with ray_for(config, workers):
                seen.append((ray.get_runtime_context().gcs_address, ray.cluster_resources()["CPU"]))
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert seen == [(seen[0][0], 3.0)] * 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_works_on_the_running_cluster(tmp_path: Path, running_cluster: tuple[str, Path]) -> None:
    """Who joined is read from the cluster's own logs: each driver leaves one."""
    address, logs = running_cluster
    words = ["prepare", "cluster=running", "data.mall.size=tiny", "data.mall.workers=2", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "oxyray", *words],
        capture_output=True, text=True, timeout=400, cwd=tmp_path, env=os.environ | {"RAY_ADDRESS": address},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(logs.glob("python-core-driver-*"))) == 1
