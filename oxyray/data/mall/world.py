"""The world of one shop: everything that does not depend on a person's past, as tables, rebuilt from (size, seed) alone.

`World.make(config)` is deterministic: whoever has the configuration that stands in `truth/shop.json` can compute every probability
again.

Legend: F product types, S shelves, I items, C scenarios, Z personas, K tastes, D days, Y cities, P parts of the day, G genders, E age
groups.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

import numpy as np

from oxyray.config.data import MALL_ITEMS, MallConfig
from oxyray.data.mall import calendar, catalogue, goods, people
from oxyray.data.mall.calendar import Calendar
from oxyray.data.mall.catalogue import Catalogue
from oxyray.data.mall.people import AGES, GENDERS, People
from oxyray.data.mall.weights import WEIGHTS, Weights
from oxyray.errors import ConfigError

SCENARIOS = ("subsidy_home", "budget_home", "subsidy_feed", "budget_feed", "cart_overlay", "checkout_addon", "search")
HOMES, FEEDS, PATHS, SEARCH = (0, 1), (2, 3), (4, 5), 6
SUBSIDY_DEPARTMENTS = ("Electronics", "Home appliances", "Beauty & care", "Shoes & bags")
"""What people go to the subsidy channel for; to the budget channel they go for the rest."""


@dataclass(frozen=True)
class Size:
    """`block` users are simulated together, one user in `slates_of_one_in` has pages kept: part of the shop, not of how it is computed."""

    items: int
    users: int
    days: int
    visits: float
    block: int
    slates_of_one_in: int = 1
    departments: tuple[str, ...] | None = None


SIZES = {
    "tiny": Size(MALL_ITEMS["tiny"], 180, 120, 8, 64, 1, goods.TINY_DEPARTMENTS),
    "small": Size(MALL_ITEMS["small"], 3_000, 365, 11, 4096),
    "medium": Size(MALL_ITEMS["medium"], 20_000, 365, 11, 2048),
    "large": Size(MALL_ITEMS["large"], 200_000, 540, 11, 4096, 4),
    "million": Size(MALL_ITEMS["million"], 1_000_000, 730, 11, 4096, 20),
}


@dataclass(frozen=True)
class World:
    seed: int
    size: Size
    weights: Weights
    catalogue: Catalogue
    calendar: Calendar
    people: People
    pool_CI: np.ndarray
    base_CF: np.ndarray
    profile_GEF: np.ndarray
    context_DYF: np.ndarray
    part_PF: np.ndarray
    trigger_CFF: np.ndarray
    complement_FF: np.ndarray
    durable_F: np.ndarray
    cycle_F: np.ndarray
    shelf_CKS: np.ndarray
    share_CI: np.ndarray
    fit_share_SX: np.ndarray
    taste_KI: np.ndarray

    def version(self) -> str:
        """Hash of all tables: two worlds with one version draw the same shop."""
        digest = hashlib.sha256()
        for part in (self, self.weights, self.catalogue, self.calendar, self.people):
            values = [getattr(part, spec.name) for spec in fields(part)]
            for value in values:
                if isinstance(value, np.ndarray):
                    digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def make(config: MallConfig) -> World:
        """Raises ConfigError where the size is too small for the range of goods."""
        plan = SIZES[config.size]
        size = replace(plan, items=config.items or plan.items, users=config.users or plan.users, days=config.days or plan.days)
        range_ = goods.load(size.departments)
        if size.items < 4 * len(range_):
            raise ConfigError(
                f"data.mall.items: this shop has {len(range_)} product types and needs at least {4 * len(range_)} items, got {size.items}"
            )
        if not 14 <= size.days <= 900:
            raise ConfigError(f"data.mall.days: must lie in 14..900, the days that the calendar of feasts covers, got {size.days}")
        weights = WEIGHTS
        rng = np.random.default_rng([config.seed, 0])
        shop = catalogue.build(range_, size.items, rng)
        days = calendar.build(size.days, np.random.default_rng([config.seed, 1]))
        hidden = people.build(range_)
        pool_CI = pools(shop)
        taste_KI = (weights.taste_item * hidden.taste_KA @ shop.style_IA.T).astype(np.float32)
        return World(
            seed=config.seed,
            size=size,
            weights=weights,
            catalogue=shop,
            calendar=days,
            people=hidden,
            pool_CI=pool_CI,
            base_CF=_base(shop, pool_CI, weights, rng),
            profile_GEF=_profile(range_),
            context_DYF=_context(range_, days),
            part_PF=range_.tag(*calendar.PARTS).T.copy(),
            trigger_CFF=_triggers(range_),
            complement_FF=range_.complement_FF,
            durable_F=range_.numbers("durable_days"),
            cycle_F=range_.numbers("cycle_days"),
            shelf_CKS=_shelves(shop, hidden, pool_CI, taste_KI, weights),
            share_CI=_shares(shop, pool_CI, weights),
            fit_share_SX=_fit_shares(shop, weights),
            taste_KI=taste_KI,
        )


def pools(shop: Catalogue) -> np.ndarray:
    """bool (C, I): what each scenario may show. Subsidy: brand goods well below list price; budget: the cheap part of each product type;
    checkout: small things; overlay and search: everything."""
    tier_I = shop.brand_tier_M[shop.brand_I]
    subsidy_I = (tier_I >= 1) & (shop.price_I < 0.9 * shop.list_price_I)
    budget_I = shop.price_rank_I < 0.45
    small_I = (shop.price_I < 60) & (shop.price_rank_I < 0.8)
    every_I = np.ones(shop.items, bool)
    return np.stack([subsidy_I, budget_I, subsidy_I, budget_I, every_I, small_I, every_I])


def segment_logsumexp(value_XI: np.ndarray, start_S1: np.ndarray) -> np.ndarray:
    """(X, S): log of the sum of exp over each range of items; -inf where all are -inf. No range may be empty."""
    top_XS = np.maximum.reduceat(value_XI, start_S1[:-1], axis=1)
    finite_XS = np.where(np.isfinite(top_XS), top_XS, 0)
    lengths = np.diff(start_S1)
    with np.errstate(divide="ignore"):
        return finite_XS + np.log(np.add.reduceat(np.exp(value_XI - np.repeat(finite_XS, lengths, axis=1)), start_S1[:-1], axis=1))


def _base(shop: Catalogue, pool_CI: np.ndarray, weights: Weights, rng: np.random.Generator) -> np.ndarray:
    """(C, F): how common a product type is, how a channel is used, and what of the type the scenario may show (-inf: nothing)."""
    start = shop.item_of_shelf_S1[shop.shelf_of_type_F1]
    value_CI = np.where(pool_CI, weights.quality * shop.quality_I, -np.inf)
    share_CF = segment_logsumexp(value_CI, start) - segment_logsumexp((weights.quality * shop.quality_I)[None], start)
    leaning_FD = np.array([kind.department for kind in shop.goods.types])[:, None] == np.array(SUBSIDY_DEPARTMENTS)
    leaning_F = np.where(leaning_FD.any(1), 0.8, -0.4)
    channel_C = np.array([1, -1, 1, -1, 0, 0, 0])
    return (rng.normal(0, 0.35, len(shop.goods)) + share_CF + channel_C[:, None] * leaning_F).astype(np.float32)


def _profile(range_: goods.Goods) -> np.ndarray:
    gender_FG = range_.tag("f", "m")
    age_FE = range_.tag("young", "young", "mid", "old") * np.array([1.0, 0.5, 1.0, 1.0], np.float32)
    return (gender_FG.T[:, None] + age_FE.T[None]).reshape(len(GENDERS), len(AGES), len(range_)).astype(np.float32)


def _context(range_: goods.Goods, days: Calendar) -> np.ndarray:
    """(D, Y, F): season, feast and weather."""
    season_DF = range_.tag(*calendar.SEASONS).T[days.season_D]
    feast_DF = days.feast_tag_DT @ range_.tag(*calendar.FEASTS).T
    weather_DYF = range_.tag(*calendar.CONDITIONS).T[days.condition_DY]
    hot_DY, cold_DY = (days.temperature_DY - 24) / 8, (4 - days.temperature_DY) / 12
    warmth_DY2 = np.clip(np.stack([hot_DY, cold_DY], -1), 0, 1.3)
    return ((season_DF + feast_DF)[:, None] + weather_DYF + warmth_DY2 @ range_.tag(*calendar.WARMTH).T).astype(np.float32)


def _triggers(range_: goods.Goods) -> np.ndarray:
    """(C, F, F): what a trigger of the first product type does for the second.

    Feeds stay near; overlay and checkout ask for complements and want no second piece of the same kind.
    """
    same_FF = np.eye(len(range_), dtype=np.float32)
    aisle_F, department_F = range_.codes("aisle"), range_.codes("department")
    near_FF = 0.4 * same_FF + 1.4 * (aisle_F[:, None] == aisle_F) + 1.5 * (department_F[:, None] == department_F)
    beside_FF = np.log(range_.complement_FF + 0.002)
    table = np.zeros((len(SCENARIOS), len(range_), len(range_)), np.float32)
    table[list(FEEDS)] = near_FF
    table[PATHS[0]] = 0.95 * beside_FF - 5 * same_FF
    table[PATHS[1]] = 0.8 * beside_FF - 4 * same_FF
    return table


def _shelves(shop: Catalogue, hidden: People, pool_CI: np.ndarray, taste_KI: np.ndarray, weights: Weights) -> np.ndarray:
    """(C, K, S): what a taste finds on a shelf (the inclusive value of its items in the pool) and thinks of its brand."""
    brand_KS = weights.taste_brand * (hidden.taste_KA @ shop.brand_style_MA.T)[:, shop.brand_S]
    found: dict[bytes, np.ndarray] = {}
    rows = []
    for pool_I in pool_CI:
        key = np.packbits(pool_I).tobytes()
        if key not in found:
            value_KI = np.where(pool_I, weights.quality * shop.quality_I + taste_KI, -np.inf)
            found[key] = (weights.inclusive * segment_logsumexp(value_KI, shop.item_of_shelf_S1) + brand_KS).astype(np.float32)
        rows.append(found[key])
    return np.stack(rows)


def _shares(shop: Catalogue, pool_CI: np.ndarray, weights: Weights) -> np.ndarray:
    """(C, I): an item's part of what its shelf has in the pool, by quality alone; 0 outside the pool."""
    value_CI = np.where(pool_CI, np.exp(weights.quality * shop.quality_I), 0)
    sum_CS = np.add.reduceat(value_CI, shop.item_of_shelf_S1[:-1], axis=1)
    return (value_CI / np.maximum(sum_CS, 1e-9)[:, shop.shelf_I]).astype(np.float32)


def _fit_shares(shop: Catalogue, weights: Weights) -> np.ndarray:
    """(S, X): the part of a shelf, by quality, that fits each model X; 0 for goods that fit no model."""
    share_SX = np.zeros((len(shop.type_S), max(1, len(shop.fit_names))), np.float64)
    fitted = np.flatnonzero(shop.fits_F[shop.type_I] >= 0)
    np.add.at(share_SX, (shop.shelf_I[fitted], shop.fit_I[fitted]), np.exp(weights.quality * shop.quality_I[fitted]))
    return (share_SX / np.maximum(share_SX.sum(1, keepdims=True), 1e-9)).astype(np.float32)
