"""Checkpoints of a TrainEngine: whole or absent, and loadable at any number of ranks and any ZeRO stage.

A checkpoint is a folder `step_00000100`:
- `dense.safetensors`: every parameter whole, by name, with its AdamW moments (`weight/…`, `exp_avg/…`, `exp_avg_sq/…`), and the policy's
  buffers;
- `tables.rank00000.safetensors`, one a rank: its rows of every table and the fused optimizer's state of these rows. Loading reads row
  ranges, so the ranks that read need not be those that wrote;
- `meta.json`: step, catalogue, data position, settings, whatever the caller gives, and which rows lie in which file;
- `complete`: the size of every file.

All ranks write into `.step_….part` beside it; rank 0 renames it when every file is on the disk. So a kill at any moment leaves either the
whole checkpoint or none under its name, and `latest` also refuses a folder whose files are not of the written size. Nothing is pickled.
The engine's random numbers are a function of (seed, step, rank), so seed and step are all the random state that there is.

On several nodes the folder must be on a file system that they share.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oxyray.errors import RunError, TrainingError
from oxyray.files import read_json
from oxyray.model.tables import TensorWriter
from oxyray.train.dense import MOMENTS, Moments
from oxyray.train.engine import TrainEngine
from oxyray.train.sparse import ShardedTables

Tensor = torch.Tensor
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    def weights(self) -> dict[str, Tensor]:
        """The policy's state dict: load it before the engine is made."""
        return dict(_Tensors(self.folder / "dense.safetensors", "weight")) | dict(_Tensors(self.folder / "dense.safetensors", "buffer"))

    def moments(self) -> Moments:
        """AdamW's state: give it to the engine."""
        return Moments(self.step, *(_Tensors(self.folder / "dense.safetensors", key) for key in MOMENTS))

    def load_tables(self, tables: ShardedTables) -> None:
        """Fill this rank's rows and their optimizer state. Raises RunError when the tables are of other sizes than the saved ones."""
        saved = {name: (spec["rows"], spec["dim"]) for name, spec in self.meta["tables"].items()}
        wanted = {name: (spec.rows, spec.dim) for name, spec in tables.specs.items()}
        if saved != wanted:
            raise RunError(f"{self.folder} holds tables of other sizes ({saved}, here {wanted}): train anew with force=true")
        for shard in tables.shards():
            last = shard.first + len(shard.weight)
            for piece in self.meta["tables"][shard.table]["pieces"]:
                begin, end = max(shard.first, piece["first"]), min(last, piece["first"] + piece["rows"])
                if begin >= end:
                    continue
                with _opened(self.folder / piece["file"]) as file:
                    for name, live in {"weight": shard.weight, **shard.state}.items():
                        rows = file.get_slice(f"{shard.table}/{name}")[begin - piece["first"] : end - piece["first"]]
                        live[begin - shard.first : end - shard.first].copy_(rows)


def save(folder: Path, engine: TrainEngine, meta: Mapping[str, Any], keep: int) -> Path:
    """Write `folder/step_N`, then remove all but the `keep` newest. Those of later steps go too: the run went back behind them, as they
    were of other settings or damaged. Collective.

    Raises RunError on every rank when any of them cannot write; what was there before stays.
    """
    final, part = folder / f"step_{engine.step_count:08d}", folder / f".step_{engine.step_count:08d}.part"
    with _together(f"{final} could not be begun"):
        if engine.rank == 0:
            _remove(part)
            part.mkdir(parents=True)
    with _together(f"{final} could not be written"):
        pieces = _write_tables(part / f"tables.rank{engine.rank:05d}.safetensors", engine.tables)
    with _together(f"{final} could not be written"):  # after all could write their tables: it gathers
        _write_dense(part / "dense.safetensors", engine)
    # Every rank has the same split, so rank 0 can tell the others' pieces from sizes alone; asking each is surer.
    gathered: list[Any] = [None] * engine.world
    dist.all_gather_object(gathered, pieces)
    with _together(f"{final} could not be finished"):
        if engine.rank == 0:
            tables = {
                name: {"rows": spec.rows, "dim": spec.dim, "pieces": [rank[name] for rank in gathered if name in rank]}
                for name, spec in engine.tables.specs.items()
            }
            facts = {"format": FORMAT, "step": engine.step_count, "seed": engine.seed, "world": engine.world}
            _put(part / "meta.json", json.dumps({**meta, **facts, "tables": tables}, indent=1))
            _put(part / "complete", json.dumps({file.name: file.stat().st_size for file in sorted(part.iterdir())}))
            _flush(part)
            _set_aside(final)
            part.rename(final)
            _flush(folder)
            _remove(_aside(final))
            kept = sorted(step for step in _steps(folder) if step <= engine.step_count)[-keep:]
            for step in set(_steps(folder)) - set(kept):
                old = folder / f"step_{step:08d}"
                _set_aside(old)
                _remove(_aside(old))
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; one that is not whole is passed over."""
    for step in sorted(_steps(folder), reverse=True):
        found = folder / f"step_{step:08d}"
        if whole(found):
            meta = read_json(found / "meta.json")
            if meta.get("format") == FORMAT:
                return Checkpoint(found, meta)
    return None


def whole(folder: Path) -> bool:
    """Does every file have the size that `complete` says?"""
    try:
        sizes = json.loads((folder / "complete").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def sweep(folder: Path) -> None:
    """Clear up after a killed save: remove what was half written, put back what was set aside. Only while nobody saves there."""
    for path in folder.glob(".step_*") if folder.is_dir() else ():
        final = folder / path.name.removeprefix(".").rpartition(".")[0]
        if path.name.endswith(".aside") and not final.exists() and whole(path):
            path.rename(final)
        else:
            shutil.rmtree(path)


def _write_tables(path: Path, tables: ShardedTables) -> dict[str, dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for shard in tables.shards():
        pieces[shard.table] = {"file": path.name, "first": shard.first, "rows": len(shard.weight)}
        tensors |= {f"{shard.table}/{name}": value.detach().contiguous() for name, value in {"weight": shard.weight, **shard.state}.items()}
    save_file(tensors, path)
    _flush(path)
    return pieces


def _write_dense(path: Path, engine: TrainEngine) -> None:
    """Rank 0 writes; the others take part in gathering, also when rank 0 cannot write on."""
    if engine.rank:
        for _ in engine.dense():
            pass
        return
    names = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.policy.named_parameters()}
    shapes = {f"{key}/{name}": (shape, torch.float32) for name, shape in names.items() for key in ("weight", *MOMENTS)}
    buffers = {name: value for name, value in engine.policy.state_dict().items() if name not in names}
    shapes |= {f"buffer/{name}": (tuple(value.shape), value.dtype) for name, value in buffers.items()}
    parameters = engine.dense()
    try:
        with TensorWriter(path, shapes) as writer:
            for name, values in parameters:
                for key, value in values.items():
                    writer.write(f"{key}/{name}", value)
            for name, value in buffers.items():
                writer.write(f"buffer/{name}", value)
        _flush(path)
    finally:
        for _ in parameters:
            pass


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Run the body on every rank, then raise on all of them if it failed on any. The body's own collectives must be entered by all ranks
    whatever happens."""
    problem: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError, RunError) as error:
        problem = error
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if problem is None else _reason(problem))
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise RunError(f"{what} (worker {rank}: {reason}); earlier checkpoints are intact") from problem


def _reason(problem: Exception) -> str:
    if (isinstance(problem, OSError) and problem.errno == errno.ENOSPC) or "No space left" in str(problem):
        return "no space left on the disk: free some or set run_dir to another disk"
    return str(problem).splitlines()[0]


class _Tensors(Mapping[str, Tensor]):
    """Tensors `prefix/NAME` of a safetensors file as a read-only dict, read one at a time."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path, self.prefix = path, prefix + "/"
        with _opened(path) as file:
            self._names = [key.removeprefix(self.prefix) for key in file.keys() if key.startswith(self.prefix)]  # noqa: SIM118 - not a dict

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.path) as file:
            return file.get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} does not read ({error}): delete its checkpoint folder, and an older one is taken") from None


def _steps(folder: Path) -> list[int]:
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return [int(match.group(1)) for match in names if match]


def _put(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")


def _set_aside(path: Path) -> None:
    """Take a checkpoint's name away from it before it is removed, so that a kill in between leaves nothing half removed under that name."""
    if path.exists():
        _remove(_aside(path))
        path.rename(_aside(path))


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
