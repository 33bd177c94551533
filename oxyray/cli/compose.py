"""From the words of a command line to a checked `Config`: Hydra begins and ends here.

Every override is checked against the known keys and groups before Hydra sees it, so that a mistake is one line with the mend and not
Hydra's own text. Keys known to the dataclasses can be set whether or not a YAML file names them. A configuration says values, never code:
Hydra's `_target_` is refused wherever it stands.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import oxyray
from oxyray.config import Config, from_dict, set_dotted
from oxyray.config.keys import REQUIRED, keys
from oxyray.errors import ConfigError

# What a sweep may set of Hydra's own configuration. Hydra runs what its other keys name (callbacks, log handlers), so they stay shut.
_HYDRA_GROUPS = ("hydra/launcher",)
_HYDRA_KEYS = ("hydra.launcher.", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.sweeper.max_batch_size")


@dataclass(frozen=True)
class Words:
    """Checked overrides, ready for Hydra. `raw` are values taken as they are, past Hydra's grammar (user and item ids)."""

    values: tuple[str, ...]
    raw: dict[str, str] = field(default_factory=dict)
    config_dir: Path | None = None


def conf_dir() -> Path:
    """The shipped configuration: inside the installed package, or beside it in a checkout."""
    package = Path(oxyray.__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"conf/config.yaml is missing beside {package}: install oxyray again")


def choices(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Each configuration group with its choices, the user's own folder included."""
    found: dict[str, set[str]] = {"experiment": set()}  # a group even while it has no files
    for folder in filter(None, (conf_dir(), config_dir)):
        for path in folder.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def check(overrides: Sequence[str], *, sweep: bool = False, config_dir: Path | None = None, short: dict[str, str] | None = None) -> Words:
    """Check overrides and put them into the form that Hydra takes. `short` maps short keys (`user`) to full ones.

    Raises ConfigError for bad syntax, an unknown key, group or choice, a `_target_`, and for lists of values outside a sweep.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    known = choices(config_dir)
    values: list[str] = []
    raw: dict[str, str] = {}
    for word in overrides:
        key, _, value = word.partition("=")
        if short and key in short:
            raw[short[key]] = value
        else:
            values += _check_one(word, sweep, known)
    if config_dir is not None:
        values.append(f"hydra.searchpath=[file://{config_dir.resolve()}]")
    return Words(tuple(values), raw, config_dir)


def compose_config(words: Words) -> Config:
    """The checked configuration. Raises ConfigError, one line."""
    return from_dict(Config, compose_values(words))


def compose_values(words: Words, *, missing_ok: bool = False) -> dict[str, Any]:
    """The composed values, not yet checked by the dataclasses. With `missing_ok`, values that must be given and were not are left out."""
    with hydra_here(), translated():
        composed = compose("config", overrides=list(words.values))
        lacking = sorted(OmegaConf.missing_keys(composed))
        if lacking and not missing_ok:
            raise ConfigError(f"{lacking[0]}: must be given: {lacking[0]}=...")
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    if not isinstance(values, dict):
        raise ConfigError("the configuration is not a mapping")
    plain = {str(key): value for key, value in _without(values, "???").items()}
    for key, value in words.raw.items():
        set_dotted(plain, key, value)
    refuse_code(plain)
    return plain


@contextmanager
def hydra_here() -> Iterator[None]:
    """Hydra, initialised on the shipped configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_dir(str(conf_dir()), job_name="oxyray", version_base="1.3"):
            yield


@contextmanager
def translated() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's own errors into one line."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise ConfigError(f"{_line(error)}: give it on the command line") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_line(error)) from None


def refuse_code(value: Any, where: str = "") -> None:
    """Refuse `_target_` and its kin at any depth: a configuration must not be able to name code to run."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key).startswith("_") and str(key).endswith("_"):
                raise ConfigError(f"{where}{key}: refused, as it would let a configuration name code to run: remove it")
            refuse_code(inner, f"{where}{key}.")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            refuse_code(inner, f"{where}{number}.")


def parse(words: Sequence[str]) -> list[Override]:
    with translated():
        return list(OverridesParser.create().parse_overrides(list(words)))


def _check_one(word: str, sweep: bool, known_choices: dict[str, list[str]]) -> list[str]:
    """One override in the form that Hydra takes, or ConfigError."""
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"{word}: expected key=value, as in model.width=64 or data=mall")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise ConfigError(f"{word}: cannot be read; put a value with spaces, commas, = or brackets into quotes: \"key='a b'\"") from None
    key = override.key_or_group
    if any(part.startswith("_") and part.endswith("_") for part in key.replace("/", ".").split(".")):
        raise ConfigError(f"{key}: refused, as it would let a configuration name code to run: remove it")
    if override.is_sweep_override() and not sweep:
        raise ConfigError(f"{word}: several values make a sweep: add -m; for one list write {key}=[a,b]")
    if override.is_sweep_override() and not override.is_discrete_sweep():
        raise ConfigError(f"{word}: a sweep needs a list of values: {key}=a,b,c or {key}=range(1,4)")
    if not override.is_sweep_override():
        refuse_code(override.value(), f"{key}.")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return [_check_hydra(word, key, sweep)]
    if key in known_choices:
        return [_check_choice(word, override, known_choices[key])]
    checked = _check_key(word, override)
    whole = not override.is_sweep_override() and isinstance(override.value(), dict)
    return [f"++{key}=null", checked] if whole else [checked]  # else Hydra would add to the mapping that is there


def _check_hydra(word: str, key: str, sweep: bool) -> str:
    if not sweep:
        raise ConfigError(f"{word}: Hydra's own settings are for sweeps: add -m, or leave it out")
    if word == "hydra/launcher=ray":  # another package may have registered a launcher called `ray`, which Hydra would mix with this one
        return "hydra/launcher=oxyray_ray"
    if key in _HYDRA_GROUPS or any(key == k or (k.endswith(".") and key.startswith(k)) for k in _HYDRA_KEYS):
        return word
    raise ConfigError(
        f"{key}: not open; of Hydra's own settings a sweep may set {', '.join(k.rstrip('.') for k in _HYDRA_GROUPS + _HYDRA_KEYS)}"
    )


def _check_choice(word: str, override: Override, options: list[str]) -> str:
    group = override.key_or_group
    if override.package is not None:
        raise ConfigError(f"{word}: a group stays where it is: write {group}=CHOICE")
    if override.is_delete() or (not override.is_sweep_override() and override.value() is None):
        if group != "experiment":
            raise ConfigError(f"{word}: {group} cannot be left out; its choices are {', '.join(options)}")
        return "~experiment"
    if not override.is_sweep_override() and isinstance(override.value(), dict | list):
        raise ConfigError(f"{word}: {group} takes one of {', '.join(options)}; its keys are set one by one, as in {group}.KEY=value")
    for choice in override.sweep_string_iterator() if override.is_sweep_override() else [str(override.value())]:
        if choice not in options:
            raise ConfigError(f"{group}={choice}: no such choice;{_near(choice, options)} there are {', '.join(options)}")
    return word.lstrip("+")


def _check_key(word: str, override: Override) -> str:
    key, known = override.key_or_group, {k.name: k for k in keys()}
    if not (key in known or any(k.open and key.startswith(k.name + ".") for k in known.values())):
        inner = [name for name in known if name.startswith(key + ".")]
        if inner:
            raise ConfigError(f"{key}: a group of keys; set one of them, as in {inner[0]}=...")
        raise ConfigError(f"{key}: no such key;{_near(key, known)} `oxyray STAGE --help` lists them")
    if override.is_delete():
        raise ConfigError(f"{word}: a key cannot be taken away; {_default(key)}")
    return "++" + word.lstrip("+")


def _near(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """` did you mean ...?` for the nearest known word; for dotted keys also by their last part (`lr` for `train.optim.lr`)."""
    near = difflib.get_close_matches(word, list(known), n=1)
    if not near:
        near = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]][:3]
    return f" did you mean {' or '.join(near)}?" if near else ""


def _default(key: str) -> str:
    default = next((k.default for k in keys() if k.name == key), REQUIRED)
    return "set it to another value" if default is REQUIRED else f"its default is {default}"


def _line(error: Exception) -> str:
    """Hydra's message on one line, without its search path and its pointers to web pages."""
    lines = [line.strip() for line in str(error).split("Config search path:")[0].splitlines()]
    kept = [line for line in lines if line and not line.startswith(("See http", "full_key:", "object_type="))]
    name = getattr(error, "full_key", None)
    return (f"{name}: " if name else "") + "; ".join(kept)


def _without(values: Any, mark: str) -> Any:
    if isinstance(values, dict):
        return {key: _without(value, mark) for key, value in values.items() if value != mark}
    return values
