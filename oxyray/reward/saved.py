"""The exported ranker, `RUN/rank/model/`: `ranker.safetensors`, `tables.safetensors`, `model.json`. All that judging needs beside data,
catalogue and log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from oxyray.config import RankerConfig, from_dict
from oxyray.errors import CatalogueError, RunError
from oxyray.files import read_json, write_json
from oxyray.model.inputs import Inputs
from oxyray.model.tables import PlainTables, TableSpec
from oxyray.reward.packing import Packer
from oxyray.reward.ranker import Ranker

Tensor = torch.Tensor


def ranker_tables(config: RankerConfig, inputs: Inputs) -> list[TableSpec]:
    """The sparse tables beside the ranker: items, and users when asked for."""
    specs = [TableSpec(name="item", rows=inputs.vocab.items, dim=config.row_dim)]
    return specs + ([TableSpec(name="user", rows=inputs.vocab.users, dim=config.row_dim)] if config.user_table else [])


def packer_of(inputs: Inputs) -> Packer:
    return Packer(inputs.features, inputs.prepared.profile_UP)


def write_ranker(folder: Path, config: RankerConfig, inputs: Inputs, weights: Mapping[str, Tensor], **about: Any) -> None:
    """Write the dense weights and `model.json` into `folder` (the tables' file is written by whoever holds the tables)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / "ranker.safetensors")
    write_json(folder / "model.json", {"model": dataclasses.asdict(config), **inputs.made_of, **about})


def read_ranker(folder: Path, inputs: Inputs, device: torch.device | str = "cpu") -> tuple[Ranker, PlainTables]:
    """The ranker in eval mode and its tables. Raises CatalogueError when it was trained on other data, with another catalogue or texts of
    another encoder, RunError when a file is missing or damaged."""
    about = read_json(folder / "model.json")
    for name, now in inputs.made_of.items():
        if (was := about.get(name, now)) != now:
            raise CatalogueError(f"{folder} was trained with {name} {was}, the run holds {now}: run `oxyray rank` again")
    ranker = Ranker(from_dict(RankerConfig, about["model"], "rank.model."), inputs.vocab)
    try:
        ranker.load_state_dict(load_file(folder / "ranker.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{folder}/ranker.safetensors does not load ({str(error).splitlines()[0]}): run `oxyray rank` again") from None
    return ranker.to(device).eval(), PlainTables.load(folder / "tables.safetensors", device)
