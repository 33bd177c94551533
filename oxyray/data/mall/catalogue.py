"""The catalogue: brands, shelves and items with their words, prices and hidden quality, drawn from a seed.

A *shelf* is one brand's items of one product type; items are numbered in shelf order, so that a product type and a shelf are each one
range of item numbers. That makes the three-stage choice (product type, shelf, item) exact and cheap at a million items. Public ids are
a seeded permutation of those numbers and tell nothing.

Legend: F product types, S shelves, I items, M brands, A taste axes, C scenarios.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from oxyray.data.mall.goods import AXES, FAMILIES, Goods, Words, models, sections

_NAMES = {name: entry.split() for name, entry in sections("words.txt")["names"].items()}
SERIES = tuple(_NAMES["series"])

TIERS = ("value", "middle", "premium")
_TIER_SHARE = (0.36, 0.38, 0.26)
_TIER_PRICE = np.array([0.62, 1.0, 1.75])


@dataclass(frozen=True)
class Catalogue:
    """Arrays over items; text is made from them on demand (`texts.py`)."""

    goods: Goods
    brand_names: tuple[str, ...]
    brand_tier_M: np.ndarray
    brand_style_MA: np.ndarray
    shelf_of_type_F1: np.ndarray
    item_of_shelf_S1: np.ndarray
    type_S: np.ndarray
    brand_S: np.ndarray
    shelf_I: np.ndarray
    colour_I: np.ndarray
    material_I: np.ndarray
    style_word_I: np.ndarray
    feature_I: np.ndarray
    variant_I: np.ndarray
    series_I: np.ndarray
    fit_I: np.ndarray
    fit_names: tuple[str, ...]
    fit_family_X: np.ndarray
    style_IA: np.ndarray
    quality_I: np.ndarray
    price_I: np.ndarray
    list_price_I: np.ndarray
    price_rank_I: np.ndarray
    public_I: np.ndarray

    @property
    def items(self) -> int:
        return len(self.shelf_I)

    @cached_property
    def type_I(self) -> np.ndarray:
        return self.type_S[self.shelf_I]

    @cached_property
    def brand_I(self) -> np.ndarray:
        return self.brand_S[self.shelf_I]

    @cached_property
    def makes_F(self) -> np.ndarray:
        """Model family that a product type's items are models of; -1 none."""
        return self.goods.numbers("makes")

    @cached_property
    def fits_F(self) -> np.ndarray:
        """Model family that a product type's items are made for; -1 none."""
        return self.goods.numbers("fits")


def build(goods: Goods, items: int, rng: np.random.Generator) -> Catalogue:
    """Draw a catalogue of exactly `items` items, at least two per product type."""
    count_F = _split(items, rng.lognormal(0, 0.25, len(goods)), 2, rng)
    shelves_F = np.clip(np.round(np.sqrt(count_F)), 2, 120).astype(np.int64)
    names, tier_M, brand_style_MA, brand_S = _brands(goods, shelves_F, rng)
    type_S = np.repeat(np.arange(len(goods)), shelves_F)
    count_S = np.concatenate([_split(int(n), rng.lognormal(0, 0.35, s), 1, rng) for n, s in zip(count_F, shelves_F, strict=True)])
    shelf_I = np.repeat(np.arange(len(type_S)), count_S)
    type_I, brand_I = type_S[shelf_I], brand_S[shelf_I]
    lean_IA = brand_style_MA[brand_I]
    colour_I, colour_IA = _pick(goods, "palette", type_I, lean_IA, rng, 0.5)
    material_I, material_IA = _pick(goods, "materials", type_I, lean_IA, rng, 1.0)
    word_I, word_IA = _pick(goods, "styles", type_I, lean_IA, rng, 1.5)
    style_IA = 0.7 * colour_IA + 0.7 * material_IA + 0.9 * word_IA + 0.4 * lean_IA + rng.normal(0, 0.2, (items, len(AXES)))
    feature_I = (rng.random(items) * np.array([len(kind.features) for kind in goods.types])[type_I]).astype(np.int16)
    variant_I = (rng.random(items) * np.array([len(kind.variants) for kind in goods.types])[type_I]).astype(np.int16)
    fit_names, fit_family_X, fit_I = _fits(goods, names, type_S, brand_S, shelf_I, rng)
    price_I, list_price_I, rank_I = _prices(goods, type_I, tier_M[brand_I], variant_I, rng)
    return Catalogue(
        goods, names, tier_M, brand_style_MA.astype(np.float32),
        _starts(shelves_F), _starts(count_S), type_S.astype(np.int32), brand_S.astype(np.int32), shelf_I.astype(np.int32),
        colour_I, material_I, word_I, feature_I, variant_I, rng.integers(0, len(SERIES), items).astype(np.int16),
        fit_I, fit_names, fit_family_X, style_IA.astype(np.float32),
        rng.normal(0, 1, items).astype(np.float32), price_I, list_price_I, rank_I,
        rng.permutation(items).astype(np.int32),
    )  # fmt: skip


def _split(total: int, weights: np.ndarray, least: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers near `total · weights`, at least `least` each, that sum to `total`."""
    exact = weights / weights.sum() * (total - least * len(weights))
    count = np.floor(exact).astype(np.int64)
    order = np.argsort(count - exact, kind="stable")
    count[order[: total - least * len(weights) - count.sum()]] += 1
    return count + least


def _starts(count: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(count)]).astype(np.int64)


def _brands(goods: Goods, shelves_F: np.ndarray, rng: np.random.Generator) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Each department has its brands; a product type's shelves go to some of them. Returns names, tiers, styles, each shelf's brand."""
    department_F = goods.codes("department")
    names: dict[str, None] = {}
    tiers, brand_S = [], np.zeros(int(shelves_F.sum()), np.int64)
    start_F = _starts(shelves_F)
    for department in range(department_F.max() + 1):
        here = np.flatnonzero(department_F == department)
        number = int(np.ceil(1.5 * shelves_F[here].max())) + 2
        first = len(names)
        while len(names) < first + number:
            syllables = [_NAMES[part] for part in ("onset", "vowel", "middle", "end")]
            names.setdefault("".join(str(rng.choice(part)) for part in syllables))
        tiers.append(
            np.tile(np.repeat(np.arange(3), np.round(np.array(_TIER_SHARE) * 8).astype(int)), -(-number // 8))[rng.permutation(number)]
        )
        for kind in here:
            brand_S[start_F[kind] : start_F[kind + 1]] = first + rng.choice(number, shelves_F[kind], replace=False)
    tier_M = np.concatenate(tiers).astype(np.int8)
    style_MA = rng.normal(0, 0.55, (len(names), len(AXES)))
    style_MA[:, AXES.index("luxe")] += 0.6 * (tier_M - 1)
    return tuple(names), tier_M, style_MA, brand_S


def _pick(
    goods: Goods, field: str, type_I: np.ndarray, lean_IA: np.ndarray, rng: np.random.Generator, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """A word of each item's group, likelier where it suits the brand. Returns word numbers and their style."""
    chosen_I = np.zeros(len(type_I), np.int16)
    style_IA = np.zeros(lean_IA.shape)
    for kind, product in enumerate(goods.types):
        group: Words = getattr(product, field)
        here = slice(*np.searchsorted(type_I, [kind, kind + 1]))
        utility_IW = strength * lean_IA[here] @ group.style_WA.T + rng.gumbel(0, 1, (here.stop - here.start, len(group.words)))
        chosen_I[here] = utility_IW.argmax(1)
        style_IA[here] = group.style_WA[chosen_I[here]]
    return chosen_I, style_IA


def _fits(
    goods: Goods, names: tuple[str, ...], type_S: np.ndarray, brand_S: np.ndarray, shelf_I: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Models: each belongs to a brand that makes them. `fit_I` is the model an item is, or is made for; -1 none."""
    fit_I = np.full(len(shelf_I), -1, np.int32)
    fit_names: list[str] = []
    family_X: list[int] = []
    type_I = type_S[shelf_I]
    for family in range(len(FAMILIES)):
        makers = np.flatnonzero(goods.numbers("makes")[type_S] == family)
        if not len(makers):
            continue
        words = models()[FAMILIES[family]]
        number = max(len(makers), min(len(words), int(np.sqrt(np.isin(type_I, type_S[makers]).sum()) * 1.2)))
        first = len(fit_names)
        maker_X = makers[np.arange(number) % len(makers)]
        fit_names += [f"{names[brand_S[maker]]} {words[x % len(words)]}" for x, maker in enumerate(maker_X)]
        family_X += [family] * number
        for shelf in makers:
            here = slice(*np.searchsorted(shelf_I, [shelf, shelf + 1]))
            fit_I[here] = first + rng.choice(np.flatnonzero(maker_X == shelf), here.stop - here.start)
        users = np.flatnonzero(goods.numbers("fits")[type_I] == family)
        share_X = 1 / (1 + np.arange(number)) ** 0.6
        fit_I[users] = first + rng.choice(number, len(users), p=share_X / share_X.sum())
    return tuple(fit_names), np.array(family_X, np.int16), fit_I


def _prices(
    goods: Goods, type_I: np.ndarray, tier_I: np.ndarray, variant_I: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Price, list price and the price's rank within its product type, 0..1. Log-normal by type and tier; later variants are larger."""
    list_I = goods.numbers("price")[type_I] * _TIER_PRICE[tier_I] * np.exp(rng.normal(0, 0.22, len(type_I)) + 0.12 * variant_I)
    deal_I = np.where(rng.random(len(type_I)) < 0.6, rng.uniform(0.6, 0.86, len(type_I)), 1.0)
    price_I = np.maximum(np.round(list_I * deal_I), 1) - 0.01
    rank_I = np.zeros(len(type_I), np.float32)
    order = np.lexsort((price_I, type_I))
    start_F = np.searchsorted(type_I[order], np.arange(len(goods) + 1))
    within = np.arange(len(type_I)) - start_F[type_I[order]]
    rank_I[order] = (within + 0.5) / np.diff(start_F)[type_I[order]]
    return price_I.astype(np.float32), np.maximum(np.round(list_I) - 0.01, price_I).astype(np.float32), rank_I
