"""What generation is compared with: Hugging Face T5's `generate`, and STATIC's algorithm; and T5's decoder as `Steps` for our search, so
that all of them run the same weights.

STATIC (Google, 2026; Sparse Transition-matrix-Accelerated Trie Index for Constrained decoding) is written here from its published
description: dense tables for the first two levels, then CSR rows read with the fixed branch factor of their level. Its decoder here is as
good as ours: encoder keys and values once a request.

Legend: B requests, K beams, S memory slots, H heads, E head width, D width, V codes, M = B*K states, L levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from oxyray.generate.score import Normalise
from oxyray.generate.steps import Outputs
from oxyray.model.decoder import BeamState
from oxyray.model.head import Tree, spread
from oxyray.model.layers import Tensor
from oxyray.sid.prefix import PrefixIndex

Model = Any  # T5ForConditionalGeneration, whose parts are typed too loosely to be used


def t5(codes: int, width: int = 256, layers: int = 4, heads: int = 8, seed: int = 0) -> Model:
    """Random weights; one vocabulary of `codes` codes for all levels, and the start token behind them."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(  # noqa: C408
        vocab_size=codes + 1,
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        initializer_factor=0.3,
        tie_word_embeddings=False,
        pad_token_id=codes,
        decoder_start_token_id=codes,
        eos_token_id=None,
    )
    return T5ForConditionalGeneration(T5Config(**settings)).eval()


class T5Steps:
    """T5's decoder for `beam_search` and `sample`: encoder keys and values and those of the start token once a request."""

    def __init__(self, model: Model, memory_BSD: Tensor, visible_BS: Tensor, tree: Tree) -> None:
        self.model, self.tree, self._place = model, tree, 0
        self._mask = visible_BS[:, None, None]
        self._bias = model.decoder.block[0].layer[0].SelfAttention.compute_bias(tree.levels + 1, tree.levels + 1)
        self._heads = model.config.num_heads
        self._states: list[BeamState] = []
        with torch.profiler.record_function("generate/start"):
            for block in model.decoder.block:
                attention = block.layer[1].EncDecAttention
                cross = self._split(attention.k(memory_BSD)), self._split(attention.v(memory_BSD))
                self._states.append(BeamState(cross, cross, []))
            start = torch.full((len(memory_BSD), 1), model.config.decoder_start_token_id, device=memory_BSD.device)
            self.feed(start, None)

    def outputs(self, level: int) -> Outputs:
        return Outputs(self.model.lm_head.weight, True)

    def advance(self, level: int, node_BK: Tensor, origin_BK: Tensor | None) -> None:
        self.feed(self.tree.code_of(level, node_BK), origin_BK)

    @torch.no_grad()
    def feed(self, code_BK: Tensor, origin_BK: Tensor | None) -> None:
        """One token for each beam."""
        x_BKD = self.model.shared(code_BK)
        bias = self._bias[:, :, self._place, None, : self._place + 1]
        for block, state in zip(self.model.decoder.block, self._states, strict=True):
            if origin_BK is not None:
                state.follow(origin_BK)
            attention, normed = block.layer[0].SelfAttention, block.layer[0].layer_norm(x_BKD)
            query, own = self._split(attention.q(normed)), (self._split(attention.k(normed)), self._split(attention.v(normed)))
            if self._place == 0:
                state.prompt = own
            else:
                state.own.append(own)
            logits = [query @ state.prompt[0].transpose(-1, -2), *((query * key).sum(-1, keepdim=True) for key, _ in state.own)]
            weight = torch.softmax(torch.cat(logits, dim=-1) + bias, dim=-1)
            mixed = weight[..., :1] * state.prompt[1]
            for place, (_, value) in enumerate(state.own, 1):
                mixed = torch.addcmul(mixed, weight[..., place, None], value)
            x_BKD = x_BKD + attention.o(mixed.transpose(1, 2).flatten(2))
            attention = block.layer[1].EncDecAttention
            query = self._split(attention.q(block.layer[1].layer_norm(x_BKD)))
            mixed = F.scaled_dot_product_attention(query, *state.cross, attn_mask=self._mask, scale=1.0)
            x_BKD = block.layer[2](x_BKD + attention.o(mixed.transpose(1, 2).flatten(2)))
        scale = self.model.model_dim**-0.5 if self.model.config.scale_decoder_outputs else 1.0
        self.hidden_BKD = self.model.decoder.final_layer_norm(x_BKD) * scale
        self._place += 1

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self._heads, -1)).transpose(1, 2)


class CsrMask(LogitsProcessor):
    """The vectorised prefix mask for `generate`: the node of each beam's prefix by binary search, its children by CSR rows."""

    def __init__(self, index: PrefixIndex, normalise: Normalise) -> None:
        self.tree, self.normalise, self.width, self.levels = Tree(index), normalise, index.width, index.levels
        self.key = [torch.from_numpy(p * index.width + c) for p, c in zip(index.parent, index.code, strict=True)]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        node_M = torch.zeros(len(input_ids), dtype=torch.long)
        first_M, count_M = node_M, torch.full_like(node_M, self.tree.nodes(0))
        for level in range(input_ids.shape[1] - 1):
            key_M = node_M * self.width + input_ids[:, level + 1]
            place_M = torch.searchsorted(self.key[level], key_M).clamp(max=len(self.key[level]) - 1)
            node_M = torch.where(self.key[level][place_M] == key_M, place_M, 0)  # an illegal prefix has score -inf already
            first_M, count_M = self.tree.children_of(level, node_M)
        state_P, child_P = spread(first_M, count_M)
        legal = torch.zeros_like(scores, dtype=torch.bool)
        legal[state_P, self.tree.code_of(input_ids.shape[1] - 1, child_P)] = True
        scores = scores.masked_fill(~legal, -torch.inf)
        return torch.log_softmax(scores, dim=-1) if self.normalise == "children" else scores


class PrefixFunction:
    """The mask as `generate`'s own `prefix_allowed_tokens_fn`: a table from each prefix to its legal codes, asked for every sequence."""

    def __init__(self, index: PrefixIndex) -> None:
        legal: dict[tuple[int, ...], set[int]] = {}
        for codes in index.codes_of(np.arange(index.leaves)).tolist():
            for level, code in enumerate(codes):
                legal.setdefault(tuple(codes[:level]), set()).add(code)
        self.levels = index.levels
        self.legal = {prefix: sorted(codes) for prefix, codes in legal.items()}

    def __call__(self, request: int, sequence_T: Tensor) -> list[int]:
        del request
        return self.legal[tuple(sequence_T[1:].tolist())]


def hugging_face(model: Model, memory_BSD: Tensor, visible_BS: Tensor, rule: CsrMask | PrefixFunction, beams: int) -> tuple[Tensor, Tensor]:
    """Codes (B, K, L) and scores (B, K) of `generate`'s beam search, held to the catalogue by the rule."""
    found = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=memory_BSD),
        attention_mask=visible_BS.long(),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=rule.levels,
        do_sample=False,
        length_penalty=0.0,
        early_stopping="never",
        eos_token_id=None,
        **_held(rule),
        return_dict_in_generate=True,
        output_scores=True,
    )
    shape = (len(memory_BSD), beams)
    return found.sequences[:, 1:].view(*shape, rule.levels), found.sequences_scores.view(*shape)


def hugging_face_draws(model: Model, memory_BSD: Tensor, visible_BS: Tensor, rule: CsrMask | PrefixFunction, samples: int) -> Tensor:
    """Codes (B, G, L) of `generate`'s sampling, each draw by itself, held to the catalogue by the rule."""
    found = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=memory_BSD),
        attention_mask=visible_BS.long(),
        num_return_sequences=samples,
        max_new_tokens=rule.levels,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        **_held(rule),
    )
    return found[:, 1:].view(len(memory_BSD), samples, rule.levels)


def _held(rule: CsrMask | PrefixFunction) -> dict[str, Any]:
    """The words by which `generate` is told of the rule."""
    return {"logits_processor": LogitsProcessorList([rule])} if isinstance(rule, CsrMask) else {"prefix_allowed_tokens_fn": rule}


class Static:
    """STATIC's index and search, probabilities over the whole vocabulary. It keeps the best `per_beam` codes of each beam on the second
    level; that many (its largest fan-out) lose nothing."""

    def __init__(self, index: PrefixIndex) -> None:
        width, fan_out = index.width, [np.diff(first.astype(np.int64)) for first in index.first_child]
        self.width, self.levels = width, index.levels
        self.branch = [int(fan.max()) for fan in fan_out]
        self.start_V = torch.zeros(width, dtype=torch.bool)
        self.start_V[torch.from_numpy(index.code[0].astype(np.int64))] = True
        root = index.code[0].astype(np.int64)[index.parent[1]]
        self.dense_VV = torch.zeros(width, width, dtype=torch.bool)
        self.state_VV = torch.zeros(width, width, dtype=torch.int32)
        second = index.code[1].astype(np.int64)
        self.dense_VV[root, second] = True
        self.state_VV[root, second] = torch.arange(len(second), dtype=torch.int32)
        self.row = [torch.from_numpy(first.astype(np.int32)) for first in index.first_child[1:]]
        self.edge = [
            torch.stack([torch.from_numpy(code.astype(np.int32)), torch.arange(len(code), dtype=torch.int32)], dim=1)
            for code in index.code[2:]
        ]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.start_V, self.dense_VV, self.state_VV, *self.row, *self.edge))

    @torch.no_grad()
    def search(self, steps: T5Steps, beams: int) -> tuple[Tensor, Tensor]:
        """Codes (B, K, L) and scores (B, K)."""
        weight = steps.outputs(0).vector_nD
        logprob_BV = torch.log_softmax(steps.hidden_BKD[:, 0] @ weight.T, dim=-1)[:, : self.width]
        score_BK, code_BK = logprob_BV.masked_fill(~self.start_V, -torch.inf).topk(min(beams, self.width), dim=1)
        codes_BKL, state_M, origin = code_BK[..., None], code_BK.flatten(), None
        for level in range(1, self.levels):
            steps.feed(code_BK, origin)
            requests, live = code_BK.shape
            logprob_MV = torch.log_softmax(steps.hidden_BKD.flatten(0, 1) @ weight.T, dim=-1)[:, : self.width]
            if level == 1:
                masked = torch.where(self.dense_VV[state_M], logprob_MV, -torch.inf)
                found_MC, code_MC = masked.topk(min(beams, self.branch[0]), dim=1)
                next_MC = self.state_VV[state_M[:, None], code_MC].long()
            else:
                first_M, last_M = (self.row[level - 2][state_M + more].long() for more in (0, 1))
                place_MC = first_M[:, None] + torch.arange(self.branch[level - 1])
                edge_MC = self.edge[level - 2][place_MC.clamp(max=len(self.edge[level - 2]) - 1)]
                code_MC, next_MC = edge_MC[..., 0].long(), edge_MC[..., 1].long()
                found_MC = torch.where(place_MC < last_M[:, None], logprob_MV.gather(1, code_MC), -torch.inf)
            branch = found_MC.shape[1]
            total = (score_BK[..., None] + found_MC.view(requests, live, branch)).flatten(1)
            score_BK, place_BK = total.topk(min(beams, total.shape[1]), dim=1)
            origin = place_BK // branch
            code_BK, state_M = code_MC.view(requests, -1).gather(1, place_BK), next_MC.view(requests, -1).gather(1, place_BK).flatten()
            codes_BKL = torch.cat([codes_BKL.gather(1, origin[..., None].expand(-1, -1, level)), code_BK[..., None]], dim=2)
        return codes_BKL, score_BK
