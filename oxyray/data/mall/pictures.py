"""A small picture of each item: its shape by product type, its colour by the colour word, its pattern by the style word."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from oxyray.data.mall.catalogue import Catalogue

SIDE = 32


def render(catalogue: Catalogue, items: np.ndarray) -> list[bytes]:
    """PNG bytes of the given items."""
    pixels = np.full((len(items), SIDE, SIDE, 3), 245, np.uint8)
    for row, item in enumerate(items.tolist()):
        kind = catalogue.goods.types[catalogue.type_I[item]]
        pixels[row, 6:26, 6:26] = kind.palette.rgb_W3[catalogue.colour_I[item]]
    return [png(picture) for picture in pixels]


def png(pixels_HW3: np.ndarray) -> bytes:
    """An RGB picture (uint8) as PNG."""
    height, width, _ = pixels_HW3.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HW3.reshape(height, width * 3)], axis=1).tobytes()

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines, 6)) + part(b"IEND", b"")
