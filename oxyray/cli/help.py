"""Help texts and the configuration reference, written from the dataclasses, the stage table and the files of `conf/`.

`python -m oxyray.cli.help > docs/configuration.md` writes the reference anew; a test holds it to the code.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oxyray.cli.compose import choices, conf_dir
from oxyray.cli.sid import VERBS
from oxyray.config.keys import REQUIRED, Key, groups, keys
from oxyray.pipeline import STAGES

COMMANDS = {
    "run": "all stages in order; what is fresh is skipped",
    "recommend": "recommend to one user: user=... scenario=... k=10 trigger=... query=...",
    "ablate": "a table of the paper, with seeds: oxyray ablate TABLE",
    "doctor": "check this machine: versions, devices, memory, Ray",
}
_OPTIONS = """\
  -m, --multirun      sweep: key=a,b,c runs a job for each value, each in its own folder under multirun/
  --dry-run           check everything, write the resolved configuration, say what would run, stop
  --config-dir DIR    a folder of your own beside conf/, say with DIR/data/myshop.yaml for data=myshop
  -h, --help          this page; oxyray STAGE --help lists what a stage can be told
  --version           the version"""
_EXAMPLES = """\
  oxyray run data=mall                              the embedded shop, from logs to a report
  oxyray run data=tables data.path=/my/tables       your own tables
  oxyray recommend data=mall user=U000001 k=5       look at what one user gets
  oxyray pretrain -m model.width=64,128             a sweep; add hydra/launcher=ray to run its jobs side by side
  oxyray run debug=fast                             every stage for a few seconds"""
_MORE_GROUPS = {"recommend": ("recommend",), "doctor": ("cluster",)}  # what a command reads that is no stage
_STAGE_GROUPS = ("cluster", "tracking")  # what every stage reads beyond its own settings
_USAGES = {
    "recommend": "user=ID [scenario=NAME] [trigger=ITEM] [query=TEXT] [k=10] [run_dir=DIR | data=NAME]",
    "ablate": "TABLE [key=value ...] [ablation=TABLE_VARIANT,...] [train.seed=1,2] [--dry-run] [--config-dir DIR]",
    "doctor": "[cluster.key=value ...]",
}
# Commands that read not all of the keys outside groups.
_TOP: dict[str, tuple[str, ...]] = {"recommend": ("run_dir",), "doctor": ()}


def page() -> str:
    """What `oxyray --help` prints."""
    stages = [(stage.name, stage.about) for stage in STAGES]
    return "\n".join(
        [
            "OxyRay turns a shop's logs into a generative recommender.",
            "",
            "usage: oxyray STAGE [key=value ...] [-m] [--dry-run] [--config-dir DIR]",
            "",
            "Stages, in order:",
            *_columns(stages),
            "",
            "Commands:",
            *_columns(list(COMMANDS.items())),
            "",
            "Options:",
            _OPTIONS,
            "",
            "Choices (group=choice):",
            *_columns([(group, ", ".join(names)) for group, names in choices().items()]),
            "",
            "Examples:",
            _EXAMPLES,
            "",
            "Everything a run makes is in its run folder: run_dir=runs/NAME unless you say otherwise.",
        ]
    )


def stage_page(name: str, values: dict[str, Any] | None = None) -> str:
    """What `oxyray STAGE --help` prints:

    the groups and keys that the stage reads. `values` are the composed ones, shown in place of defaults.
    """
    stage = next((stage for stage in STAGES if stage.name == name), None)
    about = stage.about if stage else COMMANDS[name]
    usage = _USAGES.get(name, "[key=value ...] [-m] [--dry-run] [--config-dir DIR]")
    lines = [f"oxyray {name}: {about}", "", f"usage: oxyray {name} {usage}", ""]
    if stage and stage.reads:
        lines += [f"Needs, in the same run_dir: {', '.join(stage.reads)}. Writes run_dir/{stage.folder}.", ""]
    if name == "recommend":
        lines += ["Short keys: user, scenario, trigger, query and k. The model is the one in run_dir (or data=NAME, for runs/NAME).", ""]
    if name == "sid":
        asked = [(f"oxyray sid {verb}", what) for verb, what in VERBS.items()]
        asked.append(("oxyray sid --report", "a page to look at; beside=RUN_DIR,RUN_DIR puts other runs' figures beside it"))
        lines += ["Of a run that has them:", *_columns(asked), ""]
    if name == "ablate":
        variants: dict[str, list[str]] = {}
        for each in choices()["ablation"]:
            if "_" in each:
                variants.setdefault(each.partition("_")[0], []).append(each)
        lines += ["Tables, and what ablation= may name of each:", *_columns([(table, ", ".join(own)) for table, own in variants.items()])]
        lines += ["", "All else as of `oxyray run`: what is said there holds for every variant.", ""]
    if name == "run":
        lines += [f"Runs {', '.join(stage.name for stage in STAGES)}.", ""]
    read = _groups_of(name)
    known, about_group = choices(), groups()
    for group in ["", *[g for g in about_group if any(g == r or g.startswith(r + ".") for r in read)]]:
        inner = [key for key in keys() if key.group == group and (group or key.name in _TOP.get(name, (key.name,)))]
        title = f"{group}: {about_group[group]}" if group else "top:"
        if not inner:
            continue
        lines.append(title + (f"  [{group}={' | '.join(known[group])}]" if group in known else ""))
        lines += _key_lines(inner, values)
        lines.append("")
    return "\n".join(lines).rstrip()


def reference() -> str:
    """`docs/configuration.md`."""
    lines = [
        "# Configuration reference",
        "",
        "Written by `python -m oxyray.cli.help > docs/configuration.md`; do not edit.",
        "",
        "Every key can be set on the command line (`model.width=128`) or in a YAML file under `conf/`. Where a choice's file names",
        "a key, the file's value stands instead of the default below; `oxyray STAGE group=choice --help` shows the values in force.",
        "",
        "## Choices",
        "",
        "| group | choice | what |",
        "|---|---|---|",
    ]
    for group, names in choices().items():
        lines += [f"| `{group}` | `{name}` | {_comment(conf_dir() / group / f'{name}.yaml')} |" for name in names]
    about_group = groups()
    for group in ["", *about_group]:
        inner = [key for key in keys() if key.group == group]
        lines += ["", f"## {group or 'Top'}", ""]
        lines += [f"{about_group[group]}.", ""] if group else []
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {key.kind.replace('|', 'or')} | {_shown(key.default)} | {key.about} |" for key in inner]
    return "\n".join(lines) + "\n"


def _groups_of(name: str) -> tuple[str, ...]:
    if name == "run":
        return tuple(group for group in groups() if "." not in group and group != "recommend")
    stage = next((stage for stage in STAGES if stage.name == name), None)
    if stage is None:
        return _MORE_GROUPS.get(name, ())
    return (*(setting for setting in stage.settings if setting in groups()), *_STAGE_GROUPS)


def _key_lines(inner: list[Key], values: dict[str, Any] | None) -> Iterator[str]:
    for key in inner:
        value = _find(values, key.name, key.default) if values is not None else key.default
        head = f"  {key.name}={'???' if value is REQUIRED else _yaml(value)}"
        about = textwrap.wrap(f"{key.about} ({key.kind})" if "|" in key.kind and "null" not in key.kind else key.about, 78)
        yield f"{head:<42}  {about[0]}" if len(head) <= 42 else head
        for line in about[1:] if len(head) <= 42 else about:
            yield f"{'':<42}  {line}"


def _find(values: dict[str, Any], name: str, default: Any) -> Any:
    found: Any = values
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return default
        found = found[part]
    return found


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return str(value)


def _shown(default: Any) -> str:
    return "must be given" if default is REQUIRED else f"`{_yaml(default)}`"


def _comment(path: Path) -> str:
    """The leading comment of a YAML file, its `@package` line left out."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [
        f"  {left:<{width}}  {line}" if number == 0 else f"  {'':<{width}}  {line}"
        for left, right in rows
        for number, line in enumerate(textwrap.wrap(right, 100) or [""])
    ]


if __name__ == "__main__":
    print(reference(), end="")
