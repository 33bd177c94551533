"""Every shipped YAML file: it composes, its keys exist, and the table of contents and the reference speak of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from oxyray.cli.ablate import TABLES
from oxyray.cli.compose import check, choices, compose_config, conf_dir
from oxyray.cli.help import reference
from oxyray.config import Config
from oxyray.config.keys import keys
from oxyray.pipeline import STAGES

ROOT = Path(__file__).parents[1]
CHOICES = [(group, choice) for group, names in choices().items() for choice in names]


def composed(*overrides: str) -> Config:
    return compose_config(check(overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: str(value))
def test_every_choice_composes_into_a_valid_configuration(group: str, choice: str) -> None:
    needs = [] if group != "data" or "???" not in (conf_dir() / "data" / f"{choice}.yaml").read_text() else ["data.path=/some/folder"]
    needs += ["experiment=null"] if choice.startswith("oxygen") else []  # the embedded shop's own values suit a tied head
    needs += ["data.mall.size=large"] if (group, choice) == ("sid", "large") else []  # 8,192 codes need a shop of that size
    config = composed(f"{group}={choice}", *needs)
    assert config.run_dir.startswith("runs/")


def test_no_choice_of_data_stands_on_a_folder_that_only_some_have() -> None:
    for choice in choices()["data"]:
        path = yaml.safe_load((conf_dir() / "data" / f"{choice}.yaml").read_text()).get("path")
        assert path in (None, "???"), f"data={choice} looks for {path}, wherever the command is given"


def test_what_the_how_to_says_to_type_is_valid() -> None:
    text = (ROOT / "docs" / "how_to.md").read_text()
    said = re.findall(r"^(oxyray [^#\n]*=[^#\n]*?) *(?:#|$)", text, re.M) + re.findall(r"`(oxyray [^`]*data=[^`]*)`", text)
    assert len(said) >= 5
    for line in said:
        stage, *words = (word for word in line.split()[1:] if word != "-m")
        if stage == "ablate":
            assert words[0] in TABLES
            check(words[1:], sweep=True)
            continue
        assert stage == "run" or stage in [each.name for each in STAGES]
        if "-m" in line:
            check(words, sweep=True)
        else:
            composed(*words)


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: str(path.relative_to(conf_dir())))
def test_every_file_is_a_mapping_that_opens_with_what_it_is_for(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()) or {}, dict)
    if path.name != "config.yaml":
        assert path.read_text().startswith("#"), "say in a leading comment what the choice is for: the reference shows it"


def test_the_table_of_contents_names_every_group() -> None:
    listed = {
        next(iter(entry)) for entry in yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"] if isinstance(entry, dict)
    }
    assert {entry.removeprefix("optional ") for entry in listed if not entry.startswith("override")} == set(choices())


def test_every_debug_choice_keeps_away_from_the_real_run() -> None:
    for choice in choices()["debug"]:
        if choice != "none":
            assert composed(f"debug={choice}").run_dir.startswith("runs/debug/")


def test_the_seed_is_one_dial() -> None:
    config = composed("seed=123")
    assert (config.seed, config.train.seed, config.sid.seed) == (123, 123, 123)


def test_an_experiment_is_taken_with_its_data_and_yields_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "myshop.yaml").write_text("# Mine.\nname: myshop\nsource: tables\npath: /my/tables\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "myshop.yaml").write_text("# @package _global_\n# Tuned.\nmodel:\n  width: 48\n  dropout: 0.3\n")

    def mine(*overrides: str) -> Config:
        return compose_config(check(["data=myshop", *overrides], config_dir=tmp_path))

    assert (mine().model.width, mine().model.dropout, mine().run_dir) == (48, 0.3, "runs/myshop")
    assert (mine("model.width=96").model.width, mine("model.width=96").model.dropout) == (96, 0.3)
    assert mine("experiment=null").model.width == mine("~experiment").model.width == composed().model.width
    assert mine("debug=overfit").model.dropout == 0.0


def test_a_mapping_that_is_given_whole_replaces_the_one_that_was_there() -> None:
    made = compose_config(check(["data=mall", "fuse=sources", "fuse.rates={peers: 1.0}", "reward.weights={default: {format: 1.0}}"]))
    assert made.fuse.rates == {"peers": 1.0}
    assert made.reward.weights == {"default": {"format": 1.0}}
    assert compose_config(check(["data=mall", "reward.weights.default.format=3.0"])).reward.weights["default"]["format"] == 3.0
    for choice in choices()["ablation"]:
        if choice.startswith(("tokenizer_", "sources_")):
            alone, beside = (compose_config(check(["data=mall", f"ablation={choice}", f"fuse={fuse}"])) for fuse in ("swing", "sources"))
            if alone.sid.vectors == "fused":
                assert {k: v for k, v in alone.fuse.rates.items() if v} == {k: v for k, v in beside.fuse.rates.items() if v}, choice


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "write it anew: python -m oxyray.cli.help > docs/configuration.md"
    )


def test_the_surface_of_the_command_line_is_frozen() -> None:
    """A changed key or group breaks people's scripts: change this file on purpose, and say so in the CHANGELOG."""
    surface = [f"{key.name}: {key.kind}" for key in keys()] + [f"{group}=..." for group in choices()]
    assert (ROOT / "tests" / "golden" / "config_keys.txt").read_text().splitlines() == surface
