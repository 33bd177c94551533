"""The policy, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oxyray.config.plain import need

ACTIONS = ("click", "cart", "purchase")
"""From weakest to strongest; an action's index is its strength."""


@dataclass(kw_only=True)
class InstructionConfig:
    """The composite instruction in the decoder's prompt (paper 2.3.2). Its scenario part is the scenario's ID and the clock, its trigger
    part the item that a request starts from and what the user typed.

    position: where it stands: right of BOS, left of BOS, replace it, add to it, none
    content: scenario or trigger alone, concatenated (a token each), fused (one token)
    text: let the trigger part hold what the user typed
    dropout: share of training requests whose text is hidden, so that a missing one costs little
    """

    position: Literal["right", "left", "replace", "add", "none"] = "right"
    content: Literal["fused", "concatenated", "scenario", "trigger"] = "fused"
    text: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        need(0 <= self.dropout < 1, ".dropout", f"must lie in [0, 1), got {self.dropout}")


@dataclass(kw_only=True)
class RetrievalConfig:
    """The space that requests and items share (paper 2.3.3): requests are drawn to the items that were taken (Q2I), and fetch what is
    like them from the user's older events (IGR).

    q2i: weight of the query-to-item loss; 0 turns it off
    temperature: of its softmax over the batch's items
    variance: weight of the hinge that keeps every dimension in use
    decorrelation: weight of the squared covariances between dimensions
    inner: inner size of the adapter
    history: events before the latest model.history ones that a request may fetch from
    top: how many of them it fetches; 0 turns IGR off
    """

    q2i: float = 0.0
    temperature: float = 0.07
    variance: float = 0.1
    decorrelation: float = 0.1
    inner: int = 32
    history: int = 500
    top: int = 0

    def __post_init__(self) -> None:
        for name in ("q2i", "variance", "decorrelation"):
            need(getattr(self, name) >= 0, f".{name}", f"must be 0 or more, got {getattr(self, name)}")
        need(self.temperature > 0, ".temperature", f"must be positive, got {self.temperature}")
        for name in ("inner", "history"):
            need(getattr(self, name) >= 1, f".{name}", f"must be at least 1, got {getattr(self, name)}")
        need(self.top >= 0, ".top", f"must be 0 (off) or more, got {self.top}")
        need(self.top == 0 or self.q2i > 0, ".top", "fetches by the space that the query-to-item loss makes: set .q2i above 0")


@dataclass(kw_only=True)
class MoEConfig:
    """A mixture of experts in place of each feed-forward part (paper Table 3); an expert has one hidden layer of `model.hidden`.

    experts: experts in each layer; 0: none, a dense feed-forward part
    active: experts that a token uses
    balance: how much the bias that evens the load moves in a step; 0 lets it be
    """

    experts: int = 0
    active: int = 2
    balance: float = 0.001

    def __post_init__(self) -> None:
        need(self.experts >= 0, ".experts", f"must be 0 (none) or more, got {self.experts}")
        most = self.experts or self.active
        need(1 <= self.active <= most, ".active", f"must lie between 1 and the {self.experts} experts, got {self.active}")
        need(self.balance >= 0, ".balance", f"must be 0 or more, got {self.balance}")


@dataclass(kw_only=True)
class ContextConfig:
    """What the layers of a lazy decoder look at (OneRec-V2): keys and values made once of the user's tokens, without an encoder.

    sets: sets of keys and values; the decoder's layers share them out among themselves
    groups: heads of each set; must divide model.heads. Several heads of a query look at one of them
    apart: keys and values are projections apart; else one is both
    """

    sets: int = 1
    groups: int = 1
    apart: bool = False

    def __post_init__(self) -> None:
        for name in ("sets", "groups"):
            need(getattr(self, name) >= 1, f".{name}", f"must be at least 1, got {getattr(self, name)}")


@dataclass(kw_only=True)
class ModelConfig:
    """The policy (paper 2.3.3): encoder over history and profile, decoder over `BOS, instruction, s1..sL`. With `backbone` lazy the decoder
    does all the work, and looks at what `context` makes of the user's tokens (OneRec-V2).

    `head` is what scores a code: `tied` scores a prefix's children with vectors tied to the items below them (needs every item's vector in
    each step: catalogues to some 200k items), `codes` has one output vector per level and code (any catalogue).

    backbone: encoder_decoder or lazy
    width: size of a token's vector
    heads: attention heads; must divide width
    encoder_layers: layers over history and profile; a lazy backbone has none
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
    repeats: learn how much more or less likely an item is that its user has had: by scenario, last action, how often, how long ago
    """

    backbone: Literal["encoder_decoder", "lazy"] = "encoder_decoder"
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
    repeats: bool = True
    instruction: InstructionConfig = field(default_factory=InstructionConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    context: ContextConfig = field(default_factory=ContextConfig)

    def __post_init__(self) -> None:
        for name in ("width", "heads", "encoder_layers", "decoder_layers", "hidden", "history", "row_dim"):
            need(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        pair = 2 * self.heads  # a head's size is even, for rotary positions
        mend = f"set model.width={max(1, round(self.width / pair)) * pair}"
        need(self.width % self.heads == 0, "model.heads", f"{self.heads} heads do not divide model.width={self.width}: {mend}")
        need(self.width % pair == 0, "model.heads", f"model.width={self.width} / {self.heads} heads is odd, and must be even: {mend}")
        if self.backbone == "lazy":
            need(
                self.heads % self.context.groups == 0,
                "model.context.groups",
                f"must divide model.heads={self.heads}, got {self.context.groups}",
            )
            most = self.decoder_layers
            need(self.context.sets <= most, "model.context.sets", f"model.decoder_layers={most} share them out, got {self.context.sets}")
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
    followers: weight in the final order of what other users took after the same items; 0: no say
    ranker: weight in the final order of the logarithm of the ranker's probability of a click; 0: no say. It needs the stage rank
    requests_per_batch: requests generated together
    graphs: auto captures searches as CUDA graphs where the policy is on a GPU
    """

    beams: int = 50
    normalise: Literal["children", "vocabulary"] = "children"
    followers: float = 0.0
    ranker: float = 0.0
    requests_per_batch: int = 256
    graphs: Literal["auto", "never"] = "auto"

    def __post_init__(self) -> None:
        need(self.beams >= 1, "generate.beams", f"must be at least 1, got {self.beams}")
        for name in ("followers", "ranker"):
            need(getattr(self, name) >= 0, f"generate.{name}", f"must be 0 (off) or more, got {getattr(self, name)}")
        need(self.requests_per_batch >= 1, "generate.requests_per_batch", f"must be at least 1, got {self.requests_per_batch}")
