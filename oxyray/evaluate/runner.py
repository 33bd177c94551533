"""The stage `evaluate`: every model answers the same test requests; `predictions.parquet` is written, and the table is recomputed from it.

A model is anything that `Recommends`. The policy's beams are resolved to items by the generator's tie-break (items of one SID: more
training events first, then the smaller item index).

Legend: R rows, S scenarios, I items.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.data.requests import request_segments
from oxyray.data.stream import Collator
from oxyray.errors import DataError, RunError
from oxyray.evaluate import sasrec_cache
from oxyray.evaluate.baselines import Lists, Recommends
from oxyray.evaluate.baselines.knn import Knn
from oxyray.evaluate.baselines.popularity import Popularity
from oxyray.evaluate.lists import PROTOCOLS, kept, legal, seen, sids
from oxyray.evaluate.optimum import best_possible, slate_values
from oxyray.evaluate.predictions import Writer, recompute
from oxyray.evaluate.requests import TEST, Requests, asked
from oxyray.evaluate.table import ALONE, published, shown_k, text
from oxyray.files import whole, write_json
from oxyray.generate.engine import Generator
from oxyray.generate.rerank import Opinion
from oxyray.model.inputs import Inputs, check_beams
from oxyray.model.saved import model_folder, read_model
from oxyray.progress import bar
from oxyray.reward.opinion import opinions
from oxyray.run import Run, versions

Array = np.ndarray

# Dense scores of one call hold at most this many numbers (128 MB of float32).
_SCORES_PER_CALL = 1 << 25


class PolicyRecommender:
    """The policy behind the generator: each request within the pool of its scenario, told all but the parts to `hide`."""

    def __init__(
        self,
        generator: Generator,
        collate: Collator,
        prepared: Prepared,
        history: int,
        device: str = "cpu",
        name: str = "policy",
        hide: Sequence[str] = (),
    ) -> None:
        self.name, self.hide = name, hide
        self.generator, self.collate, self.prepared, self.history, self.device = generator, collate, prepared, history, device

    @classmethod
    def load(
        cls, config: Config, inputs: Inputs, folder: Path, device: str, name: str = "policy", heard: Sequence[Opinion] = ()
    ) -> PolicyRecommender:
        """An exported model; the opinions `heard` have a say in the order of its items. Raises RunError naming the stage that is missing,
        ConfigError for too many beams."""
        check_beams(config, inputs)
        policy, tables = read_model(folder, inputs, device)
        counts_I = inputs.prepared.train_counts_I()
        settings = config.generate
        generator = Generator(
            policy, tables.lookup, inputs.catalog.index, counts_I, settings.beams, settings.normalise, heard, settings.graphs == "auto"
        )
        return cls(generator, inputs.collator(policy.config), inputs.prepared, policy.config.history, device, name, config.evaluate.hide)

    def recommend(self, requests: Requests, depth: int) -> Lists:
        segments = request_segments(requests.time, requests.row_R, self.history)
        batch = self.collate(requests.time, segments, targets=False).without(self.hide).to(self.device)
        found = self.generator.generate(batch, depth, self.generator.pools_of(requests.scenario_R, self.prepared.pools))
        return Lists(found.item_BR, found.score_BR)


def evaluate(config: Config, run: Run) -> None:
    """Read RUN/data, RUN/sid and the policy; write RUN/evaluate whole or not at all, and SASRec's weights to RUN/baselines for the next
    time. Where the policy was aligned, the supervised one that it started from stands beside it (`evaluate.before`); where somebody else
    has a say in the order (`generate.followers`, `generate.ranker`) the policy's beams alone do."""
    inputs = Inputs.load(run)
    check_beams(config, inputs)
    device = "cuda" if config.train.gpu == "auto" and torch.cuda.is_available() else "cpu"
    folders = {"policy": model_folder(run), ALONE: model_folder(run), "supervised": model_folder(run, aligned=False)}
    heard = opinions(config, run, inputs, device)
    names = ["policy"] + ([ALONE] if heard else [])
    names += ["supervised"] if config.evaluate.before and folders["policy"] != folders["supervised"] else []
    models: list[Recommends] = [
        PolicyRecommender.load(config, inputs, folders[name], device, name, () if name == ALONE else heard) for name in names
    ]
    models += baselines(config, run, inputs.prepared, device)
    with whole(run.path("evaluate")) as part:
        part.mkdir(parents=True)
        requests = list(asked(inputs.prepared, TEST, config.evaluate.max_requests, config.seed))
        results = measure(config, inputs, models, requests, part)
        results |= _truth(config, run, inputs.prepared, requests, part)
        write_json(part / "metrics.json", results)
    run.log("evaluate", {"seconds": results["seconds"]})
    for line in results["table"]:
        if line["scenario"] is None:
            run.log("evaluate", {key: line[key] for key in ("model", "protocol", "level", "requests")} | line["metrics"])
    print(text(results), flush=True)


def _truth(config: Config, run: Run, prepared: Prepared, requests: list[Requests], folder: Path) -> dict[str, Any]:
    """It only stands beside the results, so a shop of an older simulator costs what it tells and not the evaluation."""
    ks, path = config.evaluate.ks, folder / "predictions.parquet"
    try:
        return {
            "optimum": best_possible(run, prepared, requests, ks, config.seed),
            "value": slate_values(run, prepared, requests, path, shown_k(ks), config.seed),
        }
    except DataError as error:
        print(f"the best possible hit rate and the value of slates are left out: {error}", flush=True)
        return {"optimum": None, "value": None}


def baselines(config: Config, run: Run, prepared: Prepared, device: str = "cpu") -> list[Recommends]:
    """Those that `evaluate.baselines` names, in its order. SASRec is trained, or read back if data and settings are those it was
    trained with."""
    pool_SI = pools(prepared)
    popularity = Popularity(prepared, pool_SI)
    made: list[Recommends] = []
    for name in config.evaluate.baselines:
        if name == "popularity":
            made.append(popularity)
        elif name == "knn":
            made.append(Knn(prepared, popularity))
        else:
            made.append(sasrec_cache.get(config, run, prepared, pool_SI, popularity, device))
    return made


def pools(prepared: Prepared) -> Array:
    """bool (S, I): which items each scenario may show."""
    return np.stack([prepared.pools[name] for name in prepared.meta.scenarios])


def measure(config: Config, inputs: Inputs, models: list[Recommends], requests: list[Requests], folder: Path) -> dict[str, Any]:
    """Ask every model, write `folder/predictions.parquet`, recompute the results from it. The first model is compared with each
    other one."""
    prepared, catalog, settings = inputs.prepared, inputs.catalog, config.evaluate
    total = sum(map(len, requests))
    if not total:
        raise RunError(f"{prepared.folder} has no test events: give more data, or another data.split, and run `oxyray prepare` again")
    leaf_I = catalog.index.leaf_of(catalog.codes_IL)
    seconds: dict[str, float] = {}
    outside: dict[str, float] = {}
    path = folder / "predictions.parquet"
    with Writer(path, prepared) as writer:
        for model in models:
            began = time.monotonic()
            outside[model.name] = _ask(
                model, requests, total, writer, pools(prepared), leaf_I, max(settings.ks), _rows_per_call(config, model, prepared)
            )
            seconds[model.name] = round(time.monotonic() - began, 2)
    results = recompute(path, prepared, leaf_I, settings.ks, settings.bootstrap, config.seed)
    about = {
        "data": prepared.meta.name, "fingerprint": prepared.meta.fingerprint, "catalogue": catalog.version, "split": prepared.meta.split,
        "requests": total, "requests_in_split": prepared.meta.splits["test"], "seed": config.seed, "ks": list(settings.ks),
        "models": [model.name for model in models], "beams": config.generate.beams, "resamples": settings.bootstrap,
        "outside_pool": outside, "seconds": seconds, "versions": versions(),
    }  # fmt: skip
    return about | results | {"published": published(prepared.meta)}


def _ask(
    model: Recommends, requests: list[Requests], total: int, writer: Writer, pool_SI: Array, leaf_I: Array, k: int, rows_per_call: int
) -> float:
    """Write one model's lists for both protocols; gives the share of recommended places that held an item outside the pool (they
    are left out)."""
    outside = places = 0
    # Deep enough that k distinct SIDs remain when the whole history is left out, however many items share the fullest ones.
    deep = int(np.sort(np.bincount(leaf_I[leaf_I >= 0]))[::-1][:k].sum())
    with bar(total, f"{model.name} answers", "request") as progress:
        for part in requests:
            for rows in part.batches(rows_per_call):
                lists = model.recommend(rows, deep + int((rows.stop_R - rows.start_R).max()))
                legal_RD = legal(lists, rows, pool_SI)
                places, outside = places + int((lists.item_RK >= 0).sum()), outside + int((lists.item_RK >= 0).sum() - legal_RD.sum())
                for protocol in PROTOCOLS:
                    keep_RD = legal_RD if protocol == "all" else legal_RD & ~seen(lists, rows, len(leaf_I))
                    long = kept(lists, keep_RD, lists.item_RK.shape[1])
                    writer.add(model.name, protocol, rows, Lists(long.item_RK[:, :k], long.score_RK[:, :k]), sids(long.item_RK, leaf_I, k))
                progress.update(len(rows))
    return outside / max(places, 1)


def _rows_per_call(config: Config, model: Recommends, prepared: Prepared) -> int:
    if isinstance(model, PolicyRecommender):
        return config.generate.requests_per_batch
    return int(np.clip(_SCORES_PER_CALL // prepared.meta.items, 1, 512))
