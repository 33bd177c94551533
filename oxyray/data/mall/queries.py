"""Search queries: what somebody types who wants one item, and how typing goes wrong.

A wish is told in one of a few forms; P(query | item) is the form's share where the item has the word, else 0. So given a query, the
choice is the utility's choice among the matching items of the product type (Bayes' rule, exact), and `matches` is all that an optimum
needs to know of it.

Legend: N searches, X candidates.
"""

from __future__ import annotations

import numpy as np

from oxyray.data.mall.catalogue import Catalogue

FORMS = ("noun", "colour", "material", "style", "brand", "model")
_SHARE = np.array([0.30, 0.24, 0.15, 0.15, 0.16, 0.0])
_SHARE_FITTED = np.array([0.22, 0.16, 0.08, 0.08, 0.10, 0.36])
NOISE_SHARE = 0.35
_NEAR = {
    "a": "s",
    "e": "r",
    "i": "o",
    "o": "p",
    "n": "m",
    "t": "r",
    "s": "d",
    "r": "t",
    "l": "k",
    "c": "v",
    "h": "j",
    "d": "f",
    "m": "n",
    "u": "i",
    "p": "o",
}


def draw_forms(shop: Catalogue, item_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Form of the query (index into FORMS) that each wanted item is searched by."""
    fitted_N = (shop.fits_F[shop.type_I[item_N]] >= 0)[:, None]
    cumulative_NX = np.cumsum(np.where(fitted_N, _SHARE_FITTED, _SHARE), axis=1)
    return (cumulative_NX < rng.random(len(item_N))[:, None] * cumulative_NX[:, -1:]).sum(1)


def matches(shop: Catalogue, form_N: np.ndarray, wanted_N: np.ndarray, item_NX: np.ndarray) -> np.ndarray:
    """bool (N, X): items that the query, made for `wanted_N` in the given form, may have been made for too. Form -1: no query, all."""
    wanted_N1, form_N1 = wanted_N[:, None], form_N[:, None]
    same = [shop.type_I[item_NX] == shop.type_I[wanted_N1]]
    same += [field[item_NX] == field[wanted_N1] for field in (shop.colour_I, shop.material_I, shop.style_word_I, shop.brand_I, shop.fit_I)]
    word = np.select([form_N1 == form for form in range(1, len(FORMS))], same[1:], True)
    return (form_N1 < 0) | (same[0] & word)


def text(shop: Catalogue, form: int, item: int) -> str:
    """The clean query."""
    kind = shop.goods.types[shop.type_I[item]]
    if form == 1:
        return f"{kind.palette.words[shop.colour_I[item]]} {kind.noun}"
    if form == 2:
        return f"{kind.materials.words[shop.material_I[item]]} {kind.noun}"
    if form == 3:
        return f"{kind.styles.words[shop.style_word_I[item]]} {kind.noun}"
    if form == 4:
        return f"{shop.brand_names[shop.brand_I[item]].lower()} {kind.noun}"
    if form == 5:
        return f"{shop.fit_names[shop.fit_I[item]].split(' ', 1)[1].lower()} {kind.noun}"
    return kind.noun


def typed(clean: str, rng: np.random.Generator) -> str:
    """What arrives of a clean query: cut off, a letter lost, doubled, swapped, or hit beside, a space lost."""
    kind, place = int(rng.choice(6, p=(0.4, 0.14, 0.1, 0.14, 0.12, 0.1))), int(rng.integers(1, max(2, len(clean) - 1)))
    if kind == 0:
        return clean[: max(3, len(clean) - int(rng.integers(1, 6)))].rstrip()
    if kind == 1:
        return clean[:place] + clean[place + 1 :]
    if kind == 2:
        return clean[:place] + clean[place] + clean[place:]
    if kind == 3:
        return clean[:place] + clean[place : place + 2][::-1] + clean[place + 2 :]
    if kind == 4:
        return clean[:place] + _NEAR.get(clean[place], "a") + clean[place + 1 :]
    return clean.replace(" ", "", 1) if " " in clean else clean[:-1]
