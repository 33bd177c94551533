"""One vector an item from its text and its picture (paper 2.2.2, 4.2): projections into one width, a Q-Former, an MLP.

A few learned queries read the item's tokens (its text's vector, its picture's patches, a vector of the shop's own) layer by layer. Queries
are refined, not begun anew: a layer's queries are the layer's own learned ones plus what the layer before made of its own (residual
initialisation). Text and picture encoders are frozen and their vectors come from a cache; small pictures may be read by a small
convolutional encoder, which is trained here.

What users typed is brought into the items' space by a projection of its own, so that a query and the item taken there can be a pair.

Legend: N items, T tokens of an item, Q queries, D inner width, F text width, G vision width,
W width of the shop's own vectors, J output width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from oxyray.config import FusionConfig, from_dict
from oxyray.errors import RunError
from oxyray.files import read_json, write_json

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class ItemTokens:
    """What the item encoder reads of every item: text vectors (I, F), patches (I, T, G) or pixels (I, 3, S, S), who has a picture, and the
    shop's own vectors (I, W); None where items have none. The arrays may be maps of files."""

    text_IF: np.ndarray | None = None
    vision_I: np.ndarray | None = None
    seen_I: np.ndarray | None = None
    given_IW: np.ndarray | None = None

    def __len__(self) -> int:
        return next(len(held) for held in vars(self).values() if held is not None)

    def take(self, rows_N: np.ndarray) -> Tokens:
        return Tokens(*(None if each is None else torch.from_numpy(np.ascontiguousarray(each[rows_N])) for each in vars(self).values()))


class Tokens(NamedTuple):
    """The same of some items, as tensors."""

    text_NF: Tensor | None = None
    vision_N: Tensor | None = None
    seen_N: Tensor | None = None
    given_NW: Tensor | None = None

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(*(None if each is None else each.to(device) for each in self))


class PictureEncoder(nn.Module):
    """Small pictures (N, 3, S, S) uint8 to (N, (S / 8)², D): three halvings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (3, width // 4, width // 2, width)
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(sizes))

    def forward(self, picture_N3SS: Tensor) -> Tensor:
        x = picture_N3SS.float() / 127.5 - 1
        for step in self.steps:
            x = F.gelu(step(x))
        return x.flatten(2).transpose(1, 2)


class QFormerLayer(nn.Module):
    """Queries look at one another, then at the item's tokens, then think."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        D = config.width
        self.query_QD = nn.Parameter(torch.randn(config.queries, D) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.own = nn.MultiheadAttention(D, config.heads, batch_first=True)
        self.across = nn.MultiheadAttention(D, config.heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, before_NQD: Tensor, token_NTD: Tensor, absent_NT: Tensor) -> Tensor:
        x = before_NQD + self.query_QD
        normed = self.norms[0](x)
        x = x + self.own(normed, normed, normed, need_weights=False)[0]
        x = x + self.across(self.norms[1](x), token_NTD, token_NTD, key_padding_mask=absent_NT, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class Fusion(nn.Module):
    """`text` and `vision` are the widths of the frozen encoders' vectors, `given` that of the shop's own; 0 where items have none.
    `picture`: pictures come as pixels."""

    def __init__(self, config: FusionConfig, text: int, vision: int, picture: bool, given: int = 0) -> None:
        super().__init__()
        D = config.width
        self.about = {"model": asdict(config), "text": text, "vision": vision, "picture": picture, "given": given}
        self.text = nn.Linear(text, D) if text else None
        self.vision = nn.Linear(vision, D) if vision else None
        self.picture = PictureEncoder(D) if picture else None
        self.kind = nn.Parameter(torch.randn(2, D) * 0.02)  # of text, of picture
        self.queries, self.layers = config.queries, nn.ModuleList(QFormerLayer(config) for _ in range(config.layers))
        read = config.queries * D if config.layers else D
        self.out = nn.Sequential(nn.LayerNorm(read), nn.Linear(read, D), nn.GELU(), nn.Linear(D, config.out))
        self.skip = nn.Linear(text, config.out, bias=False) if text else None
        self.given = nn.ModuleDict({"token": nn.Linear(given, D), "skip": nn.Linear(given, config.out, bias=False)}) if given else None
        self.query = nn.Sequential(nn.Linear(text, D), nn.GELU(), nn.Linear(D, config.out)) if text else None

    def forward(self, items: Tokens) -> Tensor:
        """(N, J), of length 1. `vision_N` are vectors of patches (N, T, G), or pixels (N, 3, S, S); `seen_N` says which items have a
        picture."""
        tokens, absent, direct = [], [], []
        if self.text is not None:
            assert items.text_NF is not None
            assert self.skip is not None
            tokens.append(self.text(items.text_NF)[:, None] + self.kind[0])
            direct.append(self.skip(items.text_NF))
        if self.given is not None:
            tokens.append(self.given["token"](items.given_NW)[:, None])
            direct.append(self.given["skip"](items.given_NW))
        absent += [torch.zeros(len(token), 1, dtype=torch.bool, device=token.device) for token in tokens]
        if self.vision is not None or self.picture is not None:
            assert items.seen_N is not None
            patch_NTD = self.vision(items.vision_N) if self.vision is not None else self.picture(items.vision_N)  # type: ignore[misc]
            tokens.append(patch_NTD.where(items.seen_N[:, None, None], 0) + self.kind[1])
            absent.append(~items.seen_N[:, None].expand(-1, patch_NTD.shape[1]))
        read_NJ = self.out(self._read(torch.cat(tokens, dim=1), torch.cat(absent, dim=1)))
        return F.normalize(sum(direct, start=read_NJ), dim=-1)

    def _read(self, token_NTD: Tensor, absent_NT: Tensor) -> Tensor:
        """What the queries made of the tokens, side by side; without layers the mean of the tokens that there are."""
        if not len(self.layers):
            there_NT1 = (~absent_NT)[..., None].to(token_NTD.dtype)
            return (token_NTD * there_NT1).sum(1) / there_NT1.sum(1).clamp(min=1)
        nobody_N = absent_NT.all(1)  # of an item with nothing known the queries still need something to look at: zeros
        x_NQD = token_NTD.new_zeros(len(token_NTD), self.queries, token_NTD.shape[2])
        for layer in self.layers:
            x_NQD = layer(x_NQD, token_NTD, absent_NT & ~nobody_N[:, None])
        return x_NQD.flatten(1)

    def asked(self, text_NF: Tensor) -> Tensor:
        """What was typed, in the items' space: (N, J), of length 1."""
        assert self.query is not None
        assert self.skip is not None
        return F.normalize(self.query(text_NF) + self.skip(text_NF), dim=-1)

    def save(self, folder: Path, weights: Mapping[str, Tensor], **about: Any) -> None:
        """Into an existing or a new folder: `fusion.safetensors`, `model.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / "fusion.safetensors")
        write_json(folder / "model.json", self.about | about)

    @classmethod
    def load(cls, folder: Path) -> Fusion:
        """In eval mode. Raises RunError when a file is missing or damaged."""
        about = read_json(folder / "model.json")
        widths = (about["text"], about["vision"], about["picture"], about.get("given", 0))
        made = cls(from_dict(FusionConfig, about["model"], "fuse.model."), *widths)
        try:
            made.load_state_dict(load_file(folder / "fusion.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RunError(f"{folder}/fusion.safetensors does not load ({str(error).splitlines()[0]}): run `oxyray fuse` again") from None
        return made.eval()

    @torch.no_grad()
    def vectors(self, items: ItemTokens, batch: int = 1024) -> np.ndarray:
        """Of all items: (N, J) float32."""
        device = next(self.parameters()).device
        parts = []
        for start in range(0, len(items), batch):
            some = items.take(np.arange(start, min(start + batch, len(items))))
            parts.append(self(some.to(device)).float().cpu().numpy())
        return np.concatenate(parts)
