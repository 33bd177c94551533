"""What can be known of a user's hidden persona and taste from the log alone: exact Bayesian filtering, replayed over past requests.

Persona and taste are independent given the log, because a product type is chosen by persona alone, shelf, item and action by taste
alone, and all else that a choice depends on is visible. Each is one of a few and changes only between visits, so the forward algorithm
of hidden Markov models gives the exact posterior. Choosing by it is the best that any model can do that reads the whole log and knows
how the shop works.

Legend: B requests of a step, U users of the block, Z personas, K tastes, F product types, X candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.calendar import DAY
from oxyray.data.mall.memory import Memory
from oxyray.data.mall.people import Users
from oxyray.data.mall.simulate import PERSONA_LASTS, TASTE_LASTS, Requests
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
from oxyray.data.mall.world import World


@dataclass
class Situation:
    """Requests just before their choice: what was asked, what is remembered, and the probabilities of persona and taste (rows sum to 1).

    `place_B` are places in the block's `Requests`; `form_B` and `wanted_B` give the query of a search (form -1: none).
    """

    asked: Asked
    memory: Memory
    persona_BZ: np.ndarray
    taste_BK: np.ndarray
    place_B: np.ndarray
    form_B: np.ndarray
    wanted_B: np.ndarray

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, rows: np.ndarray) -> Situation:
        memory = Memory(**{name: value[rows] for name, value in vars(self.memory).items()})
        rest = {name: getattr(self, name)[rows] for name in ("persona_BZ", "taste_BK", "place_B", "form_B", "wanted_B")}
        return Situation(self.asked[rows], memory, **rest)

    @staticmethod
    def join(parts: list[Situation]) -> Situation:
        def stack(values: list[object]) -> dict[str, np.ndarray]:
            return {name: np.concatenate([vars(value)[name] for value in values]) for name in vars(values[0])}

        rest = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("persona_BZ", "taste_BK", "place_B", "form_B", "wanted_B")
        }
        return Situation(Asked(**stack([part.asked for part in parts])), Memory(**stack([part.memory for part in parts])), **rest)


def replay(world: World, users: Users, requests: Requests, wanted: np.ndarray, hidden: bool) -> Iterator[Situation]:
    """Live a block's requests again and stop at the `wanted` ones (places in `requests`, which must be in order of user and time).

    `hidden` True: persona and taste are known (one-hot rows); else they are inferred from what came before.
    """
    first_U1 = np.searchsorted(requests.user_N, np.arange(len(users) + 1))
    asked_U = np.zeros(len(users), np.int64)
    if len(wanted):
        np.maximum.at(asked_U, requests.user_N[wanted], wanted - first_U1[requests.user_N[wanted]] + 1)
    is_wanted_N = np.zeros(len(requests), bool)
    is_wanted_N[wanted] = True
    memory_U = Memory.empty(len(users), world.catalogue)
    belief = Belief(world, users)
    for number in range(int(asked_U.max(initial=0))):
        rows = np.flatnonzero(asked_U > number)
        place_B = first_U1[rows] + number
        asked = Asked(
            rows, requests.time_N[place_B], requests.scenario_N[place_B].astype(np.int64), requests.trigger_N[place_B].astype(np.int64)
        )
        memory = memory_U.at(rows, asked.time_B)
        if not hidden:
            belief.arrive(rows, requests, place_B)
        stop = np.flatnonzero(is_wanted_N[place_B])
        if len(stop):
            persona_BZ, taste_BK = belief.known(requests, place_B) if hidden else (belief.persona_UZ[rows], belief.taste_UK[rows])
            yield Situation(asked, memory, persona_BZ, taste_BK, place_B, requests.form_N[place_B], requests.item_N[place_B])[stop]
        if not hidden:
            belief.learn(asked, memory, requests.item_N[place_B], requests.action_N[place_B])
        memory.add(world.catalogue, requests.item_N[place_B], requests.action_N[place_B], (asked.scenario_B == 4) | (asked.scenario_B == 5))
        memory_U.put(rows, memory)


class Belief:
    """Posterior of persona and taste of each user of a block."""

    def __init__(self, world: World, users: Users) -> None:
        self.world, self.users = world, users
        self.persona_UZ = world.people.persona_share_GEZ[users.gender_U, users.age_U].copy()
        self.taste_UK = world.people.taste_share_GEK[users.gender_U, users.age_U].copy()
        self.visit_U = np.full(len(users), -1)
        self.seen_U = users.joined_U.copy()

    def known(self, requests: Requests, place_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The truth in the form of a belief."""
        people = self.world.people
        return np.eye(len(people.persona_names))[requests.persona_N[place_B]], np.eye(len(people.taste_names))[requests.taste_N[place_B]]

    def arrive(self, rows: np.ndarray, requests: Requests, place_B: np.ndarray) -> None:
        """Where a visit begins, the hidden state may have changed since the last one began."""
        new = requests.visit_N[place_B] != self.visit_U[rows]
        rows, place_B = rows[new], place_B[new]
        days_B1 = ((requests.time_N[place_B] - self.seen_U[rows]) / DAY)[:, None]
        for state, lasts, table in (
            (self.persona_UZ, PERSONA_LASTS, self.world.people.persona_next_ZZ),
            (self.taste_UK, TASTE_LASTS, self.world.people.taste_next_KK),
        ):
            stays_B1 = np.exp(-days_B1 / lasts)
            state[rows] = stays_B1 * state[rows] + (1 - stays_B1) * (state[rows] @ table)
        self.visit_U[rows], self.seen_U[rows] = requests.visit_N[place_B], requests.time_N[place_B]

    def learn(self, asked: Asked, memory: Memory, item_B: np.ndarray, action_B: np.ndarray) -> None:
        """Bayes' rule for one chosen item and action per request."""
        world, shop, every = self.world, self.world.catalogue, np.arange(len(asked))
        type_B, shelf_B, rows = shop.type_I[item_B], shop.shelf_I[item_B], asked.user_B
        self.persona_UZ[rows] *= type_share(world, self.users, memory, asked)[every, :, type_B]
        scenario_B1, tastes_K = asked.scenario_B[:, None], np.arange(len(world.taste_KI))
        shelf_BX, real_BX = candidates(shop.shelf_of_type_F1, type_B)
        free_BX = np.where(real_BX, shelf_utility(world, self.users, memory, asked, shelf_BX), -np.inf)
        share_BKX = softmax(free_BX[:, None] + world.shelf_CKS[scenario_B1[:, :, None], tastes_K[:, None], shelf_BX[:, None]])
        likelihood_BK = share_BKX[every, :, shelf_B - shop.shelf_of_type_F1[type_B]]
        item_BX, real_BX = candidates(shop.item_of_shelf_S1, shelf_B)
        free_BX = np.where(real_BX, item_utility(world, self.users, memory, asked, item_BX), -np.inf)
        share_BKX = softmax(free_BX[:, None] + world.taste_KI[tastes_K[:, None], item_BX[:, None]])
        likelihood_BK *= share_BKX[every, :, item_B - shop.item_of_shelf_S1[shelf_B]]
        cart_BK, buy_BK = action_probability(world, self.users, memory, asked, item_B[:, None], world.taste_KI[:, item_B].T)
        likelihood_BK *= np.select(
            [action_B[:, None] == 0, action_B[:, None] == 1], [1 - cart_BK, cart_BK * (1 - buy_BK)], cart_BK * buy_BK
        )
        self.taste_UK[rows] *= likelihood_BK
        for state in (self.persona_UZ, self.taste_UK):
            state[rows] /= state[rows].sum(1, keepdims=True)


def type_share(world: World, users: Users, memory: Memory, asked: Asked) -> np.ndarray:
    """(B, Z, F): P(product type | request, persona)."""
    free_BF = type_utility(world, users, memory, asked)
    personas = range(len(world.people.persona_names))
    return np.stack([softmax(free_BF + persona_utility(world, asked, np.array([persona]))) for persona in personas], axis=1)
