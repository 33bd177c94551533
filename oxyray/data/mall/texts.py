"""Titles, descriptions and attributes of items, in natural words built from their arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from oxyray.data.mall.catalogue import SERIES, Catalogue
from oxyray.data.mall.goods import ProductType

_OPENINGS = (
    "The {series} by {brand}: {style}, {material}, in {colour}.",
    "{Style} and {material}: the {noun} from {brand} in {colour}.",
    "{brand} {series}: {colour}, {material}, {style} in every detail.",
    "Meet the {series} {noun}: {style}, {colour}, and made to be used.",
)
_TASTES = (
    "{brand} {series} brings {colour} to your table, {style} and {material}.",
    "{Style} choice: {material} {noun}, {colour}.",
    "{colour} {noun} from {brand}, {material}, packed fresh.",
    "From the {series} line by {brand}: {colour}, {style}, {material}.",
)
_SEASONS = {
    "winter": "Made for cold days.",
    "summer": "Made for hot days.",
    "spring": "A start into spring.",
    "autumn": "For the cool days of autumn.",
    "rain": "Keeps you dry when it pours.",
    "school": "Ready for the first day of school.",
    "moon": "For sharing at the Mid-Autumn Festival.",
    "dragon": "For the Dragon Boat Festival.",
    "newyear": "For the home at Spring Festival.",
    "love": "A gift that says enough.",
    "child": "A present that children unwrap first.",
    "national": "For trips and holidays.",
}


class Text(NamedTuple):
    title: str
    description: str
    attributes: list[str]


def item_texts(catalogue: Catalogue, items: np.ndarray) -> Iterator[Text]:
    """Texts of the given item numbers, in their order."""
    for item in items.tolist():
        yield _text(catalogue, item)


def _text(catalogue: Catalogue, item: int) -> Text:
    shelf = int(catalogue.shelf_I[item])
    kind = catalogue.goods.types[catalogue.type_S[shelf]]
    brand = catalogue.brand_names[catalogue.brand_S[shelf]]
    colour, material = kind.palette.words[catalogue.colour_I[item]], kind.materials.words[catalogue.material_I[item]]
    style, feature = kind.styles.words[catalogue.style_word_I[item]], kind.features[catalogue.feature_I[item]]
    variant, series = kind.variants[catalogue.variant_I[item]], SERIES[catalogue.series_I[item]]
    fit = int(catalogue.fit_I[item])
    model = catalogue.fit_names[fit] if fit >= 0 else ""
    name = f"{model} {style} {kind.noun}" if kind.makes >= 0 else f"{brand} {series} {style} {material} {kind.noun}"
    title = f"{name}{f' for {model}' if kind.fits >= 0 else ''}, {feature}, {colour}, {variant}"
    openings = _TASTES if kind.department == "Food & drink" else _OPENINGS
    opening = openings[catalogue.series_I[item] % len(openings)]
    words = {
        "brand": brand,
        "series": series,
        "style": style,
        "material": material,
        "noun": kind.noun,
        "colour": colour,
        "Style": _capital(style),
    }
    parts = [_capital(opening.format(**words)), _capital(f"{material}, {feature}; size: {variant}.")]
    if kind.fits >= 0:
        parts.append(f"Fits the {model}.")
    parts += [sentence for tag, sentence in _SEASONS.items() if kind.tags.get(tag, 0) >= 0.9][:2]
    attributes = [f"{_colour_name(kind)}: {colour}", f"material: {material}", f"style: {style}", f"feature: {feature}", f"size: {variant}"]
    if model:
        attributes.append(f"{'model' if kind.makes >= 0 else 'fits'}: {model}")
    return Text(title, " ".join(parts), attributes)


def _colour_name(kind: ProductType) -> str:
    if kind.department == "Food & drink" or kind.aisle == "Pet food":
        return "flavour"
    return "scent" if "lavender" in kind.palette.words else "colour"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
