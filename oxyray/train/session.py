"""One training run on one rank: stream, step, validate, save, stop, export. Needs an initialised process group and no Ray.

Every decision that depends on a clock or a signal (stop, save, the time's share of the schedule) is rank 0's and is told to the others
before each step, so all ranks make the same calls. A run goes on from its latest whole checkpoint: the data stream's position, the
optimizer, the random numbers (seed and step) and the minutes already spent come from there, so that a killed run repeats no batch, loses
none and ends with the same weights.

Where what lies in the stage's folder: `checkpoints/` (the newest few), `best/` (the exported model of the best validation so far), `model/`
(that model, when training is over), `progress.json` (how far, for the bar), `stop` (made by whoever wants a checkpoint and a clean end).
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from oxyray.files import read_json, whole, write_json
from oxyray.model.flops import peak
from oxyray.run import Run
from oxyray.train import checkpoint
from oxyray.train.course import ALL_DONE, Course, limits
from oxyray.train.engine import TrainBatch, TrainEngine
from oxyray.train.meter import Meter
from oxyray.train.task import Task


class Session:
    def __init__(self, task: Task, run: Run, device: torch.device | str = "cpu") -> None:
        self.task, self.settings, self.run, self.device = task, task.settings, run, torch.device(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.folder = run.path(task.stage)
        self.stream = task.stream()
        settings = self.settings
        self.steps_per_epoch = self.stream.steps_per_epoch()
        self.total_steps = min(max(1, math.ceil(settings.epochs * self.steps_per_epoch)), settings.max_steps or 2**62)
        self.validate_every = max(1, round(settings.eval_every_epochs * self.steps_per_epoch))
        self.log_every = max(1, min(50, self.total_steps // 100))
        self.validation = task.validation(self.rank, self.world)
        self.course = Course()
        if self.rank == 0:
            checkpoint.sweep(self.folder / "checkpoints")
        dist.barrier()
        found = checkpoint.latest(self.folder / "checkpoints")
        self.engine = self._engine(found)
        self._twin: nn.Module | None = None
        self._meter = Meter(self.device, task.counted, peak(self.device, self.settings.optim.precision))
        self._pids = self._gather(os.getpid())
        self._begun = self._saved_at = time.monotonic()
        self._minutes_before, self._told_at = self.course.minutes, 0.0
        if found:
            self._log({"resumed": True, "workers": self.world})

    def train(self) -> None:
        """Train until a limit is reached or somebody asks to stop; leave a checkpoint and, when training is over, `model/`."""
        batches = self.stream.batches(self.rank, self.world, self.settings.micro_batches)
        with self._profiler() as profiler:
            while not self.course.ended:
                share, wants_save = self._agree()
                if self.course.ended:
                    break
                self._step(batches, share)
                if profiler is not None:
                    profiler.step()
                if self.engine.step_count % self.validate_every == 0:
                    self._validate()
                if wants_save:
                    self._save()
        stopped = self.course.ended == "stopped"
        if not stopped and self.course.validated_at != self.engine.step_count:
            self._validate()
        if stopped:
            self.course.ended = ""
        self._save()
        if not stopped:
            self._publish()
        self._tell(force=True)
        self.engine.close()

    def _engine(self, found: checkpoint.Checkpoint | None) -> TrainEngine:
        torch.manual_seed(self.settings.seed)
        module = self.task.module()
        if found:
            module.load_state_dict(found.weights())
        engine = TrainEngine(
            module,
            self.task.tables(),
            self.settings.optim,
            total_steps=self.total_steps,
            device=self.device,
            micro_batches=self.settings.micro_batches,
            seed=self.settings.seed,
            moments=found.moments() if found else None,
        )
        if found:
            found.load_tables(engine.tables)
            self.stream.load_state_dict(found.meta["position"])
            self.course = Course(**found.meta["course"])
            if found.meta.get("eval_requests", self.settings.eval_requests) != self.settings.eval_requests:
                self.course.best, self.course.without_gain = None, 0  # of another sample: not to be compared with
            if (self.folder / "best" / "model.json").exists():
                self.course.adopt(read_json(self.folder / "best" / "model.json"), self.task.chosen_by)
            if found.meta["limits"] != limits(self.settings):
                self.course.ended = ""  # asked to go on
        return engine

    def _agree(self) -> tuple[float, bool]:
        """Before a step: rank 0 says how much of the run is behind, and whether to end or save. Returns (share for the schedule, save
        after the step)."""
        settings, step = self.settings, self.engine.step_count
        now = time.monotonic()
        self.course.minutes = self._minutes_before + (now - self._begun) / 60
        timed = self.course.minutes / settings.max_minutes if settings.max_minutes else 0.0
        due = (now - self._saved_at) / 60 >= settings.save_every_minutes
        stop = (self.folder / "stop").exists() if self.rank == 0 else False
        told = torch.tensor([timed, float(due), float(stop)], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        timed, due, stop = float(told[0]), bool(told[1]), bool(told[2])
        if step >= self.total_steps:
            self.course.ended = ALL_DONE
        elif timed >= 1:
            self.course.ended = f"max_minutes={settings.max_minutes:g} reached"
        elif self.course.without_gain >= settings.patience:
            self.course.ended = f"no gain in {settings.patience} validations"
        elif stop:
            self.course.ended = "stopped"
        return max(step / self.total_steps, timed), due

    def _step(self, batches: Iterator[list[TrainBatch]], share: float) -> None:
        begun = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - begun
        stats = self.engine.step(micro_batches, min(share, 1.0))
        taken = time.perf_counter() - begun
        flops = sum(self.task.flops(self.engine.policy, batch) for batch in micro_batches)
        self._meter.add(stats, waited, sum(map(self.task.count, micro_batches)), taken, flops)
        if self.engine.step_count % self.log_every == 0 or self.engine.step_count in (1, self.total_steps):
            self._log({"epoch": round(self.engine.step_count / self.steps_per_epoch, 3)} | self._meter.read())
        self._tell()

    def _validate(self) -> None:
        """Measure, count, and export the weights when they are the best so far. Without validation requests the newest are the best."""
        self.course.validated_at = self.engine.step_count
        if not self.validation.requests:
            self.course.best_step = self.engine.step_count
            return self._export({})
        begun = time.perf_counter()
        found = self.validation.measure(self.engine, self._whole())
        self._log(found | {"valid_seconds": round(time.perf_counter() - begun, 2)})
        reached = found[self.task.chosen_by]
        if self.course.best is None or reached > self.course.best:
            self.course.best, self.course.best_step, self.course.without_gain = reached, self.engine.step_count, 0
            self._export(found)
        elif self.course.validated_at > self.course.best_step:  # a run that went back comes upon its own best again, and what was before
            self.course.without_gain += 1
        return None

    def _whole(self) -> nn.Module:
        """A module that can be asked outside the engine: the engine's own, or a copy where ZeRO-3 keeps only pieces of it."""
        if self.settings.optim.zero_stage < 3:
            return self.engine.policy
        self._twin = self._twin or self.task.module().to(self.device)
        self._twin.load_state_dict(self.engine.whole())
        return self._twin

    def _save(self) -> None:
        meta = {
            **self.task.identity(),
            "limits": limits(self.settings),
            "eval_requests": self.settings.eval_requests,
            "position": self.stream.state_dict(),
            "course": asdict(self.course),
        }
        checkpoint.save(self.folder / "checkpoints", self.engine, meta, self.settings.keep_checkpoints)
        self._saved_at = time.monotonic()

    def _export(self, found: dict[str, float]) -> None:
        """Write `best/`: dense weights and full tables."""
        place: AbstractContextManager[Any] = whole(self.folder / "best") if self.rank == 0 else nullcontext(self.folder)
        with place as part:
            weights = self.engine.gather_dense()
            if self.rank == 0:
                self.task.write(part, weights, step=self.engine.step_count, **found)
            self.engine.tables.export(part / "tables.safetensors")

    def _publish(self) -> None:
        """`best/` becomes `model/` (files are shared, not copied)."""
        if self.rank == 0:
            self.run.stamp(self.task.stage).unlink(missing_ok=True)  # of an older model: this one gets its own
            with whole(self.folder / "model") as part:
                shutil.copytree(self.folder / "best", part, copy_function=os.link)
        dist.barrier()

    def _log(self, values: dict[str, Any]) -> None:
        if self.rank == 0:
            rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
            self.run.log(self.task.stage, rounded, self.engine.step_count)

    def _tell(self, force: bool = False) -> None:
        """progress.json, once a second."""
        if self.rank == 0 and (force or time.monotonic() - self._told_at > 1):
            self._told_at = time.monotonic()
            shown = {"step": self.engine.step_count, "total": self.total_steps, **asdict(self.course), **self._meter.last}
            write_json(self.folder / "progress.json", shown | {"pids": self._pids})

    def _gather(self, value: int) -> list[int]:
        """One number from every rank."""
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [int(number) for number in found]

    def _profiler(self) -> AbstractContextManager[Any]:
        steps = self.settings.profile_steps
        if not steps:
            return nullcontext()
        out = self.folder / "profile"
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(out), worker_name=f"rank{self.rank}"),
        )
