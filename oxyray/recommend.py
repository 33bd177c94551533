"""Recommendations for people and for code: `Recommender.load(run).recommend(user=..., scenario=...)`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from oxyray.config import ModelConfig
from oxyray.data.prepared import Prepared
from oxyray.data.requests import request_segments, timeline
from oxyray.errors import CatalogueError, DataError
from oxyray.files import read_json
from oxyray.generate.engine import Generator
from oxyray.model.inputs import Inputs
from oxyray.model.saved import model_folder, read_model
from oxyray.reward.opinion import opinions
from oxyray.run import Run
from oxyray.sid.encoder import TextEncoder, encoder_folder, encoder_identity

_SHOWN_HISTORY = 8
_CATEGORIES = ("category_1", "category_2", "category_3")


@dataclass(frozen=True)
class Shown:
    """One item as people see it. `score` is the log-probability of its SID, with what followers and the ranker add (None for history);
    `note` its action or category."""

    item_id: str
    title: str
    score: float | None
    note: str
    price: float | None


@dataclass(frozen=True)
class Recommendations:
    """What was recommended, best first, and the recent history it rests on, newest first. `str()` of it is a readable table."""

    user: str
    scenario: str
    trigger: Shown | None
    recent: list[Shown]
    items: list[Shown]
    milliseconds: float
    query: str | None = None

    def __str__(self) -> str:
        looking = f", looking at {self.trigger.item_id} {self.trigger.title}" if self.trigger else ""
        lines = [f"user {self.user} at {self.scenario}{looking}" + (f", typing {self.query!r}" if self.query else "")]
        lines += ["", "recently"] + ([_line("", shown) for shown in self.recent] or ["  nothing yet"])
        lines += ["", f"recommended ({self.milliseconds:.0f} ms)"]
        lines += [_line(f"{place}.", shown) for place, shown in enumerate(self.items, 1)]
        return "\n".join(lines)


def _line(place: str, shown: Shown) -> str:
    score = "" if shown.score is None else f"{shown.score:8.3f}  "
    title = shown.title if len(shown.title) <= 68 else shown.title[:67] + "…"
    price = "" if shown.price is None else f"{shown.price:9.2f}"
    return f"  {place:>3} {score}{shown.item_id:<12} {title:<68} {price}  {shown.note}".rstrip()


class Recommender:
    """A trained run, ready to answer. Loading reads the data, the catalogue and the exported model; answering needs torch alone."""

    def __init__(
        self, inputs: Inputs, generator: Generator, config: ModelConfig, encoder: str = "minilm", encoder_made: str | None = None
    ) -> None:
        self.inputs, self.generator, self._model = inputs, generator, config
        self._encoder_name, self._encoder_identity = encoder, encoder_made
        self._encoder: TextEncoder | None = None
        self.prepared: Prepared = inputs.prepared
        self._beams = generator.beams
        self._collate = inputs.collator(config)
        self._names = {name: place for place, name in enumerate(self.prepared.meta.scenarios)}

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu") -> Recommender:
        """From a run folder that `oxyray run` (or `prepare`, `sid`, `pretrain`, and `rank` where `generate.ranker` gives it a say) has
        filled. Raises RunError naming the stage that is missing."""
        place = Run(run)
        inputs = Inputs.load(place)
        policy, tables = read_model(model_folder(place), inputs, device)
        config = place.config()
        generate = config.generate
        beams = min(generate.beams, inputs.catalog.index.leaves)
        counts_I = inputs.prepared.train_counts_I()
        heard = opinions(config, place, inputs, device)
        generator = Generator(
            policy, tables.lookup, inputs.catalog.index, counts_I, beams, generate.normalise, heard, generate.graphs == "auto"
        )
        quality = place.path("sid", "quality.json")
        made_by = read_json(quality).get("encoder", {}).get("identity") if quality.exists() else None
        return cls(inputs, generator, policy.config, config.sid.encoder, made_by)

    def recommend(
        self,
        user: str | None,
        scenario: str | None = None,
        trigger: str | None = None,
        k: int = 10,
        include_seen: bool = True,
        at: int | None = None,
        query: str | None = None,
    ) -> Recommendations:
        """The best `k` items for a user in a scenario; fewer where the scenario's pool has no more.

        `user` None is a newcomer without history; `scenario` None is the user's last one (a newcomer's: the shop's first); `at` is the time
        of the request in the data's unit (None: just after the last event), and events after it are not known; `include_seen=False` leaves
        out items of the user's history; `query` is what the user typed.
        Raises DataError on an unknown user, scenario or trigger item and on a query that the model cannot read, GenerationError on an empty
        pool.
        """
        if k < 1:
            raise DataError(f"k must be at least 1, got {k}")
        encoder = self._reader() if query else None  # loaded with the first query; that time is not the request's
        began = time.perf_counter()
        index = -1 if user is None else self.prepared.user_index(user)
        past = self._past(index, at)
        place = self._scenario(scenario, past)
        line = timeline(self._ask(past, max(index, 0), place, -1 if trigger is None else self.prepared.item_index(trigger), at))
        asked = np.flatnonzero(line.request_E == line.request_E.max())
        batch = self._collate(line, request_segments(line, asked, self._model.history), targets=False)
        if index < 0:  # nobody's row and nobody's profile
            batch.user_B, batch.profile_BP = torch.full_like(batch.user_B, -1), torch.zeros_like(batch.profile_BP)
        if query and encoder is not None:
            batch.text_Q, batch.vector_WF = torch.zeros_like(batch.text_Q), torch.from_numpy(encoder.encode([query]))
        batch = batch.to(self.generator.policy.tree.device)
        name = self.prepared.meta.scenarios[place]
        seen = [past["item"]] if not include_seen else None
        self.generator.beams = min(max(self._beams, k), self.inputs.catalog.index.leaves)
        found = self.generator.generate(batch, k, self.generator.pool(name, self.prepared.pools[name]), seen)
        milliseconds = 1e3 * (time.perf_counter() - began)
        real = found.item_BR[0] >= 0
        items = [self._shown(int(i), float(s)) for i, s in zip(found.item_BR[0][real], found.score_BR[0][real], strict=True)]
        actions = self.prepared.meta.actions
        recent = [
            self._shown(int(past["item"][e]), None, actions[past["action"][e]])
            for e in range(len(past["item"]))[: -_SHOWN_HISTORY - 1 : -1]
        ]
        looking = None if trigger is None else self._shown(self.prepared.item_index(trigger), None)
        return Recommendations("(new)" if user is None else user, name, looking, recent, items, milliseconds, query)

    def _reader(self) -> TextEncoder:
        """What reads queries: the encoder that read the shop's. Raises DataError where the model reads none, CatalogueError where it is
        another one now."""
        policy = self.generator.policy
        if policy.instruction.no_text is None or (policy.instruction.carry is None and not policy.config.retrieval.top):
            raise DataError("this model reads no queries: its shop's events have none, or model.instruction leaves them out")
        if self._encoder is None:
            folder = encoder_folder(self._encoder_name)
            if self._encoder_identity not in (None, encoder_identity(folder)):
                raise CatalogueError(
                    f"{folder} is not the encoder that read the shop's queries: bring that back, or run `oxyray run force=true`"
                )
            self._encoder = TextEncoder(folder)
        return self._encoder

    def _past(self, user: int, at: int | None) -> dict[str, np.ndarray]:
        if user < 0:
            return {name: values[:0] for name, values in self.prepared.events(0).items()}
        past = self.prepared.user_events(user)
        return past if at is None else {name: values[past["time"] <= at] for name, values in past.items()}

    def _scenario(self, name: str | None, past: dict[str, np.ndarray]) -> int:
        if name is None:
            return int(past["scenario"][-1]) if len(past["scenario"]) else 0
        if name not in self._names:
            raise DataError(f"scenario {name!r} is unknown; this shop has {', '.join(self._names)}")
        return self._names[name]

    def _ask(self, past: dict[str, np.ndarray], user: int, scenario: int, trigger: int, at: int | None) -> dict[str, np.ndarray]:
        """The user's past with one more event behind it: the request (its item is never read)."""
        last = int(past["time"][-1]) if len(past["time"]) else 0
        new = {
            "user": user,
            "item": 0,
            "time": last + 1 if at is None else at,
            "action": 0,
            "scenario": scenario,
            "request": int(past["request"].max(initial=-1)) + 1,  # behind those of the log, which it sees
            "trigger": trigger,
            "split": 2,
        }
        return {name: np.append(past[name], value).astype(np.int64) for name, value in new.items()}

    def _shown(self, item: int, score: float | None, note: str = "") -> Shown:
        items = self.prepared.items
        wanted = ("item_id", "title", "price", *_CATEGORIES)
        row = {name: items[name][item].as_py() for name in wanted if name in items.column_names}
        categories = [str(row[name]) for name in _CATEGORIES if row.get(name)]
        return Shown(row["item_id"], row.get("title") or "", score, note or " > ".join(categories), row.get("price"))
