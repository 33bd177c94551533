"""The configuration classes: types, unknown keys, impossible combinations; and that every key is described."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxyray.config import Config, ModelConfig, from_dict, to_dict
from oxyray.config.keys import REQUIRED, keys
from oxyray.errors import ConfigError


def values(**more: object) -> dict[str, object]:
    return {"run_dir": "r", "data": {"name": "mall", "source": "mall"}, **more}


def test_defaults_make_a_valid_configuration_and_survive_a_round_trip() -> None:
    config = from_dict(Config, values())
    assert from_dict(Config, to_dict(config)) == config


def test_only_what_cannot_have_a_default_must_be_given() -> None:
    assert [key.name for key in keys() if key.default is REQUIRED] == ["run_dir", "data.name", "data.source"]


def test_the_default_of_a_key_is_the_value_that_it_has_where_nobody_sets_it() -> None:
    def of(name: str) -> object:
        found: object = from_dict(Config, values())
        for part in name.split("."):
            found = getattr(found, part)
        return found

    optional = [key for key in keys() if key.default is not REQUIRED]
    assert {key.name: key.default for key in optional} == {key.name: of(key.name) for key in optional}
    assert len({key.default for key in keys() if key.name.endswith("optim.lr")}) > 1, "groups of one class may have defaults of their own"


def test_every_key_is_described() -> None:
    assert [key.name for key in keys() if not key.about] == []
    assert [key.name for key in keys() if key.about.endswith((" the", " for", " (two", " one", ","))] == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"modle": {}}, "modle: no such key; did you mean model?"),
        ({"model": {"widht": 3}}, "model.widht: no such key; did you mean model.width?"),
        ({"model": {"width": "wide"}}, "model.width: expected a whole number, got 'wide'"),
        ({"model": {"width": 64.0}}, "model.width: expected a whole number, got 64.0"),
        ({"model": {"user_table": 1}}, "model.user_table: expected true or false, got 1"),
        ({"model": 3}, "model: expected a group of keys, got 3"),
        ({"model": {"head": "both"}}, "model.head: expected one of tied, codes, got 'both'"),
        ({"model": {"width": 64, "heads": 5}}, "model.heads: 5 heads do not divide model.width=64: set model.width=60"),
        ({"model": {"width": 12, "heads": 4}}, "model.heads: model.width=12 / 4 heads is odd, and must be even: set model.width=16"),
        ({"model": {"dropout": 1}}, "model.dropout: must lie in [0, 1), got 1.0"),
        ({"train": {"optim": {"betas": [0.9]}}}, "train.optim.betas: expected a list of 2, got [0.9]"),
        ({"train": {"optim": {"betas": [2, 3]}}}, "train.optim.betas: must lie in [0, 1), got [2.0, 3.0]"),
        ({"train": {"optim": {"lr": float("inf")}}}, "train.optim.lr: must be 0 or more and finite, got inf"),
        ({"train": {"optim": {"weight_decay": -1}}}, "train.optim.weight_decay: must be 0 or more and finite, got -1.0"),
        ({"train": {"eval_requests": -1}}, "train.eval_requests: must be 0 or more, got -1"),
        ({"train": {"max_restarts": -1}}, "train.max_restarts: must be 0 or more, got -1"),
        ({"train": {"timeout_s": -1}}, "train.timeout_s: must be positive, got -1.0"),
        ({"train": {"action_weights": {"purchase": 8}}}, "train.action_weights.click: missing; every action needs its weight"),
        (
            {"train": {"action_weights": {"click": 1, "cart": 1, "purchase": 1, "view": 3}}},
            "train.action_weights.view: no such action; known are click, cart, purchase",
        ),
        (
            {"train": {"action_weights": {"click": -1, "cart": 1, "purchase": 1}}},
            "train.action_weights.click: must be 0 or more and finite, got -1.0",
        ),
        ({"evaluate": {"max_requests": -5}}, "evaluate.max_requests: must be positive or null, got -5"),
        ({"evaluate": {"bootstrap": -5}}, "evaluate.bootstrap: must be 0 (none) or more, got -5"),
        ({"evaluate": {"baselines": ["knn", "knn"]}}, "evaluate.baselines: names one twice: ['knn', 'knn']"),
        (
            {"data": {"name": "x", "source": "mall", "mall": {"size": "tiny"}}, "sid": {"width": 512}},
            "sid.width: 512 codes are more than the shop's 272 items: set it to 272 or less",
        ),
        (
            {"data": {"name": "x", "source": "mall", "mall": {"size": "tiny"}}, "generate": {"beams": 300}},
            "generate.beams: 300 beams are wider than the catalogue of 272 items at most: set it to 272 or less",
        ),
        ({"train": {"optim": {"zero_stage": 4}}}, "train.optim.zero_stage: must be 0, 1, 2 or 3, got 4"),
        (
            {"train": {"workers": 4, "targets_per_step": 2}},
            "train.targets_per_step: must give every worker and micro-batch a target: at least 4",
        ),
        (
            {"evaluate": {"ks": [10, 100]}},
            "generate.beams: 50 beams cannot fill the top 100 of evaluate.ks: set generate.beams=100 or more",
        ),
        (
            {"sid": {"levels": 1, "width": 40}},
            "generate.beams: 50 beams are wider than the catalogue of 40 items at most: set it to 40 or less",
        ),
        ({"evaluate": {"baselines": ["bert4rec"]}}, "evaluate.baselines: known are ['knn', 'popularity', 'sasrec'], got ['bert4rec']"),
        ({"data": {"name": "x", "source": "tables"}}, "data.path: data.source=tables needs a folder: data.path=/my/tables"),
        ({"data": {"name": "x"}}, "data.source: missing, and it has no default"),
        ({"train": {"action_weights": {"click": "much"}}}, "train.action_weights.click: expected a number, got 'much'"),
    ],
)
def test_what_cannot_work_is_one_line_with_the_mend(more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, values(**more))
    assert str(caught.value) == message
    assert "\n" not in message


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_mend_for_heads_that_do_not_divide_the_width_works(width: int, heads: int) -> None:
    try:
        ModelConfig(width=width, heads=heads)
    except ConfigError as error:
        mended = int(str(error).rpartition("model.width=")[2])
        assert ModelConfig(width=mended, heads=heads).width == mended


def test_configurations_are_keyword_only() -> None:
    assert all(field.kw_only for field in dataclasses.fields(Config))
