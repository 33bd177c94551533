"""SASRec trained once: its weights lie in `RUN/baselines/sasrec`, and serve every evaluation with the same data, settings and seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.evaluate.baselines import Recommends
from oxyray.evaluate.baselines.sasrec import Sasrec, SasrecNet, train
from oxyray.files import read_json, whole, write_json
from oxyray.run import Run

# Raised when the training or the network changes, so that older weights are not taken for today's.
_FORMAT = 1


def key(config: Config, prepared: Prepared) -> str:
    """Changes with anything that decides the weights."""
    facts = [_FORMAT, prepared.meta.fingerprint, prepared.meta.items, config.seed, dataclasses.asdict(config.evaluate.sasrec)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def get(config: Config, run: Run, prepared: Prepared, pool_SI: np.ndarray, fallback: Recommends, device: str) -> Sasrec:
    """The trained baseline, read back if it is there, else trained and kept."""
    folder, wanted, settings = run.path("baselines", "sasrec"), key(config, prepared), config.evaluate.sasrec
    if (folder / "about.json").exists() and read_json(folder / "about.json").get("key") == wanted:
        net = SasrecNet(pool_SI.shape[1], settings)
        net.load_state_dict(load_file(folder / "weights.safetensors"))
        print("SASRec: trained before with the same data and settings, read back", flush=True)
        return Sasrec(net, settings, pool_SI, fallback, device)
    history: list[dict[str, Any]] = []

    def log(line: dict[str, float]) -> None:
        history.append(line)
        run.log("evaluate", {f"sasrec/{name}": value for name, value in line.items()}, step=int(line["epoch"]))

    model = train(prepared, pool_SI, settings, fallback, config.seed, device, log)
    with whole(folder) as part:
        part.mkdir(parents=True)
        save_file({name: value.cpu().contiguous() for name, value in model.net.state_dict().items()}, part / "weights.safetensors")
        write_json(
            part / "about.json", {"key": wanted, "data": prepared.meta.name, "settings": dataclasses.asdict(settings), "history": history}
        )
    return model
