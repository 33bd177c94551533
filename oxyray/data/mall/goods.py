"""What the shop sells: product types, words and complements, read from the three text files beside this module.

Words are what text, picture and utility share: a title's colour is the picture's colour, and colour, material and style word lie on the
axes along which people's tastes differ (`AXES`), so that content predicts taste in part.

Legend: F product types (the leaves of the category tree), A taste axes, W words of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

AXES = ("bold", "dark", "warm", "natural", "classic", "luxe", "sporty", "cute")
FAMILIES = ("phone", "laptop", "console", "capsule", "vacuum", "brush", "pen")
TINY_DEPARTMENTS = ("Electronics", "Clothing", "Food & drink")


@dataclass(frozen=True)
class Words:
    """A group of words of one kind: a palette, materials or style words. `style_WA` is each word's place on the taste axes."""

    words: tuple[str, ...]
    style_WA: np.ndarray
    rgb_W3: np.ndarray


@dataclass(frozen=True)
class ProductType:
    name: str
    department: str
    aisle: str
    noun: str
    shape: str
    price: float
    durable_days: float
    cycle_days: float
    palette: Words
    materials: Words
    styles: Words
    features: tuple[str, ...]
    variants: tuple[str, ...]
    tags: dict[str, float]
    makes: int
    fits: int


@dataclass(frozen=True)
class Goods:
    """All product types of a shop, in shelf order, and the graph of complements between them (rows sum to 1)."""

    types: tuple[ProductType, ...]
    complement_FF: np.ndarray

    def __len__(self) -> int:
        return len(self.types)

    def index(self, name: str) -> int:
        return [kind.name for kind in self.types].index(name)

    def tag(self, *names: str) -> np.ndarray:
        """float32 (F, len(names)): log-weight of each tag for each product type, 0 where a type does not carry it."""
        return np.array([[kind.tags.get(name, 0.0) for name in names] for kind in self.types], np.float32)

    def numbers(self, field: str) -> np.ndarray:
        return np.array([getattr(kind, field) for kind in self.types])

    def codes(self, field: str) -> np.ndarray:
        """int (F,): the department or aisle of each type as a number."""
        values = [getattr(kind, field) for kind in self.types]
        return np.array([list(dict.fromkeys(values)).index(value) for value in values])


def load(departments: tuple[str, ...] | None = None) -> Goods:
    """The whole range, or the given departments of it."""
    groups, types = words(), []
    department = aisle = ""
    for line in _lines("goods.txt"):
        if line.startswith("["):
            department = line[1:-1]
        elif line.startswith("("):
            aisle = line[1:-1]
        elif departments is None or department in departments:
            types.append(_product_type(line, department, aisle, groups))
    return Goods(tuple(types), _complements([kind.name for kind in types]))


@cache
def words() -> dict[str, dict[str, Words]]:
    """{"palette": {...}, "material": {...}, "style": {...}} by group name."""
    read = {"palette": _palette, "material": _group, "style": _group}
    return {name: {group: make(entries) for group, entries in sections("words.txt")[name].items()} for name, make in read.items()}


@cache
def models() -> dict[str, tuple[str, ...]]:
    """By family, the names of models that accessories are made for, the commonest first."""
    found = {}
    for name, text in sections("words.txt")["models"].items():
        first, second = (part.split() for part in text.split("|"))
        count = len(first) * len(second)
        found[name] = tuple(f"{first[i % len(first)]} {second[(i % len(first) + i // len(first)) % len(second)]}" for i in range(count))
    return found


@cache
def sections(file: str) -> dict[str, dict[str, str]]:
    """A text file of `[section]` lines, each followed by lines `name = entry`."""
    found: dict[str, dict[str, str]] = {}
    for line in _lines(file):
        if line.startswith("["):
            here = found.setdefault(line[1:-1], {})
        else:
            name, entry = line.split("=", 1)
            here[name.strip()] = entry.strip()
    return found


def on_axes(parts: list[str]) -> np.ndarray:
    """float32 (A,): "bold -.9 luxe .2", split, as a point on the taste axes."""
    point_A = np.zeros(len(AXES), np.float32)
    for axis, weight in zip(parts[::2], parts[1::2], strict=True):
        point_A[AXES.index(axis)] = float(weight)
    return point_A


def _lines(file: str) -> list[str]:
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _product_type(line: str, department: str, aisle: str, groups: dict[str, dict[str, Words]]) -> ProductType:
    name, noun, shape, price, life, palette, materials, styles, features, variants, tags = (part.strip() for part in line.split(";"))
    pairs = [tag.split(":") for tag in tags.split()]
    roles = {key: FAMILIES.index(value) for key, value in pairs if key in ("makes", "fits")}
    return ProductType(
        name, department, aisle, noun, shape, float(price),
        durable_days=float(life[1:]) if life[0] == "d" else 0.0,
        cycle_days=float(life[1:]) if life[0] == "c" else 0.0,
        palette=groups["palette"][palette], materials=groups["material"][materials], styles=groups["style"][styles],
        features=tuple(features.split("/")), variants=tuple(variants.split("/")),
        tags={key: float(value) for key, value in pairs if key not in roles},
        makes=roles.get("makes", -1), fits=roles.get("fits", -1),
    )  # fmt: skip


def _palette(entries: str) -> Words:
    named = [entry.strip().rsplit(" ", 1) for entry in entries.split(";")]
    rgb_W3 = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for _, code in named], np.float32)
    share_W3 = rgb_W3 / 255
    style_WA = np.zeros((len(named), len(AXES)), np.float32)
    style_WA[:, AXES.index("bold")] = 2 * (share_W3.max(1) - share_W3.min(1)) - 0.8
    style_WA[:, AXES.index("dark")] = 1 - 2 * share_W3 @ np.array([0.3, 0.59, 0.11], np.float32)
    style_WA[:, AXES.index("warm")] = 1.5 * (share_W3[:, 0] - share_W3[:, 2])
    return Words(tuple(word for word, _ in named), style_WA, rgb_W3)


def _group(entries: str) -> Words:
    found, rows = [], []
    for entry in entries.split(";"):
        parts = entry.split()
        first = next(i for i, part in enumerate(parts) if part in AXES and parts[i + 1].lstrip("-.")[0].isdigit())
        found.append(" ".join(parts[:first]))
        rows.append(on_axes(parts[first:]))
    return Words(tuple(found), np.stack(rows), np.zeros((len(found), 3), np.float32))


def _complements(names: list[str]) -> np.ndarray:
    place = {name: i for i, name in enumerate(names)}
    weight_FF = np.zeros((len(names), len(names)), np.float32)
    for line in _lines("complements.txt"):
        first, others = (part.strip() for part in line.split(">"))
        for other in others.split("&"):
            name, weight = other.strip().rsplit(" ", 1)
            if first in place and name in place:
                weight_FF[place[first], place[name]] = float(weight)
    return weight_FF / np.maximum(weight_FF.sum(1, keepdims=True), 1e-9)
