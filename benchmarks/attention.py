"""Attention over packed documents: ours, document by document, beside what is usually taken for it, on the same queries, keys and values.

Six documents of different lengths are packed end to end: long ones with the heads of a large model, and histories of users with the heads
of the embedded shop's. Peers: FlexAttention under torch.compile with a block mask (on CPUs it has no
backward), the plain formula with a dense mask under torch.compile, and scaled_dot_product_attention with a dense mask. Masks and block
masks are made beforehand, outside the timing, and so is our description; all results are compared before anything is timed. The ways take
turns; told are medians. Runs with torch alone, on whatever device there is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.harness import Cell, Report, arguments, medians
from oxyray.model.attention import Documents, attend

SEED = 7
SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {  # lengths, heads, width of a head
    "long documents": ((352, 96, 512, 160, 704, 224), 8, 64),
    "histories": ((120, 33, 250, 64, 180, 75), 4, 16),
}
Tensor = torch.Tensor
Way = Callable[[], Tensor]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 3 if options.quick else 25
    sizes = {name: (tuple(n // 8 for n in lengths), heads, width) for name, (lengths, heads, width) in SIZES.items()}
    sizes = sizes if options.quick else SIZES
    settings = {"sizes": sizes, "threads": torch.get_num_threads(), "device": device}
    report = Report("attention", settings | {"rounds": rounds}, [SEED])
    torch.manual_seed(SEED)
    for name, (lengths, heads, width) in sizes.items():
        given = [torch.randn(sum(lengths), heads, width, device=device) for _ in range(3)]
        offset_B = torch.tensor([0, *lengths], device=device).cumsum(0)
        for mask, documents in (("bidirectional", Documents.bidirectional(offset_B)), ("causal", Documents.causal(offset_B))):
            one_mask(report, f"{name}, {mask}", documents, given, rounds)
    report.finish(options.quick)


def one_mask(report: Report, mask: str, documents: Documents, given: list[Tensor], rounds: int) -> None:
    q, k, v = given
    dense_QK = documents.mask()
    _ = documents.calls, documents.order_Q  # made once for all layers of a model
    flex, plain = flex_of(documents), torch.compile(formula)
    forward: dict[str, Way] = {
        "ours": lambda: attend(q, k, v, documents),
        "FlexAttention": lambda: flex(heads_first(q), heads_first(k), heads_first(v))[0].transpose(0, 1),
        "torch.compile": lambda: plain(heads_first(q), heads_first(k), heads_first(v), dense_QK)[0].transpose(0, 1),
        "SDPA, dense mask": lambda: dense(q, k, v, dense_QK),
    }
    with torch.no_grad():
        for name, way in forward.items():
            torch.testing.assert_close(way(), forward["ours"](), atol=2e-4, rtol=2e-3, msg=name)
        times = medians(forward, rounds, warm=1)
    learned = [x.clone().requires_grad_() for x in given]

    def both(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
        def run() -> Tensor:
            out = way(learned[0], learned[1], learned[2])
            torch.autograd.grad(out.sum(), learned)
            return out

        return run

    pair = {
        "ours": both(lambda q, k, v: attend(q, k, v, documents)),
        "SDPA, dense mask": both(lambda q, k, v: dense(q, k, v, dense_QK)),
    }
    trained = medians(pair, rounds, warm=1)
    rows: list[list[Cell]] = [
        [name, 1e3 * seconds, seconds / times["ours"], 1e3 * trained[name] if name in trained else None,
         trained[name] / trained["ours"] if name in trained else None] for name, seconds in times.items()
    ]  # fmt: skip
    columns = ["way", "forward ms", "against ours", "forward and backward ms", "against ours"]
    report.table(f"6 {mask} (medians of {rounds} rounds in turns)", columns, rows)
    report.claim(f"against FlexAttention, {mask}: forward", times["FlexAttention"] / times["ours"], 4, "×")
    report.claim(f"against torch.compile, {mask}: forward", times["torch.compile"] / times["ours"], 8, "×")
    against = trained["SDPA, dense mask"] / trained["ours"]
    report.claim(f"against SDPA with a dense mask, {mask}: forward and backward", against, 2.5, "×")


def heads_first(x_QHE: Tensor) -> Tensor:
    return x_QHE.transpose(0, 1)[None]


def dense(q: Tensor, k: Tensor, v: Tensor, mask_QK: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), mask_QK)[0].transpose(0, 1)


def formula(q: Tensor, k: Tensor, v: Tensor, mask_QK: Tensor) -> Tensor:
    score = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask_QK, -torch.inf)
    return score.softmax(-1) @ v


def flex_of(documents: Documents) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    begin_Q = documents.key_offset_B[:-1].repeat_interleave(torch.diff(documents.query_offset_B))
    end_Q = begin_Q + documents.reach_Q
    count = len(begin_Q)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= begin_Q[query]) & (key < end_Q[query])

    block = create_block_mask(sees, None, None, count, count, device=str(begin_Q.device))
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block)


if __name__ == "__main__":
    main()
