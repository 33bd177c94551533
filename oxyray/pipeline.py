"""The stages in order: what each reads and writes in the run folder, and when what it wrote is still fresh.

A finished stage leaves a stamp, `RUN/stages/STAGE.json`, with the settings that decide its result, the stamps of the stages it read, and
the size and time of the files it read. The stage is fresh while all of these stand as they did, so a changed `model.width` remakes the
policy and not the semantic IDs, and a remade catalogue remakes everything after it. Settings that only change speed are left out of the
stamp.

The table is data: `run_all` and `run_one` take any table of stages, and import a stage's module only when it runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from oxyray.cluster.start import one_ray, room_for
from oxyray.config import Config, to_dict
from oxyray.errors import ConfigError, RunError
from oxyray.files import clear_leftovers, files_under, marks, read_json, write_json
from oxyray.run import Run
from oxyray.stopping import side_by_side
from oxyray.tracking import tracked

StageFunction = Callable[[Config, Run], None]
_BEGINNING = threading.Lock()  # stages side by side write the run's configuration and versions in turn


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`work` is the stage function or its `module:name`; `workers` are the processes that it trains on, if any.

    `form` rises when the stage comes to write something else from the same settings. `beside` are folders that it writes besides its own.
    `settings` are the configuration keys that decide the result, less those in `speed`. It needs the stages in `reads`, and uses those in
    `uses` where they have been made; the configuration may make it need these too (`needs`), or do without a stage of `reads`
    (`skips`). A stage that is not `wanted` by it is nobody's business.
    """

    name: str
    about: str
    work: str | StageFunction
    folder: str
    workers: Callable[[Config], int] = lambda config: 0
    form: int = 1
    beside: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    speed: tuple[str, ...] = ()
    files: Callable[[Config], list[Path]] = lambda config: []
    wanted: Callable[[Config], bool] = lambda config: True
    needs: Callable[[Config], tuple[str, ...]] = lambda config: ()
    skips: Callable[[Config], tuple[str, ...]] = lambda config: ()

    def inputs(self, config: Config) -> list[str]:
        """The stages whose making anew makes this one stale."""
        return [name for name in self.reads + self.uses if name not in self.skips(config)]

    def function(self) -> StageFunction:
        if not isinstance(self.work, str):
            return self.work
        module, _, name = self.work.partition(":")
        function: StageFunction = getattr(importlib.import_module(module), name)
        return function


def source_files(config: Config) -> list[Path]:
    """The shop's own files that are read, and no others that lie beside them. The embedded shop reads none."""
    from oxyray.data.prepare import source_files  # pyarrow, which `oxyray --help` can do without

    return source_files(config.data)


def vector_files(config: Config) -> list[Path]:
    """The shop's own item vectors, where they are read."""
    read = config.sid.vectors == "given" or config.fuse.given
    return files_under(config.sid.given) if read and config.sid.given else []


def _fused(config: Config) -> bool:
    """Whether semantic IDs come from the item encoder."""
    return config.sid.vectors == "fused"


def _on_workers(group: str) -> tuple[str, ...]:
    """Settings of a training run that change its speed alone."""
    names = ("workers", "gpu", "threads_per_worker", "micro_batches", "optim.zero_stage", "save_every_minutes", "keep_checkpoints")
    return tuple(f"{group}.{name}" for name in (*names, "max_restarts", "timeout_s", "profile_steps"))


STAGES: tuple[Stage, ...] = (
    Stage(
        name="prepare",
        about="read or simulate the shop's tables, check and split them",
        work="oxyray.data.prepare:prepare",
        folder="data",
        form=2,
        beside=("source",),
        settings=("data",),
        speed=("data.mall.workers",),
        files=source_files,
    ),
    Stage(
        name="fuse",
        about="train the encoder that joins items' texts and pictures",
        work="oxyray.train.fuse:fuse",
        folder="fuse",
        workers=lambda config: config.fuse.workers,
        reads=("prepare",),
        settings=("fuse", "sid.encoder", "sid.given"),
        speed=tuple(name for name in _on_workers("fuse") if name != "fuse.micro_batches"),  # a pair is compared within its micro-batch
        files=vector_files,
        wanted=_fused,
    ),
    Stage(
        name="sid",
        about="give every item its semantic ID",
        work="oxyray.sid.stage:sid",
        folder="sid",
        form=3,
        reads=("prepare", "fuse"),
        skips=lambda config: () if _fused(config) else ("fuse",),
        settings=("sid",),
        speed=("sid.batch_items", "sid.workers", "sid.cache_dir"),
        files=vector_files,
    ),
    Stage(
        name="pretrain",
        about="train the policy on the users' histories",
        work="oxyray.train.pretrain:pretrain",
        folder="pretrain",
        workers=lambda config: config.train.workers,
        form=3,
        reads=("prepare", "sid"),
        settings=("model", "train"),
        speed=_on_workers("train"),
    ),
    Stage(
        name="rank",
        about="train the ranker that judges what the policy generates",
        work="oxyray.train.rank:rank",
        folder="rank",
        workers=lambda config: config.rank.workers,
        form=3,
        reads=("prepare", "sid"),
        settings=("rank",),
        speed=_on_workers("rank"),
    ),
    Stage(
        name="align",
        about="align the policy to the shop's goals by rewards",
        work="oxyray.align.stage:align",
        folder="align",
        reads=("prepare", "sid", "pretrain", "rank"),
        settings=("align", "reward", "generate"),
        speed=(
            *("align.learners", "align.rollouts", "align.judges", "align.dense", "align.layout", "align.threads_per_process"),
            *(
                "align.gpu",
                "align.shared_memory",
                "align.optim.zero_stage",
                "align.save_every_steps",
                "align.max_restarts",
                "align.timeout_s",
            ),
            *(
                "reward.retries",
                "generate.requests_per_batch",
                "generate.graphs",
                "generate.followers",
                "generate.ranker",
            ),  # none has a say here
        ),
    ),
    Stage(
        name="evaluate",
        about="measure the policy beside the baselines",
        work="oxyray.evaluate.runner:evaluate",
        folder="evaluate",
        reads=("prepare", "sid", "pretrain"),
        uses=("rank", "align"),
        settings=("seed", "generate", "evaluate"),
        speed=("generate.requests_per_batch", "generate.graphs"),
        needs=lambda config: ("rank",) if config.generate.ranker else (),
    ),
    Stage(
        name="report",
        about="write the report to look at",
        work="oxyray.evaluate.report:report",
        folder="report",
        reads=("prepare", "sid", "pretrain", "evaluate"),
        uses=("rank", "align"),
    ),
)


def run_all(config: Config, stages: Sequence[Stage] = STAGES, say: Callable[[str], None] = print) -> None:
    """Every stage in order; fresh ones are skipped. Raises what a stage raises; what earlier stages wrote stays. Training stages that need
    nothing of each other run side by side where `cluster.stages_at_once` allows it."""
    run = Run(config.run_dir)
    with _alone(run), tracked(config.tracking, run, to_dict(config)), one_ray(config.processes):
        wanted = [stage for stage in stages if stage.wanted(config)]
        done = 0
        while done < len(wanted):
            together = _together(wanted[done:], config, run)
            counters = [f"[{number}/{len(wanted)}] " for number in range(done + 1, done + len(together) + 1)]
            side_by_side([partial(_run, stage, config, run, counter, say) for stage, counter in zip(together, counters, strict=True)])
            done += len(together)


def run_one(name: str, config: Config, stages: Sequence[Stage] = STAGES, say: Callable[[str], None] = print) -> None:
    """One stage, if it is not fresh. RunError when an earlier stage is missing or was made with other settings."""
    run = Run(config.run_dir)
    stage = _named(name, stages)
    if not stage.wanted(config):
        say(f"{name}: not wanted by this configuration, nothing is done")
        return
    with _alone(run), tracked(config.tracking, run, to_dict(config)):
        _need_earlier(stage, config, run, stages)
        _run(stage, config, run, "", say)


def plan(config: Config, names: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[tuple[str, str | None]]:
    """What a run of the stages `names` would do: (stage, why it would run, or None when it is fresh). Writes nothing."""
    run = Run(config.run_dir)
    steps: list[tuple[str, str | None]] = []
    for stage in (_named(name, stages) for name in names):
        if len(names) > 1 and not stage.wanted(config):
            continue
        remade = [name for name, why in steps if why is not None and name in stage.inputs(config)]
        why = "asked for by force=true" if config.force else why_stale(stage, config, run)
        steps.append((stage.name, why or (f"{remade[0]} is made anew" if remade else None)))
    return steps


def need_earlier(name: str, config: Config, stages: Sequence[Stage] = STAGES) -> None:
    """RunError when a stage that `name` reads is missing or does not fit `config`."""
    _need_earlier(_named(name, stages), config, Run(config.run_dir), stages)


def borrow(base: Run, run: Run, config: Config, name: str, stages: Sequence[Stage] = STAGES, used: bool = True) -> list[str]:
    """Link into `run` what `base` holds, what fits `config`, and what `name` (a stage, or `run`) would otherwise make or miss; without
    what it merely uses where not `used`. Gives the names.

    A sweep's jobs share prepared data and semantic IDs this way, or a whole policy. A stage that a job makes anew replaces the job's link,
    never the base's files; a link that no longer fits is renewed.
    """
    wanted = [stage.name for stage in stages] if name == "run" else [*_before(name, stages, used), *([] if config.force else [name])]
    borrowed: list[str] = []
    if run.folder == base.folder or (config.force and name == "run"):
        return borrowed
    for stage in (_named(each, stages) for each in wanted):
        same_ground = all(_made(earlier, run) == _made(earlier, base) for earlier in stage.reads if earlier in stage.inputs(config))
        if not same_ground or why_stale(stage, config, run) is None or why_stale(stage, config, base) is not None:
            continue
        folders = (stage.folder, *stage.beside)
        if any(run.path(folder).exists() and not run.path(folder).is_symlink() for folder in folders):
            continue  # its own work, finished with other settings or not finished
        run.folder.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            run.path(folder).unlink(missing_ok=True)
            if base.path(folder).exists():
                run.path(folder).symlink_to(base.path(folder))
        write_json(run.stamp(stage.name), read_json(base.stamp(stage.name)))
        borrowed.append(stage.name)
    return borrowed


def _before(name: str, stages: Sequence[Stage], used: bool) -> list[str]:
    """The stages that this one reads (and uses), and that these read, in order."""
    stage = _named(name, stages)
    reads = stage.reads + (stage.uses if used else ())
    needed = {*reads, *(earlier for each in reads for earlier in _before(each, stages, False))}
    return [stage.name for stage in stages if stage.name in needed]


def why_stale(stage: Stage, config: Config, run: Run, *, check_files: bool = True) -> str | None:
    """One line on why the stage must run, or None when what it wrote is fresh."""
    stamp, folder = _stamp(stage, run), run.path(stage.folder)
    if stamp is None or not folder.exists():
        return "not made yet"
    if folder.is_symlink() and _made(stage.name, Run(folder.resolve().parent)) != stamp["made"]:
        return "the run that it is borrowed from has made it anew since"
    if stamp.get("form", 1) != stage.form:
        return "made by another version of OxyRay"
    changed = _differences(_deciding(stage, stamp["settings"]), _settings(stage, config))
    if changed:
        return f"made with other settings: {changed[0]}" + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
    for name in stage.inputs(config):
        if stamp["inputs"].get(name) != _made(name, run):
            return f"{name} was made anew since"
    if check_files and stamp["files"] != _files(stage, config):
        return "its source files changed"
    return None


def _together(stages: Sequence[Stage], config: Config, run: Run) -> list[Stage]:
    """The first of these stages, and those right behind it that can be trained at the same time."""
    found = [stages[0]]
    for stage in stages[1:]:
        known = {earlier.name for earlier in found}
        if len(found) == config.cluster.stages_at_once or known & {*stage.reads, *stage.uses}:
            break
        found.append(stage)
    trained = all(stage.workers(config) and (config.force or why_stale(stage, config, run)) for stage in found)
    if len(found) > 1 and trained and room_for(config.cluster, sum(stage.workers(config) for stage in found)):
        return found
    return found[:1]


def _run(stage: Stage, config: Config, run: Run, counter: str, say: Callable[[str], None]) -> None:
    why = "asked for by force=true" if config.force else why_stale(stage, config, run)
    if why is None:
        say(f"{counter}{stage.name}: fresh, skipped (force=true makes it anew)")
        return
    say(f"{counter}{stage.name}: {stage.about} ({why})")
    with _BEGINNING:
        run.write_config(config)
        run.write_versions()
    stamp = {
        "stage": stage.name,
        "form": stage.form,
        "settings": _settings(stage, config),
        "inputs": {name: _made(name, run) for name in stage.inputs(config)},
        "files": _files(stage, config),
    }
    for folder in (stage.folder, *stage.beside):
        if run.path(folder).is_symlink():  # borrowed (see `borrow`): what is made anew must not go into the base run
            run.path(folder).unlink()
    started = time.time()
    stage.function()(config, run)
    seconds = round(time.time() - started, 2)
    if not run.path(stage.folder).exists():
        raise RunError(f"stage {stage.name} ended without writing {run.path(stage.folder)}: this is a bug of that stage")
    write_json(run.stamp(stage.name), stamp | {"made": uuid.uuid4().hex, "finished": round(time.time(), 3), "seconds": seconds})
    run.log(stage.name, {"stage_seconds": seconds})
    say(f"{counter}{stage.name}: done in {_span(seconds)}, in {run.path(stage.folder)}")


def _need_earlier(stage: Stage, config: Config, run: Run, stages: Sequence[Stage]) -> None:
    for earlier in (_named(name, stages) for name in stage.reads + stage.uses):
        if not earlier.wanted(config):
            continue
        why = why_stale(earlier, config, run, check_files=False)
        if why == "not made yet" and earlier.name in stage.uses and earlier.name not in stage.needs(config):
            continue
        if why == "not made yet":
            raise RunError(
                f"{stage.name} needs {earlier.name}, which {run.folder} does not hold: run `oxyray {earlier.name}` (or `oxyray run`) first"
            )
        if why is not None:
            raise RunError(
                f"{stage.name} needs {earlier.name}, but the one in {run.folder} does not fit: {why}. Repeat the overrides that it "
                f"was made with, set another run_dir, or make it anew with `oxyray {earlier.name}` or `oxyray run`"
            )


def _named(name: str, stages: Sequence[Stage]) -> Stage:
    for stage in stages:
        if stage.name == name:
            return stage
    raise ConfigError(f"{name}: no such stage; there are {', '.join(stage.name for stage in stages)}")


def _stamp(stage: Stage, run: Run) -> dict[str, Any] | None:
    path = run.stamp(stage.name)
    if not path.is_file():
        return None
    stamp = read_json(path)
    return stamp if isinstance(stamp, dict) and {"settings", "inputs", "files", "made"} <= stamp.keys() else None


def _made(name: str, run: Run) -> str | None:
    path = run.stamp(name)
    return read_json(path).get("made") if path.is_file() else None


def _settings(stage: Stage, config: Config) -> dict[str, Any]:
    """Flat `{key: value}` of the settings that decide the stage's result."""
    return _deciding(stage, _flat(to_dict(config)))


def _deciding(stage: Stage, flat: dict[str, Any]) -> dict[str, Any]:
    """A stamp is read through this too: a key that it holds may have been found to change speed alone since. Micro-batches do more than
    that where requests are compared with the others of theirs (Q2I)."""
    speed = [name for name in stage.speed if name != "train.micro_batches" or not flat.get("model.retrieval.q2i")]
    return {
        key: value
        for key, value in flat.items()
        if any(key == s or key.startswith(s + ".") for s in stage.settings) and not any(key == s or key.startswith(s + ".") for s in speed)
    }


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{where}{key}.")
        else:
            flat[f"{where}{key}"] = value
    return flat


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    absent = object()
    keys = [key for key in {**old, **new} if old.get(key, absent) != new.get(key, absent)]
    return [f"{key} was {json.dumps(old.get(key))} and is now {json.dumps(new.get(key))}" for key in keys]


def _files(stage: Stage, config: Config) -> str:
    """A hash over name, size and time of the files that the stage reads."""
    return hashlib.sha256(json.dumps(marks(stage.files(config))).encode()).hexdigest()[:16]


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the run folder: two commands at work in one folder would overwrite each other."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.path(".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{run.folder} is in use by another oxyray (process {file.read().strip() or '?'}): wait for it or set another run_dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        clear_leftovers(run.folder)
        yield
