"""The exported policy, `RUN/pretrain/model/` and `RUN/align/model/`: `policy.safetensors`, `tables.safetensors`, `model.json`. All that
serving needs beside data and catalogue.

`model.json` says what the weights were trained for: the model's configuration, the sizes of its vocabulary, the catalogue's version, the
data's fingerprint, the step. Reading it back checks each against the run it is read into.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from oxyray.config import ModelConfig, from_dict, to_dict
from oxyray.errors import CatalogueError, RunError
from oxyray.files import read_json, write_json
from oxyray.model.inputs import Inputs
from oxyray.model.items import Vocab
from oxyray.model.policy import Policy
from oxyray.model.tables import PlainTables
from oxyray.run import Run

Tensor = torch.Tensor


def model_folder(run: Run, aligned: bool = True) -> Path:
    """The exported policy: the aligned one where there is one that was made since the supervised one was trained, else that. Raises
    RunError where nothing is trained."""
    supervised, after = run.need("pretrain", "model", stage="pretrain"), run.path("align", "model")
    return after if aligned and (after / "model.json").is_file() and _aligned_since(run) else supervised


def _aligned_since(run: Run) -> bool:
    """By the stages' stamps, which a copy of the run keeps; by the files' times only where it has none."""
    stamps = [run.stamp(stage) for stage in ("pretrain", "align")]
    if all(stamp.is_file() for stamp in stamps):
        pretrain, align = map(read_json, stamps)
        return bool(align["inputs"]["pretrain"] == pretrain["made"])
    supervised, after = (run.path(stage, "model", "model.json").stat().st_mtime for stage in ("pretrain", "align"))
    return after >= supervised


def about_model(config: ModelConfig, inputs: Inputs, **more: Any) -> dict[str, Any]:
    """The content of `model.json`."""
    return {
        "model": to_dict(config),
        "vocab": dataclasses.asdict(inputs.vocab),
        **inputs.made_of,
        **more,
    }


def write_model(folder: Path, weights: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write the dense weights and `model.json` into `folder` (the tables' file is written by whoever holds the tables)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / "policy.safetensors")
    write_json(folder / "model.json", about)


def read_model(folder: Path, inputs: Inputs, device: torch.device | str = "cpu") -> tuple[Policy, PlainTables]:
    """The policy in eval mode and its tables. Raises CatalogueError when it was trained with another catalogue, with texts of another
    encoder or for other sizes, RunError when a file is missing or damaged."""
    about = read_json(folder / "model.json")
    for name, now in inputs.made_of.items():
        if name == "data":  # newer events of the same shop are welcome
            continue
        if (was := about.get(name, now)) != now:
            raise CatalogueError(f"{folder} was trained with {name} {was}, the run holds {now}: run `oxyray pretrain` again")
    vocab = Vocab(**(about["vocab"] | {name: tuple(about["vocab"][name]) for name in ("side", "profile")}))
    if vocab != inputs.vocab:
        wrong = [f.name for f in dataclasses.fields(Vocab) if getattr(vocab, f.name) != getattr(inputs.vocab, f.name)]
        raise CatalogueError(f"{folder} was trained for other data ({', '.join(wrong)} differ): run `oxyray pretrain` again")
    policy = inputs.policy(from_dict(ModelConfig, about["model"], "model."))
    try:
        policy.load_state_dict(load_file(folder / "policy.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{folder}/policy.safetensors does not load ({str(error).splitlines()[0]}): run `oxyray pretrain` again") from None
    return policy.to(device).eval(), PlainTables.load(folder / "tables.safetensors", device)
