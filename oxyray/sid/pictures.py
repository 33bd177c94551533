"""Item pictures to what the item encoder reads: vectors of a frozen vision model (paper 4.2), or small pixels for an encoder trained here.

Any Hugging Face vision model works (CLIP's vision half, ViT, DINO, ConvNeXt): its patches are averaged over the four quarters of the
picture, with the mean of all before them, and kept by content as text vectors are. Weights are read as safetensors only and no code of a
model folder is run.

Legend: N items, S pixels a side, P patches, T tokens kept of a picture (1 + 4), G vision width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oxyray.config import ClusterConfig, FuseConfig, SidConfig
from oxyray.errors import ConfigError, DataError
from oxyray.progress import bar
from oxyray.sid.cache import VectorCache, content_keys
from oxyray.sid.encoder import encode, encoder_identity, item_texts
from oxyray.sid.fusion import ItemTokens
from oxyray.sid.given import given_vectors

Array = np.ndarray
TOKENS = 5


def item_tokens(items: pa.Table, fuse: FuseConfig, sid: SidConfig, cluster: ClusterConfig) -> ItemTokens:
    """What the item encoder reads of these items (canonical columns). Raises ConfigError where pictures are asked for and there is no
    column of them; as `encode`, `pixels`, `patches` and `given_vectors`."""
    text_IF = encode(item_texts(items), sid, cluster) if fuse.text else None
    given_IW = given_vectors(sid.given, items["item_id"].to_pylist()) if fuse.given and sid.given else None
    if fuse.pictures == "none":
        return ItemTokens(text_IF, given_IW=given_IW)
    if "image" not in items.column_names:
        raise ConfigError(f"fuse.pictures={fuse.pictures}: the items have no column `image`: set fuse.pictures=none")
    images = items["image"].to_pylist()
    small = fuse.pictures == "small"
    vision_I, seen_I = pixels(images, fuse.picture_size) if small else patches(images, fuse.pictures, sid.cache_dir)
    return ItemTokens(text_IF, vision_I, seen_I, given_IW)


def pixels(images: Sequence[bytes | None], size: int) -> tuple[Array, Array]:
    """Pictures (N, 3, S, S) uint8, zeros where there is none, and which items have one. Raises DataError on bytes that are no picture."""
    picture_N3SS = np.zeros((len(images), 3, size, size), dtype=np.uint8)
    seen_N = np.array([bool(image) for image in images])
    for row in np.flatnonzero(seen_N).tolist():
        opened = _opened(images[row] or b"", row).resize((size, size))
        picture_N3SS[row] = np.asarray(opened).transpose(2, 0, 1)
    return picture_N3SS, seen_N


def vision_folder(path: str) -> Path:
    """Raises ConfigError where there is no Hugging Face vision model."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"fuse.pictures={path}: no config.json and .safetensors weights there; give `none`, `small` or a vision model's folder"
        )
    return folder.resolve()


def patches(images: Sequence[bytes | None], path: str, cache_dir: str, batch: int = 32) -> tuple[Array, Array]:
    """Vectors (N, T, G) float32 of the pictures, zeros where there is none, and which items have one; from the cache where known. Raises
    ConfigError (no such model), DataError (bytes that are no picture)."""
    folder = vision_folder(path)
    model = VisionEncoder(folder)
    cache, keys_N2 = VectorCache(cache_dir, f"{encoder_identity(folder)}-pictures"), content_keys([image or b"" for image in images])
    flat_NF, known_N = cache.get(keys_N2, TOKENS * model.width)
    seen_N = np.array([bool(image) for image in images])
    todo = np.flatnonzero(seen_N & ~known_N)
    progress = bar(len(todo), "encoding pictures", "picture")
    for start in range(0, len(todo), batch):
        rows = todo[start : start + batch]
        flat_NF[rows] = model.encode([_opened(images[row] or b"", int(row)) for row in rows]).reshape(len(rows), -1)
        cache.put(keys_N2[rows], flat_NF[rows])
        progress.update(len(rows))
    progress.close()
    flat_NF[~seen_N] = 0
    return flat_NF.reshape(len(images), TOKENS, -1), seen_N


class VisionEncoder:
    """A loaded vision model: pictures in, (N, T, G) float32 out."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.prepare = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, use_fast=False)
            model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigError(f"fuse.pictures={folder}: not a vision model that can be read ({str(error).splitlines()[0]})") from error
        self.model = getattr(model, "vision_model", model).eval().to(self.device)
        size = self.model.config.hidden_size if hasattr(self.model.config, "hidden_size") else self.model.config.hidden_sizes[-1]
        self.width = int(size)

    def encode(self, pictures: Sequence[Any]) -> Array:
        import torch

        pixel = self.prepare(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            hidden = self.model(pixel_values=pixel).last_hidden_state
            if hidden.dim() == 4:  # convolutional: (N, G, side, side)
                hidden = hidden.flatten(2).transpose(1, 2)
            side = math.isqrt(hidden.shape[1])
            grid_NSSG = hidden[:, -side * side :].unflatten(1, (side, side))  # class and register tokens stand before the patches
            half = max(1, side // 2)
            quarters = [
                grid_NSSG[:, a, b].mean(dim=(1, 2))
                for a in (slice(None, half), slice(-half, None))
                for b in (slice(None, half), slice(-half, None))
            ]
            return torch.stack([hidden.mean(dim=1), *quarters], dim=1).float().cpu().numpy()


def _opened(image: bytes, row: int) -> Any:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture of item row {row} cannot be read ({error}): remove it, or mend the column `image`") from None
