"""The stage `sid`: prepared items to semantic IDs. Reads RUN/data, writes RUN/sid whole or not at all.

RUN/sid holds `vectors.npy` (the text vectors, also the model's text input), `catalog/`, `codebook.npz` and `joiner.npz` (with which new
items get their codes), `quality.json` and, where the shop's users type, `queries/` (their texts as vectors). Only training events shape
behaviour vectors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.errors import CatalogueError
from oxyray.files import read_json, whole, write_json
from oxyray.run import Run
from oxyray.sid import rqkmeans
from oxyray.sid.behaviour import Joiner, behaviour_vectors
from oxyray.sid.catalog import Catalog
from oxyray.sid.collisions import told_apart
from oxyray.sid.encoder import TEXT_COLUMNS, encode, encoder_folder, encoder_identity, item_texts
from oxyray.sid.quality import quality, table
from oxyray.sid.queries import QueryVectors, distinct_queries, exposures_file

Array = np.ndarray


def sid(config: Config, run: Run) -> None:
    """Encode, quantise, check, write; prints the quality table. Raises CatalogueError where the items are too few for `sid.width`."""
    prepared = Prepared.load(run.need("data", stage="prepare"))
    settings, items = config.sid, prepared.item_columns("item_id", *TEXT_COLUMNS)
    if items.num_rows < settings.width:
        raise CatalogueError(
            f"{items.num_rows} items are fewer than the {settings.width} codes of a level: "
            f"set sid.width={rqkmeans.power_below(items.num_rows)} or lower"
        )
    seconds, clock = {}, time.monotonic()
    asked_W = distinct_queries(prepared, exposures_file(config, run, prepared))
    vector_NF = encode([*item_texts(items), *asked_W.to_pylist()], settings, config.cluster)
    text_IF, queries = vector_NF[: items.num_rows], QueryVectors(asked_W, vector_NF[items.num_rows :])
    seconds["encode"], clock = time.monotonic() - clock, time.monotonic()
    behaviour_ID = None
    if settings.vectors == "text_behaviour":
        behaviour_ID = behaviour_vectors(training_events(prepared), items.num_rows, settings.behaviour_dim, settings.seed)
        seconds["behaviour"], clock = time.monotonic() - clock, time.monotonic()
    joiner = Joiner.fit(text_IF, behaviour_ID, settings.behaviour_weight, settings.pca_dim)
    vectors_IJ = joiner.apply(text_IF, behaviour_ID)
    fit = rqkmeans.fit(vectors_IJ, levels=settings.levels, width=settings.width, iterations=settings.iterations, seed=settings.seed)
    codes_NL = fit.codes_NL
    if settings.collisions == "reassign":
        codes_NL = told_apart(codes_NL, vectors_IJ, fit.codebook, settings.collision_limit)
    seconds["quantise"] = time.monotonic() - clock
    catalog = Catalog.of(items.column("item_id").to_pylist(), codes_NL, settings.width)
    figures = quality(codes_NL, settings.width, _categories(items)) | {
        "unused": list(fit.unused_L),
        "left": list(fit.left_L),
        "duplicates": fit.duplicates,
        "moved": int((codes_NL != fit.codes_NL).any(axis=1).sum()),
        "version": catalog.version,
        "encoder": {"name": settings.encoder, "identity": encoder_identity(encoder_folder(settings.encoder))},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    with whole(run.path("sid")) as part:
        part.mkdir(parents=True)
        np.save(part / "vectors.npy", text_IF)
        catalog.save(part / "catalog")
        fit.codebook.save(part / "codebook.npz")
        joiner.save(part / "joiner.npz")
        write_json(part / "quality.json", figures)
        if len(asked_W):
            queries.save(part / "queries")
    run.log(
        "sid",
        {
            "version": catalog.version,
            "distinct": figures["distinct"],
            "sharing": figures["collision"]["sharing"],
            "seconds": figures["seconds"],
        },
    )
    print(table(figures), flush=True)


def code_new_items(config: Config, run: Run, items: pa.Table) -> Catalog:
    """The run's catalogue with new items appended, coded by its own codebook; saves nothing.

    `items`: canonical columns, as in `items.parquet`. Raises CatalogueError when the encoder is not the one the codebook was made with, or
    an item is in already."""
    folder = run.need("sid", stage="sid")
    made_with, now = read_json(folder / "quality.json")["encoder"]["identity"], encoder_identity(encoder_folder(config.sid.encoder))
    if made_with != now:
        raise CatalogueError(f"{folder} was made with encoder {made_with}, sid.encoder={config.sid.encoder} is {now}: set the same encoder")
    vectors_NJ = Joiner.load(folder / "joiner.npz").apply(encode(item_texts(items), config.sid, config.cluster))
    codebook, catalog = rqkmeans.RQKMeans.load(folder / "codebook.npz"), Catalog.load(folder / "catalog")
    codes_NL = codebook.assign(vectors_NJ)
    if config.sid.collisions == "reassign":
        codes_NL = told_apart(codes_NL, vectors_NJ, codebook, config.sid.collision_limit, catalog.codes_IL)
    return catalog.append(items.column("item_id").to_pylist(), codes_NL)


def training_events(prepared: Prepared) -> Iterator[tuple[Array, Array]]:
    """`(user_N, item_N)` of the training events, part by part, each sorted by user and time."""
    for part in range(prepared.parts):
        rows = prepared.events(part, ["user", "item", "split"])
        train = rows["split"] == 0
        yield rows["user"][train], rows["item"][train]


def _categories(items: pa.Table) -> dict[str, list[Any]]:
    return {name: items.column(name).to_pylist() for name in ("category_1", "category_2", "category_3") if name in items.column_names}
