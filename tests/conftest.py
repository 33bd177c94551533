"""What all tests share: one thread a process, no network, no Ray or wandb of somebody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public data sets:

    $OXYRAY_TEST_DATA, else ../shared/data beside the checkout. Tests that need it are skipped without it.
    """
    folder = Path(os.environ.get("OXYRAY_TEST_DATA", "") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no public data: set OXYRAY_TEST_DATA to a folder like {folder}")
    return folder
