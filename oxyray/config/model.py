"""The policy, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oxyray.config.plain import need

ACTIONS = ("click", "cart", "purchase")
"""From weakest to strongest; an action's index is its strength."""


@dataclass(kw_only=True)
class ModelConfig:
    """The policy (paper 2.3.3): encoder over history and profile, decoder over `BOS, instruction, s1..sL`.

    `head` is what scores a code: `tied` scores a prefix's children with vectors tied to the items below them (needs every item's vector in
    each step: catalogues to some 200k items), `codes` has one output vector per level and code (any catalogue).

    width: size of a token's vector
    heads: attention heads; must divide width
    encoder_layers: layers over history and profile
    decoder_layers: layers over the generated codes
    hidden: inner size of the feed-forward part
    dropout: share of activations dropped in training
    history: latest events of a user that the encoder sees
    row_dim: size of a row in the item and user tables; a multiple of 4
    user_table: give every user a learned row
    causal_encoder: encode a user's history once for all its training positions
    head: what scores a code: tied or codes
    text_input: give the encoder the items' text vectors
    item_loss: weight of the auxiliary item-level loss; 0 turns it off
    item_negatives: items drawn from the catalogue as negatives of the item-level loss; 0: all of them (tied head)
    distill: weight of the codes' cross-entropy to the item-level softmax (tied head, item_negatives=0); 0 turns it off
    """

    width: int = 64
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    hidden: int = 128
    dropout: float = 0.1
    history: int = 50
    row_dim: int = 64
    user_table: bool = True
    causal_encoder: bool = True
    head: Literal["tied", "codes"] = "tied"
    text_input: bool = True
    item_loss: float = 0.5
    item_negatives: int = 2048
    distill: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "heads", "encoder_layers", "decoder_layers", "hidden", "history", "row_dim"):
            need(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        pair = 2 * self.heads  # a head's size is even, for rotary positions
        mend = f"set model.width={max(1, round(self.width / pair)) * pair}"
        need(self.width % self.heads == 0, "model.heads", f"{self.heads} heads do not divide model.width={self.width}: {mend}")
        need(self.width % pair == 0, "model.heads", f"model.width={self.width} / {self.heads} heads is odd, and must be even: {mend}")
        need(self.row_dim % 4 == 0, "model.row_dim", f"must be a multiple of 4 (an embedding kernel's rule), got {self.row_dim}")
        need(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), got {self.dropout}")
        need(self.item_loss >= 0, "model.item_loss", f"must be 0 or more, got {self.item_loss}")
        drawn = self.head == "tied" or self.item_loss == 0 or self.item_negatives > 0
        need(drawn, "model.item_negatives", "0 compares with the whole catalogue, which model.head=codes does not hold: set it to 2048")
        need(self.distill >= 0, "model.distill", f"must be 0 or more, got {self.distill}")
        possible = self.head == "tied" and self.item_loss > 0 and self.item_negatives == 0
        need(
            self.distill == 0 or possible,
            "model.distill",
            "learns from the whole item softmax: set model.head=tied, model.item_loss above 0 and model.item_negatives=0",
        )


@dataclass(kw_only=True)
class GenerateConfig:
    """Beam search over the prefix index. `normalise` says over what a code's probability sums to one.

    beams: candidates kept a level; the most items that a request can get
    normalise: children: over the codes that lead to an item; vocabulary: over all codes of the level
    requests_per_batch: requests generated together
    """

    beams: int = 50
    normalise: Literal["children", "vocabulary"] = "children"
    requests_per_batch: int = 256

    def __post_init__(self) -> None:
        need(self.beams >= 1, "generate.beams", f"must be at least 1, got {self.beams}")
        need(self.requests_per_batch >= 1, "generate.requests_per_batch", f"must be at least 1, got {self.requests_per_batch}")
