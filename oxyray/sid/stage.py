"""The stage `sid`: prepared items to semantic IDs. Reads RUN/data, writes RUN/sid whole or not at all.

RUN/sid holds `vectors.npy` (the text vectors, the model's text input), `catalog/`, `codebook.npz` and `joiner.npz` (with which new
items get their codes), `quality.json` and, where the shop's users type, `queries/` (their texts as vectors). Only training events shape
behaviour vectors."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.errors import CatalogueError, RunError
from oxyray.files import whole, write_json
from oxyray.run import Run
from oxyray.sid import rqkmeans
from oxyray.sid.behaviour import Joiner, behaviour_vectors
from oxyray.sid.catalog import Catalog
from oxyray.sid.encoder import TEXT_COLUMNS, encode, encoder_folder, encoder_identity, item_texts
from oxyray.sid.given import given_vectors
from oxyray.sid.pairs import training_events
from oxyray.sid.quality import quality, table
from oxyray.sid.queries import QueryVectors, distinct_queries
from oxyray.sid.tokenizer import errors_at_fit, settled

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
    asked_W = distinct_queries(prepared)
    vector_NF = encode([*item_texts(items), *asked_W.to_pylist()], settings, config.cluster)
    text_IF, queries = vector_NF[: items.num_rows], QueryVectors(asked_W, vector_NF[items.num_rows :])
    seconds["encode"], clock = time.monotonic() - clock, time.monotonic()
    behaviour_ID = None
    if settings.vectors == "text_behaviour":
        behaviour_ID = behaviour_vectors(training_events(prepared), items.num_rows, settings.behaviour_dim, settings.seed)
        seconds["behaviour"], clock = time.monotonic() - clock, time.monotonic()
    content_IF = text_IF
    if settings.vectors == "given" and settings.given:
        content_IF = given_vectors(settings.given, items.column("item_id").to_pylist())
    elif settings.vectors == "fused":
        content_IF = fused_vectors(run, items.num_rows)
    joiner = Joiner.fit(content_IF, behaviour_ID, settings.behaviour_weight, settings.pca_dim)
    vectors_IJ = joiner.apply(content_IF, behaviour_ID)
    fit = rqkmeans.fit(
        vectors_IJ,
        levels=settings.levels,
        width=settings.width,
        iterations=settings.iterations,
        seed=settings.seed,
        balance=settings.balance,
        held_out=settings.held_out,
        workers=settings.workers,
        cluster=config.cluster,
    )
    codes_NL = settled(settings, fit.codes_NL, vectors_IJ, fit.codebook)
    seconds["quantise"] = time.monotonic() - clock
    catalog = Catalog.of(items.column("item_id").to_pylist(), codes_NL, settings.width)
    figures = quality(codes_NL, settings.width, _categories(items)) | {
        "unused": list(fit.unused_L),
        "left": list(fit.left_L),
        "left_out": list(fit.left_out_L),
        "held_out": len(fit.row_O),
        "duplicates": fit.duplicates,
        "error": errors_at_fit(fit, joiner, content_IF),
        "moved": int((codes_NL[:, : settings.levels] != fit.codes_NL).any(axis=1).sum()),
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


def fused_vectors(run: Run, items: int) -> Array:
    """What the stage `fuse` made of every item: (I, F). Raises RunError where it is missing or of other items."""
    path = run.need("fuse", "vectors.npy", stage="fuse")
    vectors_IF: Array = np.load(path, allow_pickle=False)
    if len(vectors_IF) != items:
        raise RunError(f"{path} has {len(vectors_IF)} rows for {items} items: run `oxyray fuse` again")
    return vectors_IF


def _categories(items: pa.Table) -> dict[str, list[Any]]:
    return {name: items.column(name).to_pylist() for name in ("category_1", "category_2", "category_3") if name in items.column_names}
