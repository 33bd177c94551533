"""Popularity: the pool's items by training events in the scenario, ties by training events in all scenarios, then by item index."""

from __future__ import annotations

import numpy as np

from oxyray.evaluate.baselines import Lists
from oxyray.evaluate.requests import TRAIN, Parts, Requests

Array = np.ndarray


class Popularity:
    """`pool_SI` says which items each scenario may show."""

    name = "popularity"

    def __init__(self, data: Parts, pool_SI: Array) -> None:
        scenarios, items = pool_SI.shape
        self.count_SI = np.zeros((scenarios, items), dtype=np.int64)
        for part in range(data.parts):
            events = data.events(part)
            train = events["split"] == TRAIN
            np.add.at(self.count_SI, (events["scenario"][train], events["item"][train]), 1)
        self.count_I = self.count_SI.sum(axis=0)
        self.order_S = [self._order(scenario, pool_SI[scenario]) for scenario in range(scenarios)]

    def _order(self, scenario: int, pool_I: Array) -> Array:
        items = np.flatnonzero(pool_I)
        return items[np.lexsort((items, -self.count_I[items], -self.count_SI[scenario, items]))]

    def place_SI(self) -> Array:
        """Minus each item's place in its scenario's list (-1 for the first), -inf outside the pool: float32 (S, I). Fills up
        others' lists."""
        place_SI = np.full(self.count_SI.shape, -np.inf, dtype=np.float32)
        for scenario, order in enumerate(self.order_S):
            place_SI[scenario, order] = -1.0 - np.arange(len(order))
        return place_SI

    def recommend(self, requests: Requests, depth: int) -> Lists:
        """Scores are training events in the scenario."""
        item_RK = np.full((len(requests), depth), -1, dtype=np.int64)
        score_RK = np.full((len(requests), depth), -np.inf, dtype=np.float32)
        scenario_R = requests.scenario_R
        for scenario in np.unique(scenario_R):
            top = self.order_S[scenario][:depth]
            rows = scenario_R == scenario
            item_RK[rows, : len(top)] = top
            score_RK[rows, : len(top)] = self.count_SI[scenario, top]
        return Lists(item_RK, score_RK)
