"""Write launch/requirements-{cpu,cuda,test,uv}.txt anew: every package that pyproject.toml's pins need, at one version, with hashes.

    python -m pip install uv packaging && python launch/lock.py

Versions already locked are kept where they still fit; `--upgrade` drops them. The files are for `pip install --no-deps --require-hashes
-r`, so pip resolves nothing: torchrec's own dependency on another fbgemm-gpu never comes into play. Hashes are kept for Linux on x86-64
and ARM, CPython 3.11 and 3.12. torch's CPU build has its own index and its own hashes, so requirements-cpu.txt leaves torch out and
launch/setup.sh installs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
TORCHREC = "torchrec==1.8.0"
UV = "uv==0.13.9"  # installs the lists
_CUDA_ONLY = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*)$")
_LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
_PYTHONS = {"cp311": 11, "cp312": 12}


def main() -> None:
    upgrade = "--upgrade" in sys.argv
    base = ["train", "wandb"]
    cpu = _resolve([*base, "cpu"], upgrade)
    cuda = _resolve([*base, "cuda"], upgrade)
    test = _resolve([*base, "cpu", "test"], upgrade)
    torchrec = _packages([TORCHREC], [], no_deps=True)
    _write("cpu", [p for p in cpu if not _CUDA_ONLY.match(p["name"])] + torchrec)
    _write("cuda", cuda + torchrec)
    known = {p["name"] for p in cpu}
    _write("test", [p for p in test if p["name"] not in known])
    _write("uv", _packages([UV], [], no_deps=True))


def _resolve(extras: list[str], upgrade: bool) -> list[dict[str, Any]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra])]
    wanted += ["hatchling==1.33.0"]  # builds the package itself
    locked = [] if upgrade else [line.split()[0] for file in sorted(ROOT.glob("launch/requirements-*.txt")) for line in _pins(file)]
    return _packages(wanted, [pin for pin in dict.fromkeys(locked) if not pin.startswith(("fbgemm", "torchrec"))])


def _pins(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if re.match(r"^[a-z0-9]", line)]


def _packages(wanted: list[str], constraints: list[str], no_deps: bool = False) -> list[dict[str, Any]]:
    """The resolved packages, as uv writes them to a pylock file."""
    with tempfile.TemporaryDirectory() as folder:
        needs, held, out = (Path(folder) / name for name in ("needs.in", "held.txt", "pylock.toml"))
        needs.write_text("\n".join(wanted))
        held.write_text("\n".join(constraints))
        words = ["-m", "uv", "pip", "compile", str(needs), "-c", str(held), "--python-version", "3.11", "--universal", "--quiet"]
        words += ["--format", "pylock.toml", "-o", str(out)] + (["--no-deps"] if no_deps else [])
        subprocess.run([sys.executable, *words], check=True, timeout=900)
        found: list[dict[str, Any]] = tomllib.loads(out.read_text())["packages"]
    return [package for package in found if "marker" not in package or Marker(package["marker"]).evaluate(dict(_LINUX))]


def _write(name: str, packages: list[dict[str, Any]]) -> None:
    lines = [f"# Written by launch/lock.py. pip install --no-deps --require-hashes -r launch/requirements-{name}.txt"]
    for package in sorted(packages, key=lambda package: package["name"]):
        hashes = _hashes(package)
        lines.append(f"{package['name']}=={package['version']} \\")
        lines += [f"    --hash=sha256:{digest}" + (" \\" if digest != hashes[-1] else "") for digest in hashes]
    (ROOT / f"launch/requirements-{name}.txt").write_text("\n".join(lines) + "\n")


def _hashes(package: dict[str, Any]) -> list[str]:
    fitting = [wheel["hashes"]["sha256"] for wheel in package.get("wheels", []) if _fits(wheel["url"].rpartition("/")[2])]
    if not fitting and "sdist" in package:
        fitting = [package["sdist"]["hashes"]["sha256"]]
    if not fitting:
        raise SystemExit(f"{package['name']}=={package['version']}: nothing to install on Linux")
    return sorted(set(fitting))


def _fits(filename: str) -> bool:
    """Whether a wheel can be installed on Linux (x86-64, ARM) with CPython 3.11 or 3.12."""
    for tag in parse_wheel_filename(filename)[3]:
        machine = tag.platform == "any" or (
            "linux" in tag.platform and "musl" not in tag.platform and tag.platform.endswith(("x86_64", "aarch64"))
        )
        interpreter = re.fullmatch(r"(py|cp)3(\d*)", tag.interpreter)
        newest = interpreter is not None and int(interpreter[2] or 0) <= 12
        exact = tag.interpreter in _PYTHONS or tag.interpreter.startswith("py") or tag.abi == "abi3"
        if machine and newest and exact:
            return True
    return False


if __name__ == "__main__":
    main()
