"""The dense part's weights and AdamW moments, whole, by parameter name: the form in which they are saved.

ZeRO spreads them over the ranks in flat pieces that depend on stage and world size. Gathered by name they depend on neither, so a
checkpoint written at any stage and size loads at any other; no conversion tool stands between. The cost is one parameter at a time
through rank 0, which is small beside the tables.

What is private API of DeepSpeed 0.19.8 here is held by tests/train/test_engine.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Tensor = torch.Tensor
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Moments:
    """AdamW's state after `step` steps: moments by parameter name, whole, fp32."""

    step: int
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]


def fill_moments(engine: Any, policy: nn.Module, moments: Moments | None) -> None:
    """Set the AdamW state of a DeepSpeed engine that has not stepped yet: to `moments`, or to what AdamW itself starts from."""
    stage, adam = engine.zero_optimization_stage(), _adam(engine)
    for flat in _flat_parameters(engine):
        # Fused AdamW keeps its counter beside the parameters.
        counter = torch.tensor(float(moments.step if moments else 0), device=flat.device)
        adam.state[flat] = {"step": counter} | {key: torch.zeros_like(flat) for key in MOMENTS}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    if moments is None:
        return
    for name, parameter in policy.named_parameters():
        for key in MOMENTS:
            value = getattr(moments, key)[name].to(device=parameter.device, dtype=torch.float32)
            if stage == 0:
                adam.state[parameter][key].copy_(value)
            elif stage < 3:
                parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
            else:
                engine.optimizer.set_local_hp_param(_own_piece(parameter, value), parameter, key)


def read_dense(engine: Any, policy: nn.Module, moments: bool = True) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each parameter of `policy`: its fp32 weight (and moments), whole, on the CPU. Collective."""
    stage, adam = engine.zero_optimization_stage(), _adam(engine)
    keys: tuple[str | None, ...] = (None, *(MOMENTS if moments else ()))
    for name, parameter in policy.named_parameters():
        if stage == 0:
            values = [parameter if key is None else adam.state[parameter][key] for key in keys]
        elif stage < 3:
            values = [parameter.get_full_hp_param(key) for key in keys]  # type: ignore[attr-defined]
        else:
            values = [engine.optimizer.get_full_hp_param(parameter, key) for key in keys]
        # Copies: views into live memory would change under a reader that keeps them.
        yield name, {key or "weight": value.detach().float().cpu().clone() for key, value in zip(keys, values, strict=True)}


def _own_piece(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's piece of a whole value, padded as ZeRO-3 pads it. (`safe_set_full_optimizer_state` fails where the ranks do not divide
    the size.)"""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = torch.zeros(size * dist.get_world_size(), device=value.device)
    padded[: value.numel()] = value.flatten()
    return padded[size * dist.get_rank() :][:size]


def _adam(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer: itself at stage 0, else inside DeepSpeed's."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _flat_parameters(engine: Any) -> list[Tensor]:
    """The tensors that the torch optimizer steps on this rank."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    return list(engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else engine.optimizer.single_partition_of_fp32_groups)
