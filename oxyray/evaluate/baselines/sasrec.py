"""SASRec (Kang and McAuley, 2018) with full cross-entropy: a causal transformer over item ids, trained at every position in one pass.

It reads the same visible histories as the policy and ignores scenario and trigger. Windows of a user's events are bucketed by
length, so little is padded; the softmax over all items is computed with its gradient in slabs of rows that stay in the processor's
cache.

Legend: B windows, S positions, T targets, I items, D width.
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from oxyray.config import SasrecConfig
from oxyray.data.requests import timeline, training_segments
from oxyray.evaluate.baselines import Lists, Recommends, cold_start
from oxyray.evaluate.requests import TRAIN, VALID, Parts, Requests, asked, ranges
from oxyray.progress import bar

Tensor = torch.Tensor
Array = np.ndarray

# Rows of logits at a time: few enough to stay in a processor's cache, many enough to fill a GPU.
_SLAB = {"cpu": 128, "cuda": 4096}


class FullCrossEntropy(torch.autograd.Function):
    """Sum over targets of -log softmax(h E^T)[target]. The gradient is made on the way forward, slab by slab, so no (T, I) matrix
    is kept."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, table_ID: Tensor, target_T: Tensor) -> Tensor:
        total = h_TD.new_zeros(())
        grad_h_TD, grad_table_ID = torch.empty_like(h_TD), torch.zeros_like(table_ID)
        slab = _SLAB.get(h_TD.device.type, 1024)
        for first in range(0, len(h_TD), slab):
            rows = slice(first, first + slab)
            logit = h_TD[rows] @ table_ID.T
            mine = torch.arange(len(logit), device=logit.device)
            logit -= logit.amax(dim=1, keepdim=True)
            own = logit[mine, target_T[rows]]
            prob = logit.exp_()
            norm = prob.sum(dim=1, keepdim=True)
            total += (norm.log().squeeze(1) - own).sum()
            prob /= norm
            prob[mine, target_T[rows]] -= 1
            grad_h_TD[rows] = prob @ table_ID
            grad_table_ID.addmm_(prob.T, h_TD[rows])
        ctx.save_for_backward(grad_h_TD, grad_table_ID)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_h_TD, grad_table_ID = ctx.saved_tensors
        return grad[0] * grad_h_TD, grad[0] * grad_table_ID, None


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attend, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, steps, width = x_BSD.shape
        q, k, v = self.qkv(self.norm_attend(x_BSD)).view(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # windows are padded on the right, so the causal mask alone keeps padding out of every real position
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x_BSD = x_BSD + F.dropout(self.out(seen.transpose(1, 2).reshape(batch, steps, width)), self.dropout, self.training)
        return x_BSD + F.dropout(
            self.down(F.dropout(F.gelu(self.up(self.norm_feed(x_BSD))), self.dropout, self.training)), self.dropout, self.training
        )


class SasrecNet(nn.Module):
    """Item ids to states. Row `items` of the table is padding. The output table is the input table (tied)."""

    def __init__(self, items: int, config: SasrecConfig) -> None:
        super().__init__()
        self.items, self.dropout = items, config.dropout
        self.table = nn.Embedding(items + 1, config.width)
        self.position = nn.Embedding(config.history, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm_in, self.norm_out = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, item_BS: Tensor) -> Tensor:
        """States (B, S, D); state s has seen items 0..s of its window."""
        x_BSD = self.norm_in(self.table(item_BS) + self.position.weight[: item_BS.shape[1]])
        x_BSD = F.dropout(x_BSD, self.dropout, self.training)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.norm_out(x_BSD)

    @property
    def output_ID(self) -> Tensor:
        return self.table.weight[: self.items]


@dataclass(frozen=True)
class Windows:
    """Training windows in flat arrays: window b reads `item_N[start_B[b] : start_B[b] + length_B[b]]`; its targets are
    `target_T[first_B[b] : first_B[b + 1]]`, each asked at position `at_T` of the window."""

    item_N: Array
    start_B: Array
    length_B: Array
    first_B: Array
    at_T: Array
    target_T: Array


def windows(data: Parts, history: int) -> Windows:
    """Every training event that has a visible history is a target once."""
    items, starts, lengths, counts, ats, targets, base = [], [], [], [], [], [], 0
    for part in range(data.parts):
        time = timeline(data.events(part), splits=(TRAIN,))
        segments = training_segments(time, history)
        owner_T, row_T = ranges(segments.query_start_B, segments.query_start_B + segments.query_length_B)
        at_T = time.user_start_E[row_T] + time.visible_E[row_T] - 1 - segments.start_B[owner_T]
        asked_T = at_T >= 0
        items.append(time.item_E)
        starts.append(segments.start_B + base)
        lengths.append(segments.length_B)
        counts.append(np.bincount(owner_T[asked_T], minlength=len(segments)))
        ats.append(at_T[asked_T])
        targets.append(time.item_E[row_T[asked_T]])
        base += len(time)
    first_B = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return Windows(
        np.concatenate(items), np.concatenate(starts), np.concatenate(lengths), first_B, np.concatenate(ats), np.concatenate(targets)
    )


def _padded(item_N: Array, start_B: Array, length_B: Array, padding: int) -> Tensor:
    item_BS = np.full((len(start_B), max(1, int(length_B.max(initial=1)))), padding, dtype=np.int64)
    row_N, source_N = ranges(start_B, start_B + length_B)
    item_BS[row_N, source_N - start_B[row_N]] = item_N[source_N]
    return torch.from_numpy(item_BS)


def _steps(wins: Windows, targets_per_step: int, rng: np.random.Generator) -> Iterator[Array]:
    """One epoch: random windows gathered until a step has its targets; windows without a target are left out."""
    count_B = np.diff(wins.first_B)
    order_B = rng.permutation(np.flatnonzero(count_B))
    step_B = np.cumsum(count_B[order_B]) // targets_per_step
    if not len(order_B):
        return
    yield from np.split(order_B, np.flatnonzero(np.diff(step_B)) + 1)


class Sasrec:
    """The trained baseline. Rows without any history get the `fallback`'s lists."""

    name = "sasrec"

    def __init__(self, net: SasrecNet, config: SasrecConfig, pool_SI: Array, fallback: Recommends, device: str = "cpu") -> None:
        self.net, self.config, self.pool_SI, self.fallback, self.device = net.to(device), config, pool_SI, fallback, device

    @torch.inference_mode()
    def scores(self, requests: Requests) -> Tensor:
        """Logits of all items: (R, I). A row without history has meaningless scores."""
        self.net.eval()
        start_R = np.maximum(requests.start_R, requests.stop_R - self.config.history)
        length_R = requests.stop_R - start_R
        item_RS = _padded(requests.time.item_E, start_R, length_R, self.net.items).to(self.device)
        last_R = torch.from_numpy(np.maximum(length_R, 1) - 1).to(self.device)
        state_RD = self.net(item_RS)[torch.arange(len(item_RS), device=self.device), last_R]
        return state_RD @ self.net.output_ID.T

    @torch.inference_mode()
    def recommend(self, requests: Requests, depth: int) -> Lists:
        score_RI = self.scores(requests).masked_fill_(~torch.from_numpy(self.pool_SI[requests.scenario_R]).to(self.device), -torch.inf)
        top = score_RI.topk(min(depth, score_RI.shape[1]), dim=1)
        score_RK = top.values.cpu().numpy()
        lists = Lists(np.where(np.isneginf(score_RK), -1, top.indices.cpu().numpy()), score_RK)
        return cold_start(lists, requests, self.fallback)

    def recall(self, asked_: list[Requests], k: int, batch: int = 512) -> float:
        """Share of rows whose target is among the k best of all items (pools left aside): what early stopping watches."""
        hits = total = 0
        for requests in asked_:
            for rows in requests.batches(batch):
                score_RI = self.scores(rows)
                own_R1 = score_RI.gather(1, torch.from_numpy(rows.target_R.astype(np.int64)).to(self.device)[:, None])
                hits += int(((~(score_RI < own_R1)).sum(dim=1) <= k).sum())  # who ties with others stands behind them, NaN is no place
                total += len(rows)
        return hits / max(total, 1)


def train(
    data: Parts,
    pool_SI: Array,
    config: SasrecConfig,
    fallback: Recommends,
    seed: int,
    device: str = "cpu",
    log: Callable[[dict[str, float]], None] = lambda line: None,
    valid_requests: int = 10_000,
) -> Sasrec:
    """Train until validation R@10 has not risen for `patience` epochs (each such epoch halves the learning rate), or `epochs` or
    `max_minutes` are over; the best epoch's
    weights are kept."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    wins = windows(data, config.history)
    valid = list(asked(data, VALID, valid_requests, seed))
    net = SasrecNet(pool_SI.shape[1], config)
    model = Sasrec(net, config, pool_SI, fallback, device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.98))
    best_recall, best_epoch, best_weights, began = -1.0, 0, _copy(net), clock.monotonic()
    steps = bar(config.epochs * (1 + len(wins.target_T) // config.targets_per_step), "SASRec (stops early)", "step")
    for epoch in range(1, config.epochs + 1):
        loss_sum = 0.0
        for rows_B in _steps(wins, config.targets_per_step, rng):
            loss_sum += _step(net, wins, rows_B, optimizer, device)
            steps.update()
            if _over(began, config.max_minutes):
                break
        if not math.isfinite(loss_sum):  # it has diverged; what was best before stays
            break
        recall = model.recall(valid, 10)
        log(
            {"epoch": epoch, "loss": loss_sum / max(len(wins.target_T), 1), "valid_recall@10": recall, "seconds": clock.monotonic() - began}
        )
        if recall > best_recall:
            best_recall, best_epoch, best_weights = recall, epoch, _copy(net)
        else:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        if epoch - best_epoch >= config.patience or _over(began, config.max_minutes):
            break
    steps.close()
    net.load_state_dict(best_weights)
    return model


def _step(net: SasrecNet, wins: Windows, rows_B: Array, optimizer: torch.optim.Optimizer, device: str, groups: int = 4) -> float:
    """One optimizer step; returns the summed loss. Windows are grouped by length so that short ones are not padded to the longest."""
    net.train()
    states, targets = [], []
    for group_B in np.array_split(rows_B[np.argsort(wins.length_B[rows_B], kind="stable")], min(groups, len(rows_B))):
        owner_T, source_T = ranges(wins.first_B[group_B], wins.first_B[group_B + 1])
        state_BSD = net(_padded(wins.item_N, wins.start_B[group_B], wins.length_B[group_B], net.items).to(device))
        states.append(state_BSD[torch.from_numpy(owner_T).to(device), torch.from_numpy(wins.at_T[source_T]).to(device)])
        targets.append(torch.from_numpy(wins.target_T[source_T].astype(np.int64)).to(device))
    loss = FullCrossEntropy.apply(torch.cat(states), net.output_ID, torch.cat(targets))
    optimizer.zero_grad()
    (loss / sum(len(t) for t in targets)).backward()
    optimizer.step()
    return float(loss.detach())


def _over(began: float, minutes: float | None) -> bool:
    return minutes is not None and clock.monotonic() - began > 60 * minutes


def _copy(net: SasrecNet) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
