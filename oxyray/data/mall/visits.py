"""When people come, and how a visit goes on from scenario to scenario. Neither depends on anything hidden.

Visits come in spells: one in two follows the one before within a day or so. Within a visit the next scenario depends on the last one
and on what was done there: a click on a home floor leads into its feed, a cart opens the overlay, a purchase the add-on of the
checkout.

Legend: U users, V visits of all users, B users in a visit.
"""

from __future__ import annotations

import numpy as np

from oxyray.data.mall.calendar import DAY, Calendar
from oxyray.data.mall.people import Users, draw_rows
from oxyray.data.mall.world import SEARCH

REST = 7200
"""Seconds between the starts of two visits, at least; no visit lasts longer than half of it."""
LONGEST = 40
"""Requests of a visit, at most."""
_HOUR_SHARE = np.array([2, 1, 0.5, 0.3, 0.3, 0.6, 1.5, 3, 4, 4, 4.5, 5, 7, 6, 4.5, 4, 4, 4.5, 5, 6.5, 8.5, 9.5, 8, 5])
_ENTRY = np.array([[0.24, 0.44, 0.32], [0.34, 0.32, 0.34], [0.44, 0.2, 0.36]])
END = -1
# Where a visit goes on, by the scenario it is in: feed, home, search, end. The feed is that of the last home floor.
_ONWARD = np.array(
    [
        [0.56, 0.16, 0.10, 0.18],
        [0.56, 0.16, 0.10, 0.18],
        [0.58, 0.12, 0.10, 0.20],
        [0.58, 0.12, 0.10, 0.20],
        [0.30, 0.00, 0.12, 0.58],
        [0.30, 0.00, 0.12, 0.58],
        [0.00, 0.14, 0.42, 0.44],
    ]
)
_PLACES = np.array([[2, 3], [0, 1], [SEARCH, SEARCH], [END, END]])


def schedule(users: Users, days: Calendar, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Start times of visits (V,) in user order, rising by at least REST within a user, and each user's first place (U + 1,)."""
    user_V = np.repeat(np.arange(len(users)), users.visits_U)
    first_V = np.concatenate([[True], user_V[1:] != user_V[:-1]])
    life_V = days.last - 2 * REST - users.joined_U[user_V]
    spell_V = first_V | (rng.random(len(user_V)) < 0.5)
    start_V = np.where(first_V, 0, rng.random(len(user_V)) * life_V)
    later_V = 3600 + rng.exponential(1.1 * DAY, len(user_V))
    since_V = np.cumsum(np.where(spell_V, 0, later_V))
    spell_of_V = np.maximum.accumulate(np.where(spell_V, np.arange(len(user_V)), 0))
    time_V = users.joined_U[user_V] + start_V[spell_of_V] + since_V - since_V[spell_of_V]
    hour_V = draw_rows(np.broadcast_to(_HOUR_SHARE, (len(user_V), 24)), rng)
    day_V = (time_V - days.first) // DAY
    snapped_V = days.first + day_V * DAY + hour_V * 3600 + rng.random(len(user_V)) * 3600
    time_V = np.maximum(np.where(first_V, time_V, snapped_V), users.joined_U[user_V]).astype(np.int64)
    time_V = time_V[np.lexsort((time_V, user_V))]
    place_V = np.arange(len(user_V)) - np.maximum.accumulate(np.where(first_V, np.arange(len(user_V)), 0))
    apart_V = time_V - place_V * REST
    big = np.int64(1) << 40
    apart_V = np.maximum.accumulate(apart_V + user_V * big) - user_V * big
    time_V = apart_V + place_V * REST
    kept_V = time_V < days.last - REST
    return time_V[kept_V], np.concatenate([[0], np.cumsum(np.bincount(user_V[kept_V], minlength=len(users)))])


def entry(tier_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scenario that a visit opens with."""
    return np.array([0, 1, SEARCH])[draw_rows(_ENTRY[tier_B], rng)]


def onward(
    scenario_B: np.ndarray, action_B: np.ndarray, item_B: np.ndarray, home_item_B: np.ndarray, home_B: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Next scenario (END: the visit is over) and its trigger. `home_item_B` is what was clicked last on a home floor (-1 none), `home_B`
    that floor.
    """
    path_B = (scenario_B == 4) | (scenario_B == 5)
    diverted_B = (action_B > 0) & (rng.random(len(scenario_B)) < np.where(path_B, 0.3, 0.6))
    kind_B = draw_rows(_ONWARD[scenario_B], rng)
    kind_B = np.where((kind_B == 0) & (home_item_B < 0), 1, kind_B)
    next_B = np.where(diverted_B, 3 + action_B, _PLACES[kind_B, home_B])
    trigger_B = np.where(diverted_B, item_B, np.where((next_B == 2) | (next_B == 3), home_item_B, -1))
    return next_B, trigger_B
