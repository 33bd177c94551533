"""The one product that PyTorch cannot do without writing its operands out first: each state with its own few rows of the output matrix.

In Triton, which comes with torch where there are GPUs. `TRITON_INTERPRET=1` runs it on a CPU too, for its test.

Legend: M states, F rows a state, V rows of the matrix, D width.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

Tensor = torch.Tensor


@cache
def _kernel() -> Any:
    """None where there is no Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def products(hidden, vector, row, out, room, width, hidden_stride, vector_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """One state, ROWS of its rows: the hidden state stays, the rows pass by."""
        state, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
        place_f = first + tl.arange(0, ROWS)
        here_f = place_f < room
        row_f = tl.load(row + state * room + place_f, mask=here_f, other=0)
        total_f = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, width, WIDTH):
            place_d = start + tl.arange(0, WIDTH)
            inside_d = place_d < width
            hidden_d = tl.load(hidden + state * hidden_stride + place_d, mask=inside_d, other=0.0).to(tl.float32)
            vector_fd = tl.load(
                vector + row_f[:, None] * vector_stride + place_d[None, :], mask=here_f[:, None] & inside_d[None, :], other=0.0
            ).to(tl.float32)
            total_f += tl.sum(vector_fd * hidden_d[None, :], axis=1)
        tl.store(out + state * room + place_f, total_f, mask=here_f)

    return triton, products


def usable(hidden_MD: Tensor) -> bool:
    """On a GPU with Triton; float64 is for tests alone, and has no place here."""
    on_device = hidden_MD.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return on_device and hidden_MD.dtype != torch.double and _kernel() is not None


def gathered_products(hidden_MD: Tensor, vector_VD: Tensor, row_MF: Tensor) -> Tensor:
    """`(hidden_MD[:, None] * vector_VD[row_MF]).sum(-1)`, in float32: (M, F)."""
    triton, products = _kernel()
    (states, room), width = row_MF.shape, hidden_MD.shape[1]
    hidden_MD, vector_VD, row_MF = hidden_MD.contiguous(), vector_VD.contiguous(), row_MF.contiguous()
    out_MF = torch.empty(states, room, dtype=torch.float32, device=hidden_MD.device)
    rows = min(32, triton.next_power_of_2(room))
    grid = (states, triton.cdiv(room, rows))
    products[grid](
        hidden_MD,
        vector_VD,
        row_MF,
        out_MF,
        room,
        width,
        hidden_MD.stride(0),
        vector_VD.stride(0),
        ROWS=rows,
        WIDTH=min(128, triton.next_power_of_2(width)),
    )
    return out_MF
