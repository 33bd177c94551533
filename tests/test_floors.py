"""The house stands as drawn: imports never point up, and each heavy library is imported only where it may be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BLOCKER = """
import importlib, pkgutil, sys
forbidden = {forbidden!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in forbidden:
            raise ImportError(f'{{name}} is not installed here')
sys.meta_path.insert(0, Blocker())
for name in {names!r}:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, '__path__', []), name + '.'):
        importlib.import_module(found.name)
"""


def test_the_import_contracts_hold() -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("names", "forbidden"),
    [
        # On a GPU machine with torch alone, the policy and its generation work.
        (
            ["oxyray.model", "oxyray.sid", "oxyray.generate", "oxyray.data"],
            ["ray", "deepspeed", "torchrec", "fbgemm_gpu", "hydra", "omegaconf", "wandb"],
        ),
        (["oxyray.evaluate"], ["ray", "deepspeed", "torchrec", "fbgemm_gpu", "hydra", "omegaconf", "wandb"]),
        # `oxyray --help`, `--dry-run` and the pipeline's bookkeeping start without the heavy libraries.
        (
            ["oxyray.cli.command", "oxyray.cli.help", "oxyray.pipeline", "oxyray.doctor", "oxyray.tracking"],
            ["torch", "ray", "deepspeed", "torchrec", "pyarrow", "wandb"],
        ),
        (["oxyray.config", "oxyray.run", "oxyray.cluster"], ["torch", "ray", "hydra", "omegaconf"]),
        (["oxyray.train"], ["hydra", "omegaconf", "wandb"]),
    ],
    ids=["core", "evaluate", "command line", "ground", "train"],
)
def test_rooms_import_without_what_they_may_not_use(names: list[str], forbidden: list[str]) -> None:
    code = _BLOCKER.format(names=names, forbidden=forbidden)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_wait_has_a_limit() -> None:
    """No call that waits for another process is without one."""
    root = Path(__file__).parents[1] / "oxyray"
    for path in [*root.glob("align/*.py"), *root.glob("cluster/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "ray.get(" in line or "ray.wait(" in line:
                assert "timeout" in line, f"{path.name}:{number} waits without a limit"
