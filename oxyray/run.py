"""The run folder: one place that holds a run's configuration, versions, metrics, logs and every stage's artifacts."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import yaml

from oxyray.config import Config, from_dict, set_dotted, to_dict
from oxyray.errors import RunError
from oxyray.files import read_json, whole, write_json

_PACKAGES = (
    *("oxyray", "torch", "ray", "deepspeed", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"),
    *("faiss-cpu", "hydra-core", "numpy", "pyarrow", "transformers", "wandb"),
)


class Run:
    """`run.path("sid")` is a stage's folder; `run.log(stage, ...)` appends one line to `metrics.jsonl`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().resolve()

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def need(self, *parts: str, stage: str) -> Path:
        """The path, or a RunError that names the stage to run first."""
        path = self.path(*parts)
        if not path.exists():
            raise RunError(f"{path} is missing: run `oxyray {stage}` with the same run_dir first")
        return path

    def log(self, stage: str, values: dict[str, Any], step: int | None = None) -> None:
        """Append one line. Values are JSON, or numbers of numpy or torch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"time": round(time.time(), 3), "stage": stage} | ({} if step is None else {"step": step}) | values
        with open(self.path("metrics.jsonl"), "a") as file:
            file.write(json.dumps(line, default=float) + "\n")

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, of one stage or all. A torn last line (killed while writing) is left out."""
        path = self.path("metrics.jsonl")
        lines = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return [line for line in lines if stage in (None, line.get("stage"))]

    def write_config(self, config: Config, name: str = "config.yaml") -> Path:
        """Write the resolved configuration; `Run.config` reads it back."""
        with whole(self.path(name)) as part:
            part.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
        return self.path(name)

    def stamp(self, stage: str) -> Path:
        """What a finished stage leaves: see `oxyray.pipeline`."""
        return self.path("stages", f"{stage}.json")

    def config(self, *made: str) -> Config:
        """The configuration that the latest stage ran with, and for the stages `made` what decided their results when they were made.

        Raises RunError when the folder holds no run, ConfigError when it is not valid.
        """
        path = self.path("config.yaml")
        if not path.is_file():
            raise RunError(
                f"{self.folder} holds no run (config.yaml is missing): set run_dir to the folder of one, or make it with `oxyray run`"
            )
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise RunError(f"{path} is not valid YAML ({str(error).splitlines()[0]}): run a stage again to write it anew") from None
        values = values if isinstance(values, dict) else {}
        for stamp in (self.stamp(stage) for stage in made):
            for key, value in read_json(stamp)["settings"].items() if stamp.is_file() else ():
                set_dotted(values, key, value)
        return from_dict(Config, values)

    def write_versions(self) -> None:
        write_json(self.path("versions.json"), versions())


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that results depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
