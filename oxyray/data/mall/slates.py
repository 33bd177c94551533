"""What was on the screen: the pages of twelve on which a wanted item was found, and some pages that were left without a click.

A page S is answered by a choice: the user clicks item i with probability p_i / (OUTSIDE + sum of p over S), p being the request's choice
probability, or leaves it. The log holds, for each request, the page on which the wanted item was found, and some pages left without a
click. Pages come from cutting the scenario's pool at random, in a way that knows nothing of the user's wish, so any item of a clicked page
might have been the one that called it up: among clicked pages the click falls on i with probability p_i / (sum of p over S), as it should.
Pages without click are far too many to keep; KEPT of them per request are kept, drawn evenly over the pool (in a search, over the product
type). So in the log the odds of a click on i against none are p_i : KEPT · |S in G| / |G|, G being that pool or type: the choice model with
another outside weight. A ranker trained on the log learns p up to that known factor.

Legend: B visits, L places of a page, N items of a pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.catalogue import Catalogue

LONG = 12
CHUNK = 4
KEPT = 0.33
OUTSIDE = 0.15
_ORDERS = 4


@dataclass(frozen=True)
class Pager:
    """Cuts one pool into pages. `order_ON` are orders of the pool: product types stay together, within them items are shuffled."""

    order_ON: np.ndarray
    place_OI: np.ndarray

    @staticmethod
    def make(shop: Catalogue, pool_I: np.ndarray, rng: np.random.Generator) -> Pager:
        pool = np.flatnonzero(pool_I)
        orders, places = [], []
        for _ in range(_ORDERS):
            order_N = pool[np.lexsort((rng.random(len(pool)), shop.type_I[pool]))].astype(np.int32)
            place_I = np.full(len(pool_I), -1, np.int32)
            place_I[order_N] = np.arange(len(pool))
            orders.append(order_N)
            places.append(place_I)
        return Pager(np.stack(orders), np.stack(places))

    @property
    def pages(self) -> int:
        return -(-self.order_ON.shape[1] // LONG)

    def page(self, item_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int32 (B, LONG): for each item a page that holds it, places shuffled, -1 behind short pages. -1 for an item: any page."""
        count, size = len(item_B), self.order_ON.shape[1]
        order_B, shift_B = rng.integers(0, _ORDERS, count), rng.integers(0, size, count)
        place_B = np.where(item_B >= 0, self.place_OI[order_B, item_B], rng.integers(0, size, count))
        turned_B = (place_B + shift_B) % size
        chunks = -(-size // CHUNK)
        step = _coprime(chunks, int(0.382 * chunks))
        mixed_B = rng.random(count) < 0.5
        stride_B = np.where(mixed_B, step, 1)
        inverse_B = np.where(mixed_B, pow(step, -1, chunks) if chunks > 1 else 0, 1)
        dealt_B = (turned_B // CHUNK) * stride_B % chunks
        group = LONG // CHUNK
        dealt_BG = (dealt_B // group * group)[:, None] + np.arange(group)
        chunk_BG = dealt_BG * inverse_B[:, None] % chunks
        turned_BL = (chunk_BG[:, :, None] * CHUNK + np.arange(CHUNK)).reshape(count, LONG)
        real_BL = (np.repeat(dealt_BG, CHUNK, axis=1) < chunks) & (turned_BL < size)
        item_BL = np.where(real_BL, self.order_ON[order_B[:, None], (turned_BL - shift_B[:, None]) % size], -1)
        mix_BL = np.argsort(np.where(real_BL, rng.random(item_BL.shape), 2), axis=1)
        return np.take_along_axis(item_BL, mix_BL, axis=1)


def _coprime(number: int, near: int) -> int:
    step = max(1, near)
    while np.gcd(step, number) != 1:
        step += 1
    return step
