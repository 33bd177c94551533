"""When people come, and how a visit goes on from scenario to scenario. Neither depends on anything hidden.

Visits come in spells: one in two follows the one before within a day or so. Within a visit the next scenario depends on the last one
and on what was done there: a click on a home floor leads into its feed, a cart opens the overlay, a purchase the add-on of the
checkout.

Legend: U users, V visits of all users, B users in a visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.calendar import DAY, Calendar
from oxyray.data.mall.people import Users, draw_rows
from oxyray.data.mall.utility import Asked
from oxyray.data.mall.world import SEARCH

REST = 7200
"""Seconds between the starts of two visits, at least; no visit lasts longer than half of it."""
LONGEST = 40
"""Requests of a visit, at most."""
_HOUR_SHARE = np.array([2, 1, 0.5, 0.3, 0.3, 0.6, 1.5, 3, 4, 4, 4.5, 5, 7, 6, 4.5, 4, 4, 4.5, 5, 6.5, 8.5, 9.5, 8, 5])
_ENTRY = np.array([[0.24, 0.44, 0.32], [0.34, 0.32, 0.34], [0.44, 0.2, 0.36]])
END = -1
# Where a visit goes on, by the scenario it is in: feed, home, search, end, more of the same.
# The feed is that of the last home floor.
_ONWARD = np.array(
    [
        [0.54, 0.18, 0.10, 0.18, 0.00],
        [0.54, 0.18, 0.10, 0.18, 0.00],
        [0.50, 0.15, 0.12, 0.23, 0.00],
        [0.50, 0.15, 0.12, 0.23, 0.00],
        [0.20, 0.00, 0.08, 0.32, 0.40],
        [0.20, 0.00, 0.08, 0.32, 0.40],
        [0.00, 0.14, 0.42, 0.44, 0.00],
    ]
)
_PLACES = np.array([[2, 3], [0, 1], [SEARCH, SEARCH], [END, END]])


@dataclass
class LastHome:
    """The home floor a visit was on last, and the item clicked there (-1: none in this visit)."""

    floor_B: np.ndarray
    item_B: np.ndarray


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
    asked: Asked, item_B: np.ndarray, action_B: np.ndarray, home: LastHome, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Next scenario (END: the visit is over) and its trigger, after each request's item and action."""
    path_B = (asked.scenario_B == 4) | (asked.scenario_B == 5)
    diverted_B = (action_B > 0) & (rng.random(len(asked)) < np.where(path_B, 0.35, 0.8))
    kind_B = draw_rows(_ONWARD[asked.scenario_B], rng)
    kind_B = np.where((kind_B == 0) & (home.item_B < 0), 1, kind_B)
    stays_B = (kind_B == 4) & ~diverted_B
    next_B = np.select([diverted_B, stays_B], [3 + action_B, asked.scenario_B], _PLACES[np.minimum(kind_B, 3), home.floor_B])
    feed_B = (next_B == 2) | (next_B == 3)
    return next_B, np.select([diverted_B, stays_B, feed_B], [item_B, asked.trigger_B, home.item_B], -1)
