"""What a run's data and settings make of its training targets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from oxyray.config import Config
from oxyray.data.requests import timeline, training_segments
from oxyray.errors import ConfigError
from oxyray.model.inputs import Inputs
from oxyray.run import Run
from oxyray.train.validate import Validation
from tests.evaluate.shop import prepared_run


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Inputs]:
    config, run = prepared_run(tmp_path_factory.mktemp("shop"))
    return config, Inputs.load(Run(run.folder))


def mixed(config: Config, **weights: float) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, scenario_weights=weights))


def test_a_target_weighs_what_its_action_and_scenario_say(shop: tuple[Config, Inputs]) -> None:
    config, inputs = shop
    meta = inputs.prepared.meta
    train = mixed(config, cart=0.5, default=3.0).train
    collate = inputs.collator(config.model, train)
    time = timeline(inputs.prepared.events(0), splits=(0,))
    segments = training_segments(time, config.model.history)
    batch = collate(time, segments)
    rate = {"cart": 0.5, "home": 3.0}
    want = [
        train.action_weights[meta.actions[action]] * rate[meta.scenarios[scenario]]
        for action, scenario in zip(batch.action_Q.tolist(), batch.scenario_Q.tolist(), strict=True)
    ]
    assert batch.weight_Q.tolist() == pytest.approx(want)
    assert len(set(want)) == 4, "two actions in two scenarios"


def test_scenarios_that_weigh_nothing_are_not_validated_on(shop: tuple[Config, Inputs]) -> None:
    config, inputs = shop
    cart = inputs.prepared.meta.scenarios.index("cart")
    events = [inputs.prepared.events(part, ["split", "scenario"]) for part in range(inputs.prepared.parts)]
    valid = np.concatenate([rows["scenario"][rows["split"] == 1] for rows in events])
    assert 0 < (valid == cart).sum() < len(valid)
    assert Validation(config, inputs, 0, 1, 1000).requests == len(valid)
    alone = Validation(mixed(config, default=0.0, cart=1.0), inputs, 0, 1, 1000)
    assert alone.requests == (valid == cart).sum()
    assert {int(scenario) for piece in alone._pieces if piece for scenario in piece.batch.scenario_Q} == {cart}


def test_actions_that_weigh_nothing_are_not_validated_on(shop: tuple[Config, Inputs]) -> None:
    config, inputs = shop
    actions = inputs.prepared.meta.actions
    kept = inputs.prepared.events(0)["action"][0]
    weights = {name: float(number == kept) for number, name in enumerate(actions)}
    alone = Validation(dataclasses.replace(config, train=dataclasses.replace(config.train, action_weights=weights)), inputs, 0, 1, 1000)
    assert 0 < alone.requests < Validation(config, inputs, 0, 1, 1000).requests
    assert {int(action) for piece in alone._pieces if piece for action in piece.batch.action_Q} == {kept}
    assert all((piece.batch.weight_Q > 0).all() for piece in alone._pieces if piece)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"basket": 1.0}, "train.scenario_weights: the data has no scenario basket; known are cart, home, default"),
        ({"default": 0.0}, "train.action_weights, train.scenario_weights: no target weighs anything"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(shop: tuple[Config, Inputs], weights: dict[str, float], message: str) -> None:
    config, inputs = shop
    with pytest.raises(ConfigError, match=message):
        inputs.collator(config.model, mixed(config, **weights).train)
