"""A tiny run folder for the evaluation's tests: prepared data with pools and multi-item requests, random SIDs, an untrained policy."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from oxyray.config import Config, from_dict
from oxyray.data.prepare import prepare
from oxyray.files import write_json
from oxyray.model.inputs import Inputs
from oxyray.model.saved import about_model, write_model
from oxyray.model.tables import PlainTables
from oxyray.run import Run
from oxyray.sid.catalog import Catalog
from oxyray.sid.quality import quality

DAY = 86_400


def write_tables(folder: Path, users: int = 30, items: int = 40, seed: int = 0) -> None:
    """Two scenarios, the second with half of the items; requests of one to three items, several a day; some items twice in a history."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 80, 40)).save(picture, "PNG")
    item_ids = [f"i{i:03d}" for i in range(items)]
    pq.write_table(
        pa.table(
            {
                "item_id": item_ids,
                "title": [f"Thing number {i} <b>&</b> more" for i in range(items)],
                "category_1": [f"kind {i % 3}" for i in range(items)],
                "price": random.uniform(1, 50, items).round(2),
                "image": pa.array([picture.getvalue() if i % 4 else None for i in range(items)], pa.binary()),
            }
        ),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.table({"user_id": [f"u{u:02d}" for u in range(users)], "city": random.choice(["A", "B"], users)}), folder / "users.parquet"
    )
    rows = []
    for user in range(users):
        for request in range(random.integers(3, 12)):
            scenario = ("home", "cart")[random.integers(2)]
            begin = int(random.integers(0, 40 * DAY))
            for _ in range(random.integers(1, 4)):
                item = random.integers(0, items if scenario == "home" else items // 2)
                rows.append((f"u{user:02d}", item_ids[item], begin, random.choice(["click", "purchase"]), scenario, f"r{request}"))
    names = ("user_id", "item_id", "event_time", "action", "scenario", "request_id")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), folder / "events.parquet")
    pool = [("home", i) for i in item_ids] + [("cart", i) for i in item_ids[: items // 2]]
    pq.write_table(pa.table({"scenario": [s for s, _ in pool], "item_id": [i for _, i in pool]}), folder / "pools.parquet")


def config(tmp: Path, **evaluate: object) -> Config:
    return from_dict(
        Config,
        {
            "run_dir": str(tmp / "run"),
            "data": {"name": "toy", "source": "tables", "path": str(tmp / "tables"), "valid_share": 0.15, "test_share": 0.25},
            "model": {
                "width": 8,
                "heads": 2,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "hidden": 8,
                "row_dim": 4,
                "history": 6,
                "text_input": False,
            },
            "generate": {"beams": 12, "requests_per_batch": 7},
            "evaluate": {"ks": [1, 5, 10], "bootstrap": 20, "sasrec": {"width": 8, "epochs": 2, "history": 6, "targets_per_step": 50}}
            | evaluate,
        },
    )


def prepared_run(tmp: Path, **evaluate: object) -> tuple[Config, Run]:
    """With RUN/data and RUN/sid."""
    write_tables(tmp / "tables")
    made = config(tmp, **evaluate)
    run = Run(made.run_dir)
    prepare(made, run)
    item_ids = pq.read_table(run.path("data", "items.parquet"))["item_id"].to_pylist()
    codes_IL = np.random.default_rng(1).integers(0, 3, (len(item_ids), 3))  # 27 SIDs for 40 items: many are shared
    run.path("sid").mkdir()
    Catalog.of(item_ids, codes_IL, 3).save(run.path("sid", "catalog"))
    write_json(run.path("sid", "quality.json"), quality(codes_IL, 3, {"category_1": [f"kind {i % 3}" for i in range(len(item_ids))]}))
    return made, run


def whole_run(tmp: Path, **evaluate: object) -> tuple[Config, Run]:
    """With an exported, untrained policy as well."""
    made, run = prepared_run(tmp, **evaluate)
    inputs = Inputs.load(run)
    torch.manual_seed(0)
    policy = inputs.policy(made.model)
    write_model(run.path("pretrain", "model"), policy.state_dict(), about_model(made.model, inputs))
    PlainTables.fresh(inputs.tables(made.model), 0).save(run.path("pretrain", "model", "tables.safetensors"))
    return made, run
