"""The policy: from a batch and its looked-up rows to losses, or to the state that beam search advances (paper 2.3).

It never looks a row up itself: `policy(batch, rows)` gets the rows of `batch.lookups()`, wherever the tables live. It knows the catalogue
only as the prefix index it is bound to.

Legend: B segments, N history events, Q queries, P queries a segment (padded), S memory slots, T decoder tokens, K beams, U items of the
batch, L levels, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from oxyray.config import ModelConfig
from oxyray.data.batch import Batch, pad_index
from oxyray.errors import CatalogueError
from oxyray.model.context import Context
from oxyray.model.decoder import BeamState, Decoder, Memory
from oxyray.model.encoder import Encoder
from oxyray.model.head import Head, Tree
from oxyray.model.instruction import Instruction, Told, segments_of
from oxyray.model.items import Clock, ItemEncoder, Vocab
from oxyray.model.layers import Dropout, RMSNorm, Tensor
from oxyray.model.likelihood import Legality, path_logprob
from oxyray.model.losses import Children, LossOut, distilled_roots, item_nll
from oxyray.model.repeats import Had, Repeats
from oxyray.model.retrieval import Adapter, most_like, q2i
from oxyray.sid.prefix import PrefixIndex

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Shelf:
    """Vectors of the items that a batch can point at, and the head's vectors by level."""

    item_UD: Tensor
    vectors: list[Tensor]


@dataclass
class Decoding:
    """A beam search in progress: what `Policy.advance` needs from step to step."""

    memory: Memory
    state_BD: Tensor
    states: list[BeamState]
    shelf: Shelf
    hidden_BKD: Tensor
    item_query_BD: Tensor
    had: Had | None

    def fork(self) -> Decoding:
        """Another one that goes on from here."""
        return replace(self, states=[replace(state, own=[*state.own]) for state in self.states])


class Policy(nn.Module):
    def __init__(self, config: ModelConfig, vocab: Vocab, index: PrefixIndex) -> None:
        super().__init__()
        if (index.levels, index.width) != (vocab.levels, vocab.width):
            raise CatalogueError(
                f"the model is built for SIDs of {vocab.levels} levels of {vocab.width} codes, "
                f"the catalogue has {index.levels} of {index.width}"
            )
        D = config.width
        self.config, self.vocab, self.tree = config, vocab, Tree(index)
        self.items = ItemEncoder(config, vocab)
        self.action, self.event_scenario = nn.Embedding(vocab.actions, D), nn.Embedding(vocab.scenarios, D)
        self.event_gap = nn.Embedding(Clock.GAPS, D) if vocab.clock else None
        self.profile = nn.ModuleList(nn.Embedding(size, D) for size in vocab.profile)
        self.user = nn.Linear(config.row_dim, D, bias=False) if config.user_table else None
        self.profile_base = nn.Parameter(torch.randn(D) * 0.05)  # not zero: normalising zeros blows the gradient up
        self.dropout = Dropout(config.dropout)
        self.input_norm = RMSNorm(D)
        self.encoder = Encoder(config) if config.backbone == "encoder_decoder" else None
        self.context = Context(config) if config.backbone == "lazy" else None
        self.decoder = Decoder(config)
        self.state = nn.Linear(D, D, bias=False)
        self.instruction = Instruction(config.instruction, vocab, D)
        apart = self.instruction.no_text is not None and self.items.text is None
        self.query_text = nn.Linear(vocab.query, D, bias=False) if apart else None
        self.adapter = Adapter(D, config.retrieval.inner) if config.retrieval.q2i else None
        self.level = nn.Parameter(torch.randn(vocab.levels, D) * 0.02)
        self.head = Head(D, vocab.levels, vocab.width, config.head == "tied")
        self.item_query = nn.Linear(D, D, bias=False)
        self.repeats = Repeats(vocab.scenarios, vocab.actions, vocab.levels) if config.repeats else None
        for table in (self.action, self.event_scenario, *self.profile, *([self.event_gap] if self.event_gap else [])):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.eye_(self.state.weight)

    def loss(self, batch: Batch, rows: Rows, together: bool = True, shelf: Shelf | None = None) -> LossOut:
        """Weighted next-token loss of every query's target, plus Q2I (paper Eq. 3) and the item-level softmax: sums over queries. In
        training, with `together`, Q2I compares with the items of all processes, so all must call."""
        shelf = shelf or self.shelf(batch, rows)
        item_UD, vectors, had = shelf.item_UD, shelf.vectors, self._had(batch)
        told = self._told(batch, item_UD)
        memory = self._memory(batch, rows, item_UD, told)
        codes_QL, item_Q = batch.items.codes_UL[batch.target_Q], batch.items.ids_U[batch.target_Q]
        prompt_QTD = self.instruction.prompt(told)
        tokens = [self._token(level, codes_QL[:, level])[:, None] for level in range(self.vocab.levels - 1)]
        x_QTD = self.dropout(torch.cat([prompt_QTD, *tokens], dim=1)) + self._start(batch, memory, told)[:, None]
        hidden_QTD = self.decoder(x_QTD, memory)[:, prompt_QTD.shape[1] - 1 :]
        prob_QU = None
        parts: dict[str, Tensor] = {}
        if self.config.item_loss:
            query_QD = self.item_query(hidden_QTD[:, 0])
            parts["item"], prob_QU = item_nll(query_QD, item_UD, batch.items.ids_U, batch.target_Q, batch.negative_N, self.vocab.items, had)
        if self.head.tied:
            parts |= self._tied_losses(hidden_QTD, vectors, item_Q, prob_QU if self.config.distill else None, had)
        else:
            parts["ntp"] = self._code_loss(hidden_QTD, codes_QL, item_Q, had)
        if self.adapter is not None:
            taken_QD = self.adapter(item_UD[batch.target_Q])
            parts["q2i"] = q2i(self._asked(told), taken_QD, item_Q, batch.weight_Q > 0, self.config.retrieval, self.training and together)
        scale = {"ntp": 1.0, "item": self.config.item_loss, "distill": self.config.distill, "q2i": self.config.retrieval.q2i}
        total_Q = torch.stack([scale[name] * part_Q for name, part_Q in parts.items()]).sum(0)
        return LossOut((total_Q * batch.weight_Q).sum(), {name: (part_Q * batch.weight_Q).sum().detach() for name, part_Q in parts.items()})

    forward = loss

    def _code_loss(self, hidden_QTD: Tensor, codes_QL: Tensor, item_Q: Tensor, had: Had | None) -> Tensor:
        """Next-token loss over each level's whole vocabulary: (Q,)."""
        nll_Q = hidden_QTD.new_zeros(len(hidden_QTD))
        for level, vector_VD in enumerate(self.head.own):
            logit_QV = hidden_QTD[:, level] @ vector_VD.T
            if had is not None:
                logit_QV = had.add_codes(level, self.tree, self.tree.path_IL[item_Q, max(level - 1, 0)], logit_QV)
            nll_Q = nll_Q + F.cross_entropy(logit_QV, codes_QL[:, level], reduction="none")
        return nll_Q

    def _tied_losses(
        self, hidden_QTD: Tensor, vectors: list[Tensor], item_Q: Tensor, prob_QU: Tensor | None, had: Had | None
    ) -> dict[str, Tensor]:
        """Next-token loss over each prefix's children and, given the item softmax's probabilities, the cross-entropy of those children to
        it."""
        path_QL = self.tree.path_IL[item_Q]
        logit_Qn = hidden_QTD[:, 0] @ vectors[0].T
        if had is not None:
            logit_Qn = had.add_all(0, logit_Qn)
        nll_Q = F.cross_entropy(logit_Qn, path_QL[:, 0], reduction="none")
        if prob_QU is not None:
            distilled_Q = distilled_roots(logit_Qn, prob_QU, self.tree.path_IL[:, 0])
        for level in range(1, self.vocab.levels):
            parent_Q = path_QL[:, level - 1]
            children = Children(level, hidden_QTD[:, level], vectors[level], *self.tree.children_of(level - 1, parent_Q), had)
            nll_Q = nll_Q + children.nll(path_QL[:, level])
            if prob_QU is not None:
                state_T, item_T = self.tree.items_below(level - 1, parent_Q)
                distilled_Q = distilled_Q + children.distilled(prob_QU, state_T, item_T, self.tree.path_IL[item_T, level])
        return {"ntp": nll_Q} if prob_QU is None else {"ntp": nll_Q, "distill": distilled_Q}

    def logprob(
        self,
        batch: Batch,
        rows: Rows,
        path_BGL: Tensor,
        legal: Legality | None = None,
        temperature: float = 1.0,
        shelf: Shelf | None = None,
    ) -> Tensor:
        """Log-probability of every token of given SIDs, each over its prefix's legal children at `temperature`: (B, G, L), with gradient,
        without dropout in the decoder.

        `batch` has one query a segment; `path_BGL` are nodes of the index, -1 for an absent candidate (0 in the result). What a request's
        candidates share (history, prompt, prefixes) is computed once. Raises GenerationError for a candidate that is not legal.
        """
        return path_logprob(self, self.start(batch, rows, shelf), path_BGL, legal, temperature)

    def shelf(self, batch: Batch, rows: Rows) -> Shelf:
        """The vectors of a batch's items. Where these are the whole catalogue (`batch.items.whole`), batches of the same weights and rows
        may share one."""
        item_UD = self.items(batch.items, rows["item"])
        return Shelf(item_UD, self.head.vectors(self.tree, item_UD))

    def start(self, batch: Batch, rows: Rows, shelf: Shelf | None = None) -> Decoding:
        """Encode requests (one query a segment) and run their prompt: `hidden_BKD` (K = 1) predicts the first code."""
        shelf = shelf or self.shelf(batch, rows)
        told = self._told(batch, shelf.item_UD)
        memory = self._memory(batch, rows, shelf.item_UD, told)
        state_BD, prompt_BTD = self._start(batch, memory, told), self.instruction.prompt(told)
        hidden_BD, states = self.decoder.start(prompt_BTD + state_BD[:, None], memory)
        return Decoding(memory, state_BD, states, shelf, hidden_BD[:, None], self.item_query(hidden_BD), self._had(batch))

    def advance(self, decoding: Decoding, level: int, node_BK: Tensor, origin_BK: Tensor | None) -> None:
        """Feed the chosen node of `level` to each beam; beams continue `origin_BK` of the step before (None: in the same order)."""
        x_BKD = self._token(level, self.tree.code(level)[node_BK]) + decoding.state_BD[:, None]
        decoding.hidden_BKD = self.decoder.advance(x_BKD, decoding.states, decoding.memory, origin_BK)

    def _had(self, batch: Batch) -> Had | None:
        return None if self.repeats is None else self.repeats(self.tree, batch)

    def _told(self, batch: Batch, item_UD: Tensor) -> Told:
        """Queries go through the same map as item texts, where there is one: the two start out in one space."""
        text, text_WD = self.items.text or self.query_text, None
        if text is not None and batch.vector_WF is not None:
            text_WD = text(batch.vector_WF.to(text.weight.dtype))
        return self.instruction.told(batch, item_UD, text_WD)

    def _token(self, level: int, code: Tensor) -> Tensor:
        return self.items.code[level](code) + self.level[level]

    def _asked(self, told: Told) -> Tensor:
        """Each query in the space that it shares with items: (Q, D)."""
        assert self.adapter is not None
        return self.adapter(told.scenario_QD + told.trigger_QD)

    def _memory(self, batch: Batch, rows: Rows, item_UD: Tensor, told: Told) -> Memory:
        index_BS, real_BS = pad_index(batch.history_offset)
        event_ND = item_UD[batch.item_N] + self.action(batch.action_N) + self.event_scenario(batch.scenario_N)
        if self.event_gap is not None:
            gap_N = torch.diff(batch.time_N, prepend=batch.time_N[:1])
            gap_N[batch.history_offset[:-1].clamp(max=max(len(gap_N) - 1, 0))[torch.diff(batch.history_offset) > 0]] = 0
            event_ND = event_ND + self.event_gap(Clock.gap_bucket(gap_N))
        profile_BD = self.profile_base.expand(batch.segments, -1)
        for column, table in enumerate(self.profile):
            profile_BD = profile_BD + table(batch.profile_BP[:, column])
        if self.user is not None:
            profile_BD = profile_BD + self.user(rows["user"])
        # Also where nobody has a history: every parameter takes part in every batch, else workers disagree on which gradients there are.
        x_BSD = torch.cat([profile_BD[:, None], event_ND[index_BS]], dim=1)
        real_BS = torch.cat([real_BS.new_ones(len(real_BS), 1), real_BS], dim=1)
        position_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(len(x_BSD), -1)
        memory_BSD = self.dropout(self.input_norm(x_BSD))
        if self.encoder is not None:
            memory_BSD = self.encoder(memory_BSD, position_BS, real_BS)
        query_BP, real_BP = pad_index(batch.query_offset)
        position_BP = batch.visible_Q[query_BP] + 1
        memory = Memory(memory_BSD, position_BS, query_BP, real_BP, position_BS[:, None] < position_BP[..., None], position_BP)
        if self.config.retrieval.top:  # also where nobody has older events: under ZeRO-3 every process makes the same calls
            self._retrieve(batch, item_UD, told, memory)
        if self.context is not None:
            memory.sets = self.context(memory.memory_BSD, memory.position_BS)
            if memory.own is not None:
                memory.own.sets = self.context(memory.own.memory_BPkD.flatten(1, 2), memory.own.position_BPk.flatten(1))
        return memory

    def _retrieve(self, batch: Batch, item_UD: Tensor, told: Told, memory: Memory) -> None:
        """Instruction-guided retrieval: each query also looks at the older events of its user that are most like it, before all others in
        time. What was fetched, and by which likeness, has no gradient."""
        assert self.adapter is not None
        with torch.no_grad():
            index_BO, real_BO = pad_index(batch.older_offset)
            used_V, place_O = torch.unique(batch.older_item_O, return_inverse=True)
            like_OD = self.adapter(item_UD[used_V])[place_O]
            seen_BP = batch.older_visible_Q[memory.query_BP]
            seen_BPO = (torch.arange(index_BO.shape[1], device=index_BO.device) < seen_BP[..., None]) & real_BO[:, None]
            best_BPk, found_BPk = most_like(self._asked(told)[memory.query_BP], like_OD[index_BO], seen_BPO, self.config.retrieval.top)
            event_OD = item_UD[batch.older_item_O] + self.action(batch.older_action_O) + self.event_scenario(batch.older_scenario_O)
            event_Bx = index_BO.gather(1, best_BPk.flatten(1))
            fetched_BPkD = self.input_norm(event_OD[event_Bx]).unflatten(1, best_BPk.shape[1:])
        memory.fetch(fetched_BPkD, found_BPk)

    def _start(self, batch: Batch, memory: Memory, told: Told) -> Tensor:
        """What every decoder token starts from: where the history stands (the memory of the last event that the query sees), and the
        trigger. So what follows what is learned without a detour through attention: (Q, D).
        """
        return self.state(memory.memory_BSD[segments_of(batch), batch.visible_Q]) + self.instruction.carried(told)
