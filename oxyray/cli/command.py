"""The command line: `oxyray STAGE [key=value ...]`.

Exit codes: 0 done, or stopped on request with all saved; 2 the command or its configuration cannot work; 1 anything else; 130 interrupted.
What a person can mend is one line without a traceback; what they cannot keeps its traceback and names the log.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from oxyray.cli.run import complain, known_error, log_hint, perform, rehearse
from oxyray.config import ClusterConfig, RecommendConfig, from_dict
from oxyray.errors import ConfigError, OxyrayError, Stopped
from oxyray.pipeline import STAGES
from oxyray.run import Run

SHORT = {name: f"recommend.{name}" for name in ("user", "scenario", "trigger", "query", "k")}
COMMANDS = (*(stage.name for stage in STAGES), "run", "recommend", "ablate", "doctor")


@dataclass(kw_only=True)
class Command:
    """The words of a command line, sorted."""

    name: str | None = None
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    multirun: bool = False
    dry_run: bool = False
    report: bool = False
    version: bool = False
    config_dir: Path | None = None
    run_dir: str | None = None  # known once the configuration is composed; for the hint on where the log is


def main(argv: Sequence[str] | None = None) -> int:
    command = Command()
    try:
        _parse(list(sys.argv[1:] if argv is None else argv), command)
        return _carry_out(command)
    except KeyboardInterrupt:
        complain("interrupted; what is finished stays, and the same command goes on from there")
        return 130
    except BrokenPipeError:  # `oxyray --help | head`
        return 1
    except Exception as error:
        known = known_error(error)
        if known is None:
            traceback.print_exc()
            complain(f"unexpected {type(error).__name__}, see above; {log_hint(command.run_dir)}")
            return 1
        if isinstance(known, Stopped):
            print(known)
            return 0
        complain(str(known))
        return 2 if isinstance(known, ConfigError) else 1


def _parse(words: list[str], command: Command) -> None:
    rest = iter(words)
    for word in rest:
        if word in ("-h", "--help"):
            command.help = True
        elif word in ("-m", "--multirun"):
            command.multirun = True
        elif word == "--dry-run":
            command.dry_run = True
        elif word == "--report" and command.name == "sid":
            command.report = True
        elif word == "--version":
            command.version = True
        elif word == "--config-dir" or word.startswith("--config-dir="):
            folder = word.partition("=")[2] or next(rest, "")
            if not folder:
                raise ConfigError("--config-dir: expected a folder after it")
            command.config_dir = Path(folder).expanduser()
        elif word.startswith("-"):
            hint = f": keys are written without dashes: {word.lstrip('-')}" if "=" in word else "; `oxyray --help` lists the options"
            raise ConfigError(f"{word}: no such option{hint}")
        elif command.name is None and "=" not in word:
            command.name = word
        else:
            command.overrides.append(word)
    if command.name is not None and command.name not in COMMANDS:
        near = difflib.get_close_matches(command.name, COMMANDS, n=1)
        raise ConfigError(f"{command.name}: no such stage;{f' did you mean {near[0]}?' if near else ''} there are {', '.join(COMMANDS)}")


def _carry_out(command: Command) -> int:
    if command.version:
        print(f"oxyray {_version()}")
    elif command.name is None:
        from oxyray.cli.help import page

        if command.overrides and not command.help:
            raise ConfigError(
                f"{command.overrides[0]}: expected a stage first: oxyray STAGE {' '.join(command.overrides)}; stages: {', '.join(COMMANDS)}"
            )
        print(page())
        return 0 if command.help else 2
    elif command.help:
        _help(command)
    elif command.name == "doctor":
        return _doctor(command)
    elif command.name == "recommend":
        _recommend(command)
    elif command.name == "ablate":
        return _ablate(command)
    elif command.name == "sid" and (command.report or (command.overrides and "=" not in command.overrides[0])):
        _sid(command)
    else:
        return _stage(command)
    return 0


def _stage(command: Command) -> int:
    from oxyray.cli.compose import check, compose_config

    assert command.name is not None
    words = check(command.overrides, sweep=command.multirun, config_dir=command.config_dir)
    if command.multirun:
        from oxyray.cli.sweep import sweep

        return sweep(command.name, words, command.dry_run)
    config = compose_config(words)
    command.run_dir = config.run_dir
    (rehearse if command.dry_run else perform)(command.name, config)
    return 0


def _recommend(command: Command) -> None:
    """Recommend with a trained run. Its own saved configuration holds; only where it is and what to ask can be said."""
    from oxyray.cli.compose import check, compose_values

    if command.multirun or command.dry_run:
        raise ConfigError("recommend: takes neither -m nor --dry-run")
    for word in command.overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key not in SHORT and key not in ("run_dir", "data", "data.name") and not key.startswith("recommend."):
            raise ConfigError(f"{key}: recommend uses the configuration of the run; it takes run_dir, data and {', '.join(SHORT)}")
    values = compose_values(check(command.overrides, config_dir=command.config_dir, short=SHORT), missing_ok=True)
    asked = values.get("recommend", {})
    if isinstance(asked.get("k"), str) and asked["k"].isdigit():
        asked["k"] = int(asked["k"])
    wanted = from_dict(RecommendConfig, asked, "recommend.")
    run = Run(values["run_dir"])
    command.run_dir = str(run.folder)
    run.config()
    run.need("pretrain", stage="pretrain")
    if wanted.user is None:
        raise ConfigError("user: must be given: oxyray recommend user=USER_ID")
    from oxyray.recommend import Recommender

    ready = Recommender.load(run.folder)
    print(ready.recommend(wanted.user, scenario=wanted.scenario, trigger=wanted.trigger, k=wanted.k, query=wanted.query))


def _ablate(command: Command) -> int:
    from oxyray.cli.ablate import TABLES, ablate

    table = command.overrides.pop(0) if command.overrides and "=" not in command.overrides[0] else ""
    if table not in TABLES:
        raise ConfigError(
            f"ablate: expected a table first, one of {', '.join(TABLES)}: oxyray ablate position" + (f"; got {table}" if table else "")
        )
    return ablate(table, command.overrides, command.config_dir, command.dry_run)


def _sid(command: Command) -> None:
    """Ask a run about its semantic IDs. Its own saved configuration holds; only where it is and what to ask can be said."""
    from oxyray.cli.compose import check, compose_values
    from oxyray.cli.sid import VERBS, ask

    verb = "" if command.report else command.overrides.pop(0)
    if verb not in VERBS and not command.report:
        raise ConfigError(f"sid {verb}: expected {' or '.join(VERBS)}, or settings (key=value) of the stage")
    place = [word for word in command.overrides if word.partition("=")[0] in ("run_dir", "data")]
    if loose := [word for word in command.overrides if "=" not in word]:
        raise ConfigError(f"{loose[0]}: expected key=value, without spaces between several: item=ID,ID")
    asked = dict(word.split("=", 1) for word in command.overrides if word not in place)
    run = Run(compose_values(check(place, config_dir=command.config_dir), missing_ok=True)["run_dir"])
    command.run_dir = str(run.folder)
    if command.report:
        from oxyray.evaluate.sid_report import sid_report

        if unknown := [name for name in asked if name != "beside"]:
            raise ConfigError(f"{unknown[0]}: `oxyray sid --report` takes run_dir or data, and beside=RUN_DIR,RUN_DIR")
        sid_report(run, [Run(folder) for folder in asked.get("beside", "").split(",") if folder])
    else:
        ask(verb, asked, run)


def _doctor(command: Command) -> int:
    from oxyray.doctor import examine, render, verdict

    cluster = ClusterConfig()
    try:
        from oxyray.cli.compose import check, compose_values

        words = check(command.overrides, config_dir=command.config_dir)
        cluster = from_dict(ClusterConfig, compose_values(words, missing_ok=True)["cluster"], "cluster.")
    except OxyrayError:
        if command.overrides:
            raise
    except ImportError:  # Hydra itself may be what is missing; the examination says so
        complain("the configuration cannot be composed; going on with the defaults")
    found = []
    for each in examine(cluster):
        print(render(each), flush=True)
        found.append(each)
    print(f"\n{verdict(found)}")
    return 1 if any(each.state == "bad" for each in found) else 0


def _help(command: Command) -> None:
    from oxyray.cli.compose import check, compose_values
    from oxyray.cli.help import stage_page

    assert command.name is not None
    short = SHORT if command.name == "recommend" else None
    values = compose_values(check(command.overrides, sweep=True, config_dir=command.config_dir, short=short), missing_ok=True)
    print(stage_page(command.name, values))


def _version() -> str:
    try:
        return version("oxyray")
    except PackageNotFoundError:
        return "not installed (run from its folder)"


if __name__ == "__main__":
    sys.exit(main())
