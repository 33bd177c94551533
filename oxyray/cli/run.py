"""Carry out one command in its run folder, with a log, and say what went wrong in one line."""

from __future__ import annotations

import sys
from pathlib import Path

from oxyray import pipeline
from oxyray.config import Config
from oxyray.errors import DataError, OxyrayError
from oxyray.logs import attempt
from oxyray.run import Run


def perform(name: str, config: Config) -> None:
    """Run the stage `name`, or all (`run`). The log is in the run folder's `logs/latest/main.log`."""
    run = Run(config.run_dir)
    with attempt(run.folder, ["oxyray", name]):
        if name == "run":
            pipeline.run_all(config)
            print(f"open {run.path('report', 'report.html')} in a browser")
        else:
            pipeline.run_one(name, config)


def rehearse(name: str, config: Config) -> None:
    """`--dry-run`: check what can be known beforehand, write the resolved configuration, say what would run."""
    run = Run(config.run_dir)
    path = config.data.path
    if name in ("run", "prepare") and config.data.source != "mall" and path is not None and not Path(path).expanduser().exists():
        raise DataError(f"data.path={path}: no such file or folder")
    if name != "run":
        pipeline.need_earlier(name, config)
    names = [stage.name for stage in pipeline.STAGES] if name == "run" else [name]
    for stage, why in pipeline.plan(config, names):
        print(f"{stage}: {'fresh, would be skipped' if why is None else f'would run ({why})'}")
    print(f"the configuration is valid; resolved: {run.write_config(config, 'dry_run.yaml')}")


def known_error(error: BaseException | None) -> OxyrayError | None:
    """The first of OxyRay's own errors in the chain of causes (Ray's `cause` and Python's `raise ... from`), or None: then it is a bug.

    Ray hands a worker's error over inside one of its own, of a class made on the fly that inherits from both; that one is passed over.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OxyrayError) and type(error).__module__ == OxyrayError.__module__:
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def log_hint(run_dir: str | None) -> str:
    folder = Path(run_dir or "runs").expanduser() / "logs" / "latest" / "main.log"
    return f"the log: {folder.resolve()}" if folder.exists() else "there is no log yet"


def complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
