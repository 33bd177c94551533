"""The kernel against the formula: on a GPU, or by Triton's interpreter where Triton is installed (`pip install triton`), in a process of
its own, as Triton decides that when it is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

CHECK = """
import torch
from oxyray.generate.kernels import gathered_products, usable

device = "cuda" if torch.cuda.is_available() else "cpu"
random = torch.Generator().manual_seed(3)
for states, rows, room, width in ((1, 4, 1, 3), (5, 40, 7, 200), (3, 9, 70, 128), (4, 33, 32, 16)):
    hidden_MD, vector_VD = (torch.randn(n, width, generator=random).to(device) for n in (states, rows))
    row_MF = torch.randint(0, rows, (states, room), generator=random).to(device)
    assert usable(hidden_MD)
    assert not usable(hidden_MD.double())
    want = (hidden_MD[:, None] * vector_VD[row_MF]).sum(-1)
    torch.testing.assert_close(gathered_products(hidden_MD, vector_VD, row_MF), want, atol=1e-4, rtol=1e-4)
    turned = vector_VD.T.contiguous().T
    torch.testing.assert_close(gathered_products(hidden_MD, turned, row_MF), want, atol=1e-4, rtol=1e-4)
    half = gathered_products(hidden_MD.bfloat16(), vector_VD.bfloat16(), row_MF)
    rounded = (hidden_MD.bfloat16().float()[:, None] * vector_VD.bfloat16().float()[row_MF]).sum(-1)
    torch.testing.assert_close(half, rounded, atol=1e-4, rtol=1e-4)
print("all the same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_is_the_formula() -> None:
    variables = os.environ if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=variables, capture_output=True, text=True, timeout=200)
    assert "all the same" in done.stdout, done.stderr[-2000:]


def test_without_a_gpu_nobody_uses_it() -> None:
    from oxyray.generate.kernels import usable

    assert not usable(torch.zeros(2, 3)) or os.environ.get("TRITON_INTERPRET") == "1"
