"""The files for clusters, as far as they can be checked without Kubernetes, and the sweep that has a name."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from oxyray.cli.command import COMMANDS
from oxyray.cli.compose import check, compose_config
from oxyray.cli.sweep import _combinations, parse

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "cluster"
JOB: dict[str, Any] = yaml.safe_load((FOLDER / "ray_job.yaml").read_text())
CLUSTER: dict[str, Any] = yaml.safe_load((FOLDER / "ray_cluster.yaml").read_text())


def gib(said: str) -> int:
    assert said.endswith("Gi")
    return int(said.removesuffix("Gi"))


def test_both_describe_one_cluster_of_16_nodes_with_8_gpus_behind_a_token() -> None:
    assert (CLUSTER["apiVersion"], CLUSTER["kind"], JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayCluster", "ray.io/v1", "RayJob")
    spec = CLUSTER["spec"]
    assert JOB["spec"]["rayClusterSpec"] == spec
    assert spec["authOptions"] == {"mode": "token"}
    assert f"]=={spec['rayVersion']}" in re.search(r'"ray\[.*?"', (ROOT / "pyproject.toml").read_text())[0]
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 16
    (worker,) = group["template"]["spec"]["containers"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    for container in (head, worker):
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert {each["name"] for each in worker["env"]} >= {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"}


def test_every_pod_has_shared_memory_and_the_shared_disk() -> None:
    claim = yaml.safe_load((FOLDER / "storage.yaml").read_text())
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = CLUSTER["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {each["name"]: each for each in pod["volumes"]}
        (container,) = pod["containers"]
        mounted = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        memory = mounted["/dev/shm"]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert gib(memory["sizeLimit"]) < gib(container["resources"]["limits"]["memory"]) / 2
        assert mounted["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_job_ends_by_itself_and_cleans_up_in_one_way_only() -> None:
    spec = JOB["spec"]
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] >= 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert "deletionStrategy" not in spec


def test_the_command_of_the_job_is_one_that_oxyray_takes() -> None:
    python, module, oxyray, stage, *words = shlex.split(JOB["spec"]["entrypoint"])
    assert (python, module, oxyray) == ("python", "-m", "oxyray")
    assert stage in COMMANDS
    config = compose_config(check(words))
    assert config.cluster.address == "auto"
    assert config.run_dir.startswith("/shared/")
    assert str(config.data.path).startswith("/shared/")
    assert config.train.workers == config.rank.workers == 16 * 8
    assert config.align.layout == "split"
    assert config.align.learners + config.align.rollouts == 8  # one node: what they share lies in its memory


def test_the_sweep_called_tau_is_table_11(tmp_path: Path) -> None:
    """The real script, with a set-up that installs nothing and an oxyray that prints its words."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "sweep.sh", tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").write_text(f"ROOT={tmp_path}\nVENV={tmp_path}\nset_up() {{ :; }}\nfail() {{ echo $*; exit 1; }}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "oxyray").write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; print(*sys.argv[1:], sep=chr(10))" "$@"\n')
    (tmp_path / "bin" / "oxyray").chmod(0o755)

    def words(*said: str) -> list[str]:
        done = subprocess.run(["bash", "launch/sweep.sh", *said], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    assert words("pretrain", "model.width=64,128") == ["pretrain", "-m", "hydra/launcher=ray", "model.width=64,128"]
    stage, multirun, launcher, *rest = words("tau", "run_dir=runs/mall", "cluster=running")
    assert (stage, multirun, launcher) == ("align", "-m", "hydra/launcher=ray")
    assert rest[-2:] == ["run_dir=runs/mall", "cluster=running"]
    jobs = [compose_config(check(job)) for job in _combinations(parse(rest))]
    assert [(job.align.objective.tau_positive, job.align.objective.tau_negative) for job in jobs] == [(1.0, 1.05), (1.0, 1.0), (1.0, 0.95)]
    check([launcher, *rest], sweep=True)
    assert stage in COMMANDS
