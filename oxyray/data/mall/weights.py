"""How much each cause counts in the utilities: the shop's constants of behaviour. Documented, with what they lead to, in `docs/mall.md`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Arrays have an entry per scenario (`world.SCENARIOS`). Log-weights, but where a comment says otherwise."""

    # product type
    persona: np.ndarray
    context: np.ndarray
    slow: np.ndarray
    fast: np.ndarray
    complement: np.ndarray
    # shelf and item
    brand: np.ndarray
    same_brand: np.ndarray
    like_trigger: np.ndarray
    again: np.ndarray
    tier_shift: np.ndarray  # steps of the spending tier
    taste_item: float
    taste_brand: float
    inclusive: float
    quality: float
    tier: float
    price: float
    fits: float
    # log-odds of cart after click, of purchase after cart
    cart: np.ndarray
    purchase: np.ndarray


def _each(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# fmt: off
WEIGHTS = Weights(
    #                  subsidy_home, budget_home, subsidy_feed, budget_feed, cart_overlay, checkout_addon, search
    persona=_each(     0.9,          0.9,         0.5,          0.5,         0.3,          0.4,            0.9),
    context=_each(     0.9,          0.9,         0.5,          0.5,         0.3,          0.4,            1.0),
    slow=_each(        0.85,         0.85,        0.4,          0.4,         0.2,          0.3,            0.75),
    fast=_each(        1.0,          1.0,         0.4,          0.4,         0.0,          0.0,            1.0),
    complement=_each(  0.7,          0.7,         0.4,          0.4,         0.2,          0.2,            0.9),
    brand=_each(       0.5,          0.5,         0.5,          0.5,         0.4,          0.4,            0.5),
    same_brand=_each(  0.0,          0.0,         0.6,          0.6,         0.4,          0.3,            0.0),
    like_trigger=_each(0.0,          0.0,         0.9,          0.9,         0.6,          0.3,            0.0),
    again=_each(       -1.2,         -1.2,        -2.2,         -2.2,        -2.5,         -2.5,           0.3),
    tier_shift=_each(  0.5,          -0.6,        0.5,          -0.6,        0.0,          -0.3,           0.0),
    cart=_each(        -2.2,         -2.0,        -2.0,         -1.8,        -1.3,         -0.9,           -1.5),
    purchase=_each(    -1.1,         -0.9,        -1.0,         -0.8,        -0.5,         0.2,            -0.6),
    taste_item=2.0, taste_brand=1.0, inclusive=0.8, quality=0.7, tier=1.2, price=7.0, fits=5.0,
)
# fmt: on
