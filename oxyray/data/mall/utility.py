"""The utility of a choice, and the choice probabilities that follow: product type, then shelf, then item, each a softmax.

    P(item | request) = P(type | request, persona) · P(shelf | type, request, taste) · P(item | shelf, request, taste)

The first factor depends on the hidden persona alone, the others on the hidden taste alone; everything else is visible: profile, time,
city and its weather, scenario, trigger, and the user's own past (`memory.py`). A search names its wish: given the query, only matching
items remain. After the click, cart and purchase are drawn from `action_probability`.

Every function works on candidates given as indices, so that the simulator (few candidates) and the optimum (all items) share it.
Legend: B requests, F product types, X candidates, Z personas, K tastes, R recent events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.calendar import DAY
from oxyray.data.mall.memory import Memory
from oxyray.data.mall.people import Users
from oxyray.data.mall.world import World

_AGAIN_DAYS = 1.5


@dataclass
class Asked:
    """Requests: who, when, where. `user_B` are rows of the block's users, `trigger_B` item numbers or -1."""

    user_B: np.ndarray
    time_B: np.ndarray
    scenario_B: np.ndarray
    trigger_B: np.ndarray

    def __len__(self) -> int:
        return len(self.user_B)

    def __getitem__(self, rows: np.ndarray) -> Asked:
        return Asked(self.user_B[rows], self.time_B[rows], self.scenario_B[rows], self.trigger_B[rows])


def softmax(utility: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf is impossible. Float64, of float32 exponentials."""
    value = np.exp(utility - utility.max(-1, keepdims=True)).astype(np.float64)
    return value / value.sum(-1, keepdims=True)


def candidates(start_X1: np.ndarray, of_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges [start_X1[x], start_X1[x + 1]) as padded indices (B, X) and a mask of the real ones."""
    first_B, length_B = start_X1[of_B], start_X1[of_B + 1] - start_X1[of_B]
    step_X = np.arange(length_B.max())
    mask_BX = step_X < length_B[:, None]
    return np.where(mask_BX, first_B[:, None] + step_X, first_B[:, None]), mask_BX


def type_utility(world: World, users: Users, memory: Memory, asked: Asked) -> np.ndarray:
    """float32 (B, F): utility of each product type but for the persona's part, `persona_utility`."""
    weights, days = world.weights, world.calendar
    user_B, scenario_B = asked.user_B, asked.scenario_B
    day_B, part_B = days.day(asked.time_B), days.part(asked.time_B)

    def by(weight_C: np.ndarray) -> np.ndarray:
        return weight_C[scenario_B][:, None]

    utility_BF = world.base_CF[scenario_B] + world.profile_GEF[users.gender_U[user_B], users.age_U[user_B]]
    utility_BF += by(weights.context) * (world.context_DYF[day_B, users.city_U[user_B]] + world.part_PF[part_B])
    utility_BF += by(weights.slow) * np.log(1 + 2 * memory.slow_BF)
    utility_BF += by(weights.fast) * np.log(1 + 3 * memory.fast_BF)
    utility_BF += by(weights.complement) * np.log(1 + 6 * memory.bought_BF @ world.complement_FF)
    _add_possessions(world, memory, asked, utility_BF)
    has_B = asked.trigger_B >= 0
    trigger_type_B = world.catalogue.type_I[asked.trigger_B]
    return utility_BF + np.where(has_B[:, None], world.trigger_CFF[scenario_B, trigger_type_B], 0)


def _add_possessions(world: World, memory: Memory, asked: Asked, utility_BF: np.ndarray) -> None:
    """What was bought before: a durable thing is not wanted again for long, a consumable not at once but when it runs out."""
    row_N, type_N = np.nonzero(memory.bought_item_BF >= 0)
    days_N = (asked.time_B[row_N] - memory.bought_time_BF[row_N, type_N]) / DAY
    lasts_N, cycle_N = world.durable_F[type_N], world.cycle_F[type_N]
    turn_N = days_N / np.maximum(cycle_N, 1)
    worn_N = -4 * np.exp(-days_N / np.maximum(lasts_N, 1))
    used_N = 2.2 * np.exp(-(((turn_N - 1) / 0.3) ** 2)) - 2.5 * np.exp(-3 * turn_N)
    utility_BF[row_N, type_N] += np.where(lasts_N > 0, worn_N, used_N)


def persona_utility(world: World, asked: Asked, persona_B: np.ndarray) -> np.ndarray:
    """float32 (B, F): what the persona adds. `persona_B` may hold one persona for all."""
    weight_B = world.weights.persona[asked.scenario_B]
    return weight_B[:, None] * world.people.persona_type_ZF[persona_B]


def shelf_utility(world: World, users: Users, memory: Memory, asked: Asked, shelf_BX: np.ndarray) -> np.ndarray:
    """float32 (B, X): utility of shelves but for taste, `world.shelf_CKS`: brand tier, brands known, the trigger's brand."""
    weights, shop = world.weights, world.catalogue
    brand_BX = shop.brand_S[shelf_BX]
    wish_B = np.clip(users.tier_U[asked.user_B] + weights.tier_shift[asked.scenario_B], 0, 2)
    utility_BX = -weights.tier * (shop.brand_tier_M[brand_BX] - wish_B[:, None]) ** 2
    known_BX = memory.brand_BM[np.arange(len(asked))[:, None], brand_BX]
    utility_BX = utility_BX + weights.brand[asked.scenario_B][:, None] * np.log1p(known_BX)
    same_BX = (brand_BX == shop.brand_I[asked.trigger_B][:, None]) & (asked.trigger_B >= 0)[:, None]
    utility_BX = utility_BX + weights.same_brand[asked.scenario_B][:, None] * same_BX
    family_BX = shop.fits_F[shop.type_S[shelf_BX]]
    model_BX = _model(world, memory, asked, family_BX)
    share_BX = world.fit_share_SX[shelf_BX, model_BX]
    fitting_BX = np.log(share_BX * np.exp(weights.fits) + (1 - share_BX) * np.exp(-weights.fits / 2))
    utility_BX = utility_BX + np.where((family_BX >= 0) & (model_BX >= 0), fitting_BX, 0)
    # The trigger itself is not shown again: its shelf counts for what else is on it.
    left_B = np.log(np.maximum(1 - world.share_CI[asked.scenario_B, asked.trigger_B], 1e-4))
    own_BX = (shelf_BX == shop.shelf_I[asked.trigger_B][:, None]) & (asked.trigger_B >= 0)[:, None]
    return (utility_BX + weights.inclusive * left_B[:, None] * own_BX).astype(np.float32)


def item_utility(world: World, users: Users, memory: Memory, asked: Asked, item_BX: np.ndarray) -> np.ndarray:
    """float32 (B, X): utility of items but for taste, `world.taste_KI`; -inf outside the scenario's pool.

    Each row of `item_BX` is a range of item numbers, as `candidates` gives it; one row alone stands for all requests.
    """
    weights, shop = world.weights, world.catalogue
    scenario_B1, trigger_B1 = asked.scenario_B[:, None], asked.trigger_B[:, None]
    type_BX, fit_BX = shop.type_I[item_BX], shop.fit_I[item_BX]
    utility_BX = (
        weights.quality * shop.quality_I[item_BX]
        - weights.price * (shop.price_rank_I[item_BX] - price_wish(world, users, asked)[:, None]) ** 2
    )
    utility_BX = utility_BX + weights.again[scenario_B1] * _seen(memory, asked, item_BX)
    utility_BX = utility_BX - 8.0 * (item_BX == trigger_B1)
    rows = np.arange(len(asked))[:, None]
    bought_BX = memory.bought_item_BF[rows, type_BX] == item_BX
    utility_BX = utility_BX + bought_BX * np.where(world.cycle_F[type_BX] > 0, 2.0, -2.0)
    fits_BX = shop.fits_F[type_BX]
    model_BX = _model(world, memory, asked, fits_BX)
    fitting_BX = np.where(fit_BX == model_BX, weights.fits, -weights.fits / 2)
    utility_BX = utility_BX + np.where((fits_BX >= 0) & (model_BX >= 0), fitting_BX, 0)
    style_B = shop.style_IA[asked.trigger_B] * weights.like_trigger[asked.scenario_B][:, None] * (asked.trigger_B >= 0)[:, None]
    if len(item_BX) == 1:
        utility_BX = utility_BX + style_B @ shop.style_IA[item_BX[0]].T
    else:
        utility_BX = utility_BX + np.einsum("ba,bxa->bx", style_B, shop.style_IA[item_BX])
    return np.where(world.pool_CI[scenario_B1, item_BX], utility_BX, -np.inf).astype(np.float32)


def _seen(memory: Memory, asked: Asked, item_BX: np.ndarray) -> np.ndarray:
    """(B, X) How often each item was chosen in the last `_AGAIN_DAYS` days."""
    width = item_BX.shape[1]
    offset_BR = memory.recent_BR - item_BX[:, :1]
    fresh_BR = (asked.time_B[:, None] - memory.recent_time_BR < _AGAIN_DAYS * DAY) & (offset_BR >= 0) & (offset_BR < width)
    row_N, place_N = np.nonzero(fresh_BR)
    offset_N = offset_BR[row_N, place_N]
    real_N = item_BX[row_N % len(item_BX), offset_N] == memory.recent_BR[row_N, place_N]
    seen_BX = np.zeros((len(asked), width), np.float32)
    np.add.at(seen_BX, (row_N[real_N], offset_N[real_N]), 1)
    return seen_BX


def _model(world: World, memory: Memory, asked: Asked, family_BX: np.ndarray) -> np.ndarray:
    """(B, X) The model of each family that an accessory should fit: the trigger's, else the last one bought or put in the cart; -1 none."""
    shop = world.catalogue
    fit_B1 = np.where(asked.trigger_B >= 0, shop.fit_I[asked.trigger_B], -1)[:, None]
    family_X = np.append(shop.fit_family_X, -2)
    return np.where(family_X[fit_B1] == family_BX, fit_B1, memory.owned_BH[np.arange(len(asked))[:, None], family_BX])


def price_wish(world: World, users: Users, asked: Asked) -> np.ndarray:
    """(B,) Rank of price within a product type, 0..1, that suits the user in the scenario best."""
    return np.clip(0.25 + 0.25 * (users.tier_U[asked.user_B] + world.weights.tier_shift[asked.scenario_B]), 0.05, 0.95)


def action_probability(
    world: World, users: Users, memory: Memory, asked: Asked, item_BX: np.ndarray, taste_BX: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(B, X) P(cart or purchase | click) and P(purchase | cart); `taste_BX` is the item's utility of taste (of `world.taste_KI`)."""
    weights, shop = world.weights, world.catalogue
    off_BX = (shop.price_rank_I[item_BX] - price_wish(world, users, asked)[:, None]) ** 2
    seen_BX = np.log1p(memory.fast_BF[np.arange(len(asked))[:, None], shop.type_I[item_BX]])
    dear_BX = np.log(shop.price_I[item_BX] / 30)
    cart = weights.cart[asked.scenario_B][:, None] + 0.35 * taste_BX - 2.5 * off_BX + 0.5 * seen_BX - 0.2 * dear_BX
    purchase = weights.purchase[asked.scenario_B][:, None] + 0.25 * taste_BX - 2.0 * off_BX - 0.25 * dear_BX
    return 1 / (1 + np.exp(-cart.astype(np.float64))), 1 / (1 + np.exp(-purchase.astype(np.float64)))
