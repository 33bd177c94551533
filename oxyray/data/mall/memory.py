"""What the log remembers of each user of a block: interests recent and lasting, brands, possessions. It follows from past events alone.

Because memory is made of logged events, a drifting interest needs no hidden state of its own: a type once tried becomes likelier,
fades, is replaced (a decaying Pólya urn, which is a random walk of interests seen from its innovations). All decays are exponential in
time.

Legend: B users of the block, F product types, M brands, R recent events, H model families.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.calendar import DAY
from oxyray.data.mall.catalogue import Catalogue
from oxyray.data.mall.goods import FAMILIES

HALF_LIFE = {"fast": 3 / 24, "slow": 45.0, "bought": 21.0, "brand": 60.0}
"""In days: the visit's intent, lasting interest, what was bought (for its complements), brands."""

RECENT = 16
_NEVER = np.int64(-(10**12))


@dataclass
class Memory:
    time_B: np.ndarray
    fast_BF: np.ndarray
    slow_BF: np.ndarray
    bought_BF: np.ndarray
    brand_BM: np.ndarray
    bought_time_BF: np.ndarray
    bought_item_BF: np.ndarray
    owned_BH: np.ndarray
    recent_BR: np.ndarray
    recent_time_BR: np.ndarray

    @staticmethod
    def empty(users: int, shop: Catalogue) -> Memory:
        types, brands = len(shop.goods), len(shop.brand_names)
        return Memory(
            time_B=np.zeros(users, np.int64),
            fast_BF=np.zeros((users, types), np.float32),
            slow_BF=np.zeros((users, types), np.float32),
            bought_BF=np.zeros((users, types), np.float32),
            brand_BM=np.zeros((users, brands), np.float32),
            bought_time_BF=np.full((users, types), _NEVER),
            bought_item_BF=np.full((users, types), -1, np.int32),
            owned_BH=np.full((users, len(FAMILIES)), -1, np.int32),
            recent_BR=np.full((users, RECENT), -1, np.int32),
            recent_time_BR=np.full((users, RECENT), _NEVER),
        )

    def at(self, rows: np.ndarray, time: np.ndarray) -> Memory:
        """A copy of the given users' memory, faded to the given times (epoch seconds, not before their last event)."""
        days = ((time - self.time_B[rows]) / DAY).astype(np.float32)[:, None]
        faded = {
            name: getattr(self, name)[rows] * np.exp2(-days / HALF_LIFE[name[:-3]])
            for name in ("fast_BF", "slow_BF", "bought_BF", "brand_BM")
        }
        kept = {name: getattr(self, name)[rows] for name in ("bought_time_BF", "bought_item_BF", "owned_BH", "recent_BR", "recent_time_BR")}
        return Memory(time_B=np.asarray(time), **faded, **kept)

    def put(self, rows: np.ndarray, other: Memory) -> None:
        """Write users' memories back."""
        for name, value in vars(other).items():
            getattr(self, name)[rows] = value

    def add(self, shop: Catalogue, item_B: np.ndarray, action_B: np.ndarray, path_B: np.ndarray) -> None:
        """One event per user, at `time_B`. Action 0 click, 1 cart, 2 purchase. On the way to paying (`path_B`) it moves the intent less."""
        every = np.arange(len(item_B))
        type_B, brand_B = shop.type_I[item_B], shop.brand_I[item_B]
        self.fast_BF[every, type_B] += np.where(path_B, 0.3, 1.0)
        self.slow_BF[every, type_B] += 1 + action_B
        self.brand_BM[every, brand_B] += 1 + action_B
        bought = np.flatnonzero(action_B == 2)
        self.bought_BF[bought, type_B[bought]] += 1
        self.bought_time_BF[bought, type_B[bought]] = self.time_B[bought]
        self.bought_item_BF[bought, type_B[bought]] = item_B[bought]
        makes_B = shop.makes_F[type_B]
        owns = np.flatnonzero((action_B >= 1) & (makes_B >= 0))
        self.owned_BH[owns, makes_B[owns]] = shop.fit_I[item_B[owns]]
        self.recent_BR[:, 1:] = self.recent_BR[:, :-1].copy()
        self.recent_time_BR[:, 1:] = self.recent_time_BR[:, :-1].copy()
        self.recent_BR[:, 0], self.recent_time_BR[:, 0] = item_B, self.time_B
