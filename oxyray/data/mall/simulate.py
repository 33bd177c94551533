"""One block of users lives through the shop's days: visits, requests, choices, actions. A pure function of (world, block number).

All users of a block take their next request together, so a step costs a few array operations for everybody. Random numbers come from
streams named by (seed, purpose, block): the log is the same whoever computes which block, on however many workers.

Legend: B users with a request in this step, U users of the block, N requests of the block, X candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall import people, queries, visits
from oxyray.data.mall.calendar import DAY
from oxyray.data.mall.memory import Memory
from oxyray.data.mall.people import Users
from oxyray.data.mall.utility import (
    Asked,
    action_probability,
    candidates,
    item_utility,
    persona_utility,
    shelf_utility,
    softmax,
    type_utility,
)
from oxyray.data.mall.world import SEARCH, World

MEAN_EXTRA = 0.4
"""Pieces of a consumable bought beyond the first, on average."""

PERSONA_LASTS, TASTE_LASTS = 400.0, 250.0
"""Mean days until a life event, until a drift of taste (`Hidden`)."""


@dataclass
class Requests:
    """A block's requests in order of user and time, with the hidden state they were drawn from. `user_N` are rows of the block's users."""

    user_N: np.ndarray
    time_N: np.ndarray
    scenario_N: np.ndarray
    trigger_N: np.ndarray
    item_N: np.ndarray
    action_N: np.ndarray
    form_N: np.ndarray
    persona_N: np.ndarray
    taste_N: np.ndarray
    visit_N: np.ndarray
    quantity_N: np.ndarray
    probability_N: np.ndarray

    def __len__(self) -> int:
        return len(self.user_N)


def blocks(world: World) -> int:
    return -(-world.size.users // world.size.block)


def block_users(world: World, block: int) -> Users:
    number = min(world.size.block, world.size.users - block * world.size.block)
    rng = np.random.default_rng([world.seed, 2, block])
    return people.draw(world.people, number, world.calendar.first, world.size.days, world.size.visits, rng)


def live(world: World, block: int) -> tuple[Users, Requests]:
    """Users and requests of one block."""
    users = block_users(world, block)
    rng = np.random.default_rng([world.seed, 3, block])
    start_V, first_U1 = visits.schedule(users, world.calendar, rng)
    life = _Life(world, users, rng)
    steps = []
    visit_U = first_U1[:-1].copy()
    inside_U, count_U = np.zeros(len(users), bool), np.zeros(len(users), np.int64)
    while True:
        rows = np.flatnonzero(inside_U | (visit_U < first_U1[1:]))
        if not len(rows):
            break
        opening = rows[~inside_U[rows]]
        if len(opening):
            life.open_visit(opening, start_V[visit_U[opening]])
            visit_U[opening] += 1
            count_U[opening] = 0
        step = life.step(rows)
        step["visit"] = visit_U[rows] - first_U1[rows] - 1
        steps.append(step)
        count_U[rows] += 1
        inside_U[rows] = (life.scenario_U[rows] != visits.END) & (count_U[rows] < visits.LONGEST)
    merged = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    order_N = np.argsort(merged["user"], kind="stable")
    return users, Requests(**{f"{name}_N": value[order_N] for name, value in merged.items()})


class _Life:
    """State of a block's users while they live: memory, hidden state, place in the visit."""

    def __init__(self, world: World, users: Users, rng: np.random.Generator) -> None:
        self.world, self.users, self.rng = world, users, rng
        self.memory = Memory.empty(len(users), world.catalogue)
        self.persona_U, self.taste_U = users.persona_U.copy(), users.taste_U.copy()
        self.time_U, self.seen_U = users.joined_U.copy(), users.joined_U.copy()
        self.scenario_U = np.zeros(len(users), np.int64)
        self.trigger_U = np.full(len(users), -1)
        self.home_U, self.home_item_U = np.zeros(len(users), np.int64), np.full(len(users), -1)

    def open_visit(self, rows: np.ndarray, start: np.ndarray) -> None:
        """Between visits the hidden state may change; then a visit begins."""
        days = (start - self.seen_U[rows]) / DAY
        for state, lasts, table in (
            (self.persona_U, PERSONA_LASTS, self.world.people.persona_next_ZZ),
            (self.taste_U, TASTE_LASTS, self.world.people.taste_next_KK),
        ):
            moved = rows[self.rng.random(len(rows)) < 1 - np.exp(-days / lasts)]
            if len(moved):
                state[moved] = people.draw_rows(table[state[moved]], self.rng)
        self.time_U[rows] = self.seen_U[rows] = start
        self.scenario_U[rows] = visits.entry(self.users.tier_U[rows], self.rng)
        self.trigger_U[rows] = self.home_item_U[rows] = -1
        search = self.scenario_U[rows] == SEARCH
        self.home_U[rows] = np.where(search, (self.rng.random(len(rows)) < 0.5).astype(int), self.scenario_U[rows])

    def step(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """One request of each given user: choose, act, remember, go on."""
        asked = Asked(rows, self.time_U[rows], self.scenario_U[rows], self.trigger_U[rows])
        memory = self.memory.at(rows, asked.time_B)
        persona_B, taste_B = self.persona_U[rows], self.taste_U[rows]
        item_B, probability_B = choose(self.world, self.users, memory, asked, persona_B, taste_B, self.rng)
        searched = np.flatnonzero(asked.scenario_B == SEARCH)
        form_B = np.full(len(rows), -1, np.int8)
        form_B[searched] = queries.draw_forms(self.world.catalogue, item_B[searched], self.rng)
        liking_B1 = self.world.taste_KI[taste_B, item_B][:, None]
        cart_B1, buy_B1 = action_probability(self.world, self.users, memory, asked, item_B[:, None], liking_B1)
        action_B = (self.rng.random(len(rows)) < cart_B1[:, 0]).astype(np.int8)
        action_B += (action_B == 1) & (self.rng.random(len(rows)) < buy_B1[:, 0])
        path_B = (asked.scenario_B == 4) | (asked.scenario_B == 5)
        memory.add(self.world.catalogue, item_B, action_B, path_B)
        self.memory.put(rows, memory)
        self._go_on(rows, asked, item_B, action_B)
        return {
            "user": rows,
            "time": asked.time_B,
            "scenario": asked.scenario_B.astype(np.int8),
            "trigger": asked.trigger_B.astype(np.int32),
            "item": item_B.astype(np.int32),
            "action": action_B,
            "form": form_B,
            "persona": persona_B.astype(np.int8),
            "taste": taste_B.astype(np.int8),
            "quantity": quantity(self.world, item_B, action_B, self.rng),
            "probability": probability_B.astype(np.float32),
        }

    def _go_on(self, rows: np.ndarray, asked: Asked, item_B: np.ndarray, action_B: np.ndarray) -> None:
        at_home = asked.scenario_B <= 1
        self.home_item_U[rows[at_home]], self.home_U[rows[at_home]] = item_B[at_home], asked.scenario_B[at_home]
        home = visits.LastHome(self.home_U[rows], self.home_item_U[rows])
        next_B, trigger_B = visits.onward(asked, item_B, action_B, home, self.rng)
        self.scenario_U[rows], self.trigger_U[rows] = next_B, trigger_B
        self.time_U[rows] += 5 + np.minimum(self.rng.exponential(40, len(rows)), 80).astype(np.int64)


def choose(
    world: World, users: Users, memory: Memory, asked: Asked, persona_B: np.ndarray, taste_B: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an item for each request; returns items and the probability each had (before a query told of it)."""
    type_BF = softmax(type_utility(world, users, memory, asked) + persona_utility(world, asked, persona_B))
    type_B, probability_B = _draw(type_BF, rng)
    shelf_BX, real_BX = candidates(world.catalogue.shelf_of_type_F1, type_B)
    utility_BX = (
        shelf_utility(world, users, memory, asked, shelf_BX) + world.shelf_CKS[asked.scenario_B[:, None], taste_B[:, None], shelf_BX]
    )
    place_B, share_B = _draw(softmax(np.where(real_BX, utility_BX, -np.inf)), rng)
    shelf_B = shelf_BX[np.arange(len(asked)), place_B]
    item_BX, real_BX = candidates(world.catalogue.item_of_shelf_S1, shelf_B)
    utility_BX = item_utility(world, users, memory, asked, item_BX) + world.taste_KI[taste_B[:, None], item_BX]
    place_B, within_B = _draw(softmax(np.where(real_BX, utility_BX, -np.inf)), rng)
    return item_BX[np.arange(len(asked)), place_B], probability_B * share_B * within_B


def quantity(world: World, item_B: np.ndarray, action_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pieces bought: one, of consumables sometimes more (`MEAN_EXTRA` on average); 0 where nothing was bought."""
    more_B = rng.poisson(MEAN_EXTRA, len(item_B)) * (world.cycle_F[world.catalogue.type_I[item_B]] > 0)
    return np.where(action_B == 2, 1 + more_B, 0).astype(np.int16)


def _draw(share_BX: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    place_B = people.draw_rows(share_BX, rng)
    return place_B, share_BX[np.arange(len(share_BX)), place_B]
