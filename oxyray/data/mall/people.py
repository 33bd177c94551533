"""People: what can be seen of them (age group, gender, city, spending tier, device), and what cannot (persona, taste).

A *persona* says which product types somebody wants; a *taste* which words, brands and pictures please them. Both are hidden, one of a few, and
change rarely between visits: a persona by life events (a student finds work, a child is born), a taste by drift to a taste nearby. Because they
are few and change in steps, what may be inferred of them from a log can be computed exactly (`belief.py`).

Legend: U users, Z personas, K tastes, F product types, A taste axes, G genders, E age groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.mall.calendar import CITIES
from oxyray.data.mall.goods import AXES, Goods

AGES = ("18-24", "25-34", "35-49", "50+")
GENDERS = ("female", "male")
TIERS = ("saver", "balanced", "spender")
DEVICES = ("android", "iphone", "tablet", "web")

PERSONAS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...], str]] = {
    # name: (what they want more: name weight, ...; share by age; share by gender; life events lead to)
    "student": ("Stationery & hobbies .9, Computing & gaming 1, Instant noodles 1.6, Hoodies 1, Backpacks 1, Writing 1", (5, 0.6, 0.1, 0), (1, 1), "young professional, gamer"),
    "young professional": ("Shirts 1.6, Laptops 1, Coffee capsules 1.4, Coffee machines 1, Wristwatches 1, Handbags .6, Desk lamps .8, Audio .6", (1, 4, 1, 0.1), (1, 1), "new parent, traveller, homeowner"),
    "new parent": ("Baby care 3.2, Picture books 1.6, Plush toys 1.6, Laundry detergent 1.2, Toys .8, Humidifiers .6", (0.3, 3, 1.5, 0.1), (1.3, 0.8), "school parent"),
    "school parent": ("Learning 2.4, Toys 2, Lunch boxes 1.6, Water bottles 1, Games & music .6, Storage .8", (0, 0.7, 3.5, 0.6), (1.2, 0.9), "home cook, homeowner"),
    "home cook": ("Kitchen & dining 1.9, Pantry 1.7, Kitchen appliances 1.6, Honey .5", (0.3, 1, 2, 2), (1.2, 0.8), "tea and wine lover, gardener"),
    "outdoor enthusiast": ("Camping 2.8, Cycling & swimming 1.8, Windbreakers 1.2, Backpacks 1, Running shoes 1, Sunglasses .8", (0.8, 1.5, 1.3, 0.7), (0.7, 1.4), "new parent, fitness fan"),
    "gamer": ("Computing & gaming 2.3, Audio 1.4, Instant noodles 1.2, Sparkling water .8, Board games 1", (2.5, 1.5, 0.5, 0), (0.5, 1.5), "young professional, tech enthusiast"),
    "fashion lover": ("Clothing 1.5, Shoes & bags 1.6, Make-up .8, Summer dresses .6", (2, 2, 0.8, 0.3), (1.8, 0.4), "new parent, beauty lover"),
    "beauty lover": ("Beauty & care 1.2, Skin care 1.5, Make-up 1.7, Scented candles 1.2", (1.8, 2, 1, 0.4), (2, 0.1), "fashion lover, new parent"),
    "fitness fan": ("Fitness 3, Running shoes 1.8, Water bottles 1.4, Leggings 1.2, Earbuds 1, T-shirts .8", (1.5, 2, 1, 0.4), (1, 1.1), "outdoor enthusiast, home cook"),
    "dog owner": ("Dog food 3.6, Dog leashes 3, Pet beds 2.6, Raincoats .6", (0.6, 1.2, 1.2, 1), (1, 1), "outdoor enthusiast, gardener"),
    "cat owner": ("Cat food 3.5, Cat litter 3.5, Cat trees 2.8, Pet beds 1.8, Handheld vacuums .6", (1, 1.5, 0.9, 0.6), (1.3, 0.7), "new parent, crafter"),
    "tech enthusiast": ("Phones & accessories 1.9, Audio 1.6, Cleaning appliances 1.3, Computing & gaming 1.2, Climate .6", (1.2, 2, 1.3, 0.5), (0.5, 1.6), "new parent, homeowner"),
    "gardener": ("Garden 3.2, Green tea .8, Honey .6, Wall clocks .5", (0, 0.4, 1.2, 3), (1.1, 0.9), "tea and wine lover"),
    "tea and wine lover": ("Drinks 1.9, Dark chocolate 1.4, Mixed nuts 1.2, Mugs 1.6, Tableware .8, Honey 1.2", (0.2, 1, 1.5, 2), (0.9, 1.1), "gardener, traveller"),
    "homeowner": ("Home & living 1.7, Home appliances 1.3, Storage 1.4", (0, 1.5, 2.2, 1.2), (1.1, 0.9), "school parent, home cook"),
    "crafter": ("Crafts 2.9, Writing 1.6, Scented candles 1, Flower pots .6, Picture books .3", (1.2, 0.8, 0.8, 1.2), (1.7, 0.4), "cat owner, gardener"),
    "traveller": ("Bags 2, Cycling & swimming 1, Sunscreens 1.4, Sunglasses 1.4, Phone chargers 1, Earbuds .8, Sandals 1", (0.8, 1.5, 1, 1), (1, 1), "outdoor enthusiast, tea and wine lover"),
}  # fmt: skip

TASTES: dict[str, str] = {
    "quiet natural": "bold -.9 natural .9", "warm rustic": "warm .9 natural .8 classic .4", "bright and cute": "bold .8 cute 1",
    "dark and sleek": "dark 1 luxe .6 bold -.3", "sporty colour": "sporty 1 bold .7", "quiet luxury": "luxe 1 bold -.7",
    "golden classic": "classic .9 luxe .7 warm .4", "plain and cheap": "luxe -1 bold -.4", "pastel soft": "cute .7 dark -.8 bold -.4",
    "vintage": "classic 1 warm .5 dark .3", "clean white": "dark -1 classic -.5 bold -.5", "street": "bold .7 dark .7 sporty .4",
    "eco active": "natural .8 sporty .8", "cosy home": "warm .7 cute .6 dark .2", "cool modern": "warm -.9 classic -.7 luxe .3",
    "loud glamour": "bold .9 luxe .9", "rugged dark": "sporty .7 dark .7 natural .3", "cool fresh": "warm -.9 sporty .5 dark -.5",
    "heritage": "classic .9 natural .7", "playful cheap": "cute .8 luxe -.8 bold .3",
}  # fmt: skip


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
    names = tuple(PERSONAS)
    persona_ZF = np.zeros((len(names), len(goods)), np.float32)
    share_GEZ = np.zeros((len(GENDERS), len(AGES), len(names)))
    next_ZZ = np.zeros((len(names), len(names)))
    for persona, (wants, ages, genders, following) in enumerate(PERSONAS.values()):
        for want in wants.split(","):
            name, weight = want.strip().rsplit(" ", 1)
            for kind, product in enumerate(goods.types):
                if name in (product.name, product.aisle, product.department):
                    persona_ZF[persona, kind] += float(weight)
        share_GEZ[:, :, persona] = np.outer(genders, ages)
        for follower in following.split(","):
            next_ZZ[persona, names.index(follower.strip())] = 1
    taste_KA = np.zeros((len(TASTES), len(AXES)), np.float32)
    for taste, words in enumerate(TASTES.values()):
        parts = words.split()
        for axis, weight in zip(parts[::2], parts[1::2], strict=True):
            taste_KA[taste, AXES.index(axis)] = float(weight)
    taste_KA /= np.linalg.norm(taste_KA, axis=1, keepdims=True)
    near_KK = np.exp(3 * taste_KA @ taste_KA.T)
    np.fill_diagonal(near_KK, 0)
    lean_GA, lean_EA = np.zeros((len(GENDERS), len(AXES))), np.zeros((len(AGES), len(AXES)))
    lean_GA[:, AXES.index("cute")], lean_GA[:, AXES.index("dark")] = (0.9, -0.9), (-0.6, 0.6)
    lean_EA[:, AXES.index("classic")], lean_EA[:, AXES.index("bold")] = (-1.0, -0.4, 0.3, 1.2), (0.8, 0.2, -0.3, -0.6)
    taste_share_GEK = np.exp(lean_GA[:, None] @ taste_KA.T + (lean_EA @ taste_KA.T)[None])
    return People(names, tuple(TASTES), persona_ZF, _rows(share_GEZ), _rows(next_ZZ), taste_KA, _rows(taste_share_GEK), _rows(near_KK))


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
