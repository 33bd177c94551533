"""Floating-point operations of the policy's loss, counted from the configuration and a batch: what MFU is measured by.

A multiplication and its addition are two. Counted is what the mathematics needs: of a mixture the active experts, of attention the pairs
that the mask lets through, of padding nothing. Element-wise work (norms, softmax, activations) is left out, as is customary. Training takes
three times the forward pass; what is computed again to save memory earns no credit.

Legend: N history events, Q queries, S memory slots, L levels, D width.
"""

from __future__ import annotations

import torch

from oxyray.data.batch import Batch
from oxyray.model.policy import Policy

# Dense bf16 peak of one device (operations a second), by a word of its name.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


def training_flops(policy: Policy, batch: Batch) -> float:
    """Of one forward and backward pass over a batch with targets."""
    return 3 * sum(forward_flops(policy, batch).values())


def forward_flops(policy: Policy, batch: Batch) -> dict[str, float]:
    """By part of the policy: items, encoder, decoder, head, losses."""
    config, vocab, D = policy.config, policy.vocab, policy.config.width
    items, queries, levels = len(batch.items.ids_U), batch.queries, vocab.levels
    length_B = torch.diff(batch.history_offset).double() + 1  # the profile is a token too
    tokens = float(length_B.sum())
    item = (config.row_dim * D if config.row_dim != D else 0) + (vocab.text * D if policy.items.text is not None else 0)
    texts = 0 if batch.vector_WF is None else len(batch.vector_WF) * vocab.query * D
    user = batch.segments * config.row_dim * D if policy.user is not None else 0
    pairs = float((length_B * (length_B + 1) / 2 if config.causal_encoder else length_B.square()).sum())
    encoder = config.encoder_layers * (tokens * (4 * D * D + _feed(policy)) + 2 * D * pairs) if policy.encoder is not None else 0.0

    prompt = {"none": 0, "replace": -1, "add": 0}.get(config.instruction.position, 0)
    if config.instruction.position in ("right", "left", "replace"):
        prompt += 2 if config.instruction.content == "concatenated" else 1
    steps = 1 + prompt + levels - 1
    fetched_Q = batch.older_visible_Q.clamp(max=config.retrieval.top).double()
    seen = float((batch.visible_Q + 1).sum() + fetched_Q.sum())
    slots = tokens + float(fetched_Q.sum())
    layer = queries * steps * (6 * D * D + _feed(policy)) + (slots * 2 * D * D if policy.context is None else 0)
    layer += 2 * D * (queries * steps * (steps + 1) / 2 + steps * seen)
    fuse = 3 * D * D if policy.instruction.fuse is not None and config.instruction.position != "none" else 0
    start = queries * (D * D + (D * D if policy.instruction.carry is not None else 0) + fuse)
    decoder = start + config.decoder_layers * layer + (slots * policy.context.to_sets.weight.numel() if policy.context is not None else 0)

    if policy.head.tied:
        path_QL = policy.tree.path_IL[batch.items.ids_U[batch.target_Q]]
        scored = queries * policy.tree.nodes(0)
        scored += sum(int(policy.tree.children_of(level - 1, path_QL[:, level - 1])[1].sum()) for level in range(1, levels))
    else:
        scored = queries * levels * vocab.width
    losses = 0.0
    if config.item_loss:
        against = items if batch.negative_N is None else len(batch.negative_N) + 1
        losses += queries * (D * D + against * D)
    if policy.adapter is not None:
        older = len(torch.unique(batch.older_item_O)) if config.retrieval.top else 0
        losses += (2 * queries + older) * 2 * D * config.retrieval.inner + queries * queries * D + 2 * queries * D * D
    parts = {"items": items * item + texts + user, "encoder": encoder, "decoder": decoder, "head": scored * D, "losses": losses}
    return {name: 2.0 * value for name, value in parts.items()}


def _feed(policy: Policy) -> int:
    """Multiplications of one token in one feed-forward part."""
    config = policy.config
    if not config.moe.experts:
        return 3 * config.width * config.hidden
    return config.moe.active * 2 * config.width * config.hidden + config.moe.experts * config.width


def peak(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in bf16; None where it is not known, or something else is asked of it."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for word, value in PEAKS.items() if word in name), None)
