"""A small PNG of each item: shape by product type, colour by the colour word, pattern by the style word, a mark in the brand's colour.

Shapes are drawn once (`shapes.txt`, by Pillow, enlarged); an item's picture is its shape's layers times its colours, so a million
pictures are matrix products. Legend: N items, P pixels of a picture, L layers.
"""

from __future__ import annotations

import colorsys
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from oxyray.data.mall.catalogue import Catalogue
from oxyray.data.mall.goods import AXES

SIDE = 32
_LAYERS = "NBSLAKWFG"
_GRID, _ENLARGE = 64, 2
PATTERNS = ("plain", "stripes", "dots", "check", "slant", "grain", "shine")


def render(catalogue: Catalogue, items: np.ndarray) -> list[bytes]:
    """PNG bytes of the given item numbers, in their order."""
    return [png(picture) for picture in pixels(catalogue, items)]


def pixels(catalogue: Catalogue, items: np.ndarray) -> np.ndarray:
    """uint8 (N, SIDE, SIDE, 3)."""
    kind_N = catalogue.type_I[items]
    colours_NL3 = _colours(catalogue, items)
    out_N = np.zeros((len(items), SIDE, SIDE, 3), np.uint8)
    pattern_N = pattern_of(catalogue, items)
    # A step aside by one pixel and a breath of light, fixed per item: no two photographs are quite alike.
    shift_N = catalogue.public_I[items] % 9
    light_N = 1 + 0.05 * ((catalogue.public_I[items] // 9 % 5) - 2) / 2
    for key in np.unique(kind_N * len(PATTERNS) + pattern_N).tolist():
        kind, pattern = divmod(key, len(PATTERNS))
        here = np.flatnonzero((kind_N == kind) & (pattern_N == pattern))
        share_PL = _shape(catalogue.goods.types[kind].shape, pattern)
        colours_LX = (colours_NL3[here] * light_N[here, None, None]).transpose(1, 0, 2).reshape(len(_LAYERS) + 1, -1)
        painted_PN3 = (share_PL @ colours_LX).reshape(-1, len(here), 3)
        out_N[here] = np.clip(np.round(painted_PN3), 0, 255).astype(np.uint8).transpose(1, 0, 2).reshape(-1, SIDE, SIDE, 3)
    for shift in range(9):
        moved = shift_N == shift
        out_N[moved] = np.roll(out_N[moved], (shift // 3 - 1, shift % 3 - 1), axis=(1, 2))
    return out_N


def pattern_of(catalogue: Catalogue, items: np.ndarray) -> np.ndarray:
    """Pattern (index into PATTERNS) of each item: what its style word leans to most."""
    lean = {"bold": 2, "cute": 2, "classic": 3, "sporty": 4, "natural": 5, "luxe": 6, "warm": 1}
    tables = []
    for kind in catalogue.goods.types:
        best_W = kind.styles.style_WA.argmax(1)
        strong_W = kind.styles.style_WA.max(1) >= 0.5
        tables.append([lean.get(AXES[axis], 0) if strong else 0 for axis, strong in zip(best_W, strong_W, strict=True)])
    width = max(map(len, tables))
    table_FW = np.array([row + [0] * (width - len(row)) for row in tables])
    return table_FW[catalogue.type_I[items], catalogue.style_word_I[items]]


def _colours(catalogue: Catalogue, items: np.ndarray) -> np.ndarray:
    """(N, L + 1, 3): background, the other layers, and the pattern's second colour."""
    kind_N = catalogue.type_I[items]
    body_N3 = np.zeros((len(items), 3))
    for kind in np.unique(kind_N).tolist():
        here = kind_N == kind
        body_N3[here] = catalogue.goods.types[kind].palette.rgb_W3[catalogue.colour_I[items[here]]]
    department_N = catalogue.goods.codes("department")[kind_N]
    tint_D3 = (
        np.array([colorsys.hsv_to_rgb(d / (department_N.max(initial=0) + 1), 0.10, 0.97) for d in range(department_N.max(initial=0) + 1)])
        * 255
    )
    accent_M3 = np.array([colorsys.hsv_to_rgb(m * 0.618 % 1, 0.85, 0.85) for m in range(len(catalogue.brand_names))]) * 255
    dark_N1 = body_N3.mean(1, keepdims=True) < 90
    layers = [
        tint_D3[department_N],
        body_N3,
        np.where(dark_N1, body_N3 * 0.5 + 62, body_N3 * 0.68),
        body_N3 * 0.4 + 153,
        accent_M3[catalogue.brand_I[items]],
        np.full_like(body_N3, 52),
        np.full_like(body_N3, 252),
        np.broadcast_to([245.0, 140, 30], body_N3.shape),
        np.broadcast_to([70.0, 160, 70], body_N3.shape),
        np.where(dark_N1, body_N3 * 0.75 + 60, body_N3 * 0.82),
    ]
    return np.stack(layers, axis=1)


@cache
def _shapes() -> dict[str, list[tuple[str, str, list[float]]]]:
    shapes = {}
    for line in (Path(__file__).parent / "shapes.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, strokes = line.split(":")
            parts = [stroke.split() for stroke in strokes.split(";")]
            shapes[name] = [(layer, kind, [float(number) for number in numbers]) for layer, kind, *numbers in parts]
    return shapes


@cache
def _shape(name: str, pattern: int) -> np.ndarray:
    """(P, L + 1): the share of each pixel that shows each layer, and the pattern's second colour. Rows sum to 1."""
    size = _GRID * _ENLARGE
    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    for layer, kind, numbers in _shapes()[name]:
        value, at = _LAYERS.index(layer), [number * _ENLARGE for number in numbers]
        if kind == "r":
            draw.rounded_rectangle(at[:4], radius=at[4], fill=value)
        elif kind == "e":
            draw.ellipse(at, fill=value)
        elif kind == "p":
            draw.polygon(at, fill=value)
        else:
            draw.line(at[:4], fill=value, width=int(at[4]))
    labels = np.asarray(image).copy()
    labels[(labels == _LAYERS.index("B")) & _pattern(pattern, size)] = len(_LAYERS)
    step, layers = size // SIDE, len(_LAYERS) + 1
    pixel = np.arange(SIDE * SIDE).reshape(SIDE, SIDE).repeat(step, 0).repeat(step, 1)
    return np.bincount((pixel * layers + labels).ravel(), minlength=SIDE * SIDE * layers).reshape(-1, layers) / step**2


@cache
def _pattern(pattern: int, size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] * 64 / size
    plain = np.zeros((size, size), bool)
    return {
        "plain": plain,
        "stripes": y % 10 < 4,
        "dots": ((x % 10 - 5) ** 2 + (y % 10 - 5) ** 2) < 7,
        "check": (x % 12 < 6) ^ (y % 12 < 6),
        "slant": (x + y) % 14 < 4,
        "grain": (y + 2 * np.sin(x / 5)) % 7 < 2,
        "shine": (x - y) % 64 > 40,
    }[PATTERNS[pattern]]


def png(pixels_HW3: np.ndarray) -> bytes:
    """An RGB picture (uint8) as PNG."""
    height, width, _ = pixels_HW3.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HW3.reshape(height, width * 3)], axis=1).tobytes()

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines, 6)) + part(b"IEND", b"")
