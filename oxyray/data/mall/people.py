"""People: what can be seen of them (age group, gender, city, spending tier, device), and what cannot (persona, taste).

A *persona* says which product types somebody wants; a *taste* which words, brands and pictures please them. Both are hidden, one of a
few, and change rarely between visits: a persona by life events (a student finds work, a child is born), a taste by drift to a taste
nearby. Because they are few and change in steps, what may be inferred of them from a log can be computed exactly (`belief.py`).

Legend: U users, Z personas, K tastes, F product types, A taste axes, G genders, E age groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.calendar import CITIES
from oxyray.data.mall.goods import AXES, Goods, on_axes, sections

AGES = ("18-24", "25-34", "35-49", "50+")
GENDERS = ("female", "male")
TIERS = ("saver", "balanced", "spender")
DEVICES = ("android", "iphone", "tablet", "web")


@dataclass(frozen=True)
class People:
    """Tables of the hidden types. Rows of shares and of transitions sum to 1."""

    persona_names: tuple[str, ...]
    taste_names: tuple[str, ...]
    persona_type_ZF: np.ndarray
    persona_share_GEZ: np.ndarray
    persona_next_ZZ: np.ndarray
    taste_KA: np.ndarray
    taste_share_GEK: np.ndarray
    taste_next_KK: np.ndarray


@dataclass(frozen=True)
class Users:
    """A block of users. `joined_U` is the epoch second of registration; `visits_U` the number of visits in their life."""

    age_U: np.ndarray
    gender_U: np.ndarray
    city_U: np.ndarray
    tier_U: np.ndarray
    device_U: np.ndarray
    joined_U: np.ndarray
    visits_U: np.ndarray
    persona_U: np.ndarray
    taste_U: np.ndarray

    def __len__(self) -> int:
        return len(self.age_U)


def build(goods: Goods) -> People:
    """The hidden types as they stand in `people.txt`, for the given range of goods."""
    personas, tastes = sections("people.txt")["personas"], sections("people.txt")["tastes"]
    names = tuple(personas)
    persona_ZF = np.zeros((len(names), len(goods)), np.float32)
    share_GEZ = np.zeros((len(GENDERS), len(AGES), len(names)))
    next_ZZ = np.zeros((len(names), len(names)))
    for persona, text in enumerate(personas.values()):
        wants, ages, genders, following = (part.strip() for part in text.split("|"))
        for want in wants.split(","):
            name, weight = want.strip().rsplit(" ", 1)
            for kind, product in enumerate(goods.types):
                if name in (product.name, product.aisle, product.department):
                    persona_ZF[persona, kind] += float(weight)
        share_GEZ[:, :, persona] = np.outer([float(share) for share in genders.split()], [float(share) for share in ages.split()])
        for follower in following.split(","):
            next_ZZ[persona, names.index(follower.strip())] = 1
    taste_KA = np.stack([on_axes(words.split()) for words in tastes.values()])
    taste_KA /= np.linalg.norm(taste_KA, axis=1, keepdims=True)
    near_KK = np.exp(3 * taste_KA @ taste_KA.T)
    np.fill_diagonal(near_KK, 0)
    lean_GA, lean_EA = np.zeros((len(GENDERS), len(AXES))), np.zeros((len(AGES), len(AXES)))
    lean_GA[:, AXES.index("cute")], lean_GA[:, AXES.index("dark")] = (0.9, -0.9), (-0.6, 0.6)
    lean_EA[:, AXES.index("classic")], lean_EA[:, AXES.index("bold")] = (-1.0, -0.4, 0.3, 1.2), (0.8, 0.2, -0.3, -0.6)
    taste_share_GEK = np.exp((lean_GA @ taste_KA.T)[:, None] + (lean_EA @ taste_KA.T)[None])
    return People(names, tuple(tastes), persona_ZF, _rows(share_GEZ), _rows(next_ZZ), taste_KA, _rows(taste_share_GEK), _rows(near_KK))


def draw(people: People, users: int, first: int, days: int, mean_visits: float, rng: np.random.Generator) -> Users:
    """A block of users. Four in ten were there from the first day; visits are heavy-tailed, so a few have thousands of events."""
    age_U = rng.choice(len(AGES), users, p=(0.24, 0.36, 0.26, 0.14))
    gender_U = rng.integers(0, len(GENDERS), users)
    city_share = np.array([values[-1] for values in CITIES.values()])
    city_U = rng.choice(len(CITIES), users, p=city_share / city_share.sum())
    tier_U = np.clip(np.round(rng.normal(np.array([0.55, 0.95, 1.25, 1.05])[age_U], 0.7)), 0, 2).astype(np.int64)
    device_U = draw_rows(np.array([[0.62, 0.2, 0.06, 0.12], [0.48, 0.36, 0.06, 0.1], [0.25, 0.6, 0.07, 0.08]])[tier_U], rng)
    day_U = np.where(rng.random(users) < 0.4, 0, rng.random(users) * days * 0.9)
    joined_U = (first + day_U * 86_400 + 6 * 3600 + rng.integers(0, 16 * 3600, users)).astype(np.int64)
    spread = 1.1
    visits_U = 1 + np.floor(rng.lognormal(np.log(mean_visits) - spread**2 / 2, spread, users) * (1 - 0.6 * day_U / days)).astype(np.int64)
    persona_U = draw_rows(people.persona_share_GEZ[gender_U, age_U], rng)
    taste_U = draw_rows(people.taste_share_GEK[gender_U, age_U], rng)
    return Users(age_U, gender_U, city_U, tier_U, device_U, joined_U, np.minimum(visits_U, 4 * days), persona_U, taste_U)


def draw_rows(share_UX: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index per row, drawn by the row's weights."""
    cumulative_UX = np.cumsum(share_UX, axis=1)
    return (cumulative_UX < rng.random(len(share_UX))[:, None] * cumulative_UX[:, -1:]).sum(1)


def _rows(weight: np.ndarray) -> np.ndarray:
    return weight / weight.sum(-1, keepdims=True)
