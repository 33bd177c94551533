"""The stage `sid` on a small shop: from tables through `prepare` to a catalogue on disk."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oxyray.config import Config, DataConfig, SidConfig
from oxyray.data.prepare import prepare
from oxyray.data.prepared import Prepared
from oxyray.errors import CatalogueError, RunError
from oxyray.run import Run
from oxyray.sid import stage
from oxyray.sid.catalog import Catalog
from oxyray.sid.collisions import told_apart
from oxyray.sid.encoder import encode, item_texts
from oxyray.sid.quality import quality
from oxyray.sid.rqkmeans import RQKMeans
from oxyray.sid.tokenizer import Tokenizer

KINDS = {"Lips": ["lipstick", "lip balm", "lip liner"], "Kitchen": ["frying pan", "whisk", "tea pot"], "Garden": ["spade", "hose", "rake"]}
COLOURS = ["red", "blue", "green", "black", "white", "golden"]


def write_shop(folder: Path, last: int = 0, third_last: int = 0) -> Path:
    """54 items of 3 categories, 40 users who stay within one; `last` and `third_last` shift the items of those events of each user."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [(kind, f"{colour} {thing}") for kind, things in KINDS.items() for thing in things for colour in COLOURS]
    ids = [f"i{n:02d}" for n in range(len(names))]
    items = {"item_id": ids, "title": [title for _, title in names], "category_1": [kind for kind, _ in names]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        taken = (user % 3) * 18 + rng.permutation(18)[:8]
        taken[-1], taken[-3] = (taken[-1] + last) % 54, (taken[-3] + third_last) % 54
        rows += [(f"u{user:02d}", ids[item], place, "purchase", "shop") for place, item in enumerate(taken)]
    columns = zip(*rows, strict=True)
    names = ["user_id", "item_id", "event_time", "action", "scenario"]
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), folder / "events.parquet")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


def made(folder: Path, cache: Path, shop: dict[str, int] | None = None, **sid: object) -> tuple[Config, Run]:
    """A run whose stage `prepare` is done."""
    data = DataConfig(
        name="shop", source="tables", path=str(write_shop(folder / "shop", **(shop or {}))), split="leave_one_out", time_unit="position"
    )
    settings = SidConfig(width=8, levels=2, cache_dir=str(cache), **sid)  # type: ignore[arg-type]
    config = Config(run_dir=str(folder / "run"), data=data, sid=settings)
    run = Run(config.run_dir)
    prepare(config, run)
    return config, run


def version(folder: Path, cache: Path, shop: dict[str, int] | None = None, **sid: object) -> str:
    config, run = made(folder, cache, shop, **sid)
    stage.sid(config, run)
    return Catalog.load(run.path("sid", "catalog")).version


def test_all_that_the_contract_names_is_written_and_fits(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made(tmp_path, cache)
    stage.sid(config, run)
    items = Prepared.load(run.path("data")).items
    catalog = Catalog.load(run.path("sid", "catalog"))
    vectors = np.load(run.path("sid", "vectors.npy"), allow_pickle=False)
    assert catalog.item_ids == tuple(items.column("item_id").to_pylist())
    assert (catalog.width, catalog.levels) == (8, 2)
    assert vectors.dtype == np.float32
    assert (vectors == encode(item_texts(items), config.sid)).all()
    codebook = RQKMeans.load(run.path("sid", "codebook.npz"))
    assert (told_apart(codebook.assign(vectors), vectors, codebook, config.sid.collision_limit) == catalog.codes_IL).all()
    figures = json.loads(run.path("sid", "quality.json").read_text())
    for name, value in quality(catalog.codes_IL, 8, {"category_1": items.column("category_1").to_pylist()}).items():
        assert figures[name] == value
    assert figures["version"] == catalog.version
    assert figures["purity"]["category_1"]["code_1"] > 0.9  # MiniLM tells lips from kitchens
    said = capsys.readouterr().out
    for line in ("Codebook coverage", "Cluster purity", "SID collision", "Load balance", "Gini", "of 54 items"):
        assert line in said
    assert run.metrics("sid")[-1]["version"] == catalog.version


def test_shared_sids_stay_shared_when_asked(tmp_path: Path, cache: Path) -> None:
    config, run = made(tmp_path, cache, collisions="none")
    stage.sid(config, run)
    vectors = np.load(run.path("sid", "vectors.npy"), allow_pickle=False)
    codes = Catalog.load(run.path("sid", "catalog")).codes_IL
    assert (RQKMeans.load(run.path("sid", "codebook.npz")).assign(vectors) == codes).all()
    assert len(np.unique(codes, axis=0)) < len(codes)


def test_same_settings_same_catalogue_other_seed_another(tmp_path: Path, cache: Path) -> None:
    one, two, three = (version(tmp_path / name, cache, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one == two != three


def test_held_out_events_leave_no_trace_in_the_sids(tmp_path: Path, cache: Path) -> None:
    plain, held_out, trained = (
        version(tmp_path / name, cache, shop, vectors="text_behaviour", behaviour_dim=8)
        for name, shop in (("plain", {}), ("held_out", {"last": 7}), ("trained", {"third_last": 7}))
    )
    assert plain == held_out  # the last event of each user is the test target
    assert plain != trained


def test_behaviour_weighs_in(tmp_path: Path, cache: Path) -> None:
    """Where behaviour weighs a lot, level-1 codes follow what users took together."""
    config, run = made(tmp_path, cache, vectors="text_behaviour", behaviour_dim=3, behaviour_weight=20.0, pca_dim=4)
    stage.sid(config, run)
    assert json.loads(run.path("sid", "quality.json").read_text())["purity"]["category_1"]["code_1"] == 1.0


@pytest.mark.parametrize("vectors", ["text", "text_behaviour"])
def test_new_items_get_codes_of_the_same_codebook_behind_the_old(tmp_path: Path, cache: Path, vectors: str) -> None:
    config, run = made(tmp_path, cache, vectors=vectors, behaviour_dim=8, pca_dim=12)
    stage.sid(config, run)
    old = Catalog.load(run.path("sid", "catalog"))
    new = pa.table({"item_id": ["n1", "n2"], "title": ["red lipstick", "yellow rake"], "category_1": ["Lips", "Garden"]})
    encoded = Tokenizer(config, run).encode(new)
    grown = encoded.catalog
    assert grown.extends(old)
    assert len(grown) == 56
    assert encoded.drift is None, "too few items were held out to tell"
    if vectors == "text":  # the same text, so the same SID
        twin = Prepared.load(run.path("data")).items.column("title").to_pylist().index("red lipstick")
        assert (grown.codes_IL[54] == old.codes_IL[twin]).all()
    with pytest.raises(CatalogueError, match="'i00' has a SID already"):
        Tokenizer(config, run).encode(pa.table({"item_id": ["i00"], "title": ["x"]}))


def test_new_items_need_the_same_encoder(tmp_path: Path, cache: Path) -> None:
    config, run = made(tmp_path, cache)
    stage.sid(config, run)
    path = run.path("sid", "quality.json")
    figures = json.loads(path.read_text())
    figures["encoder"]["identity"] = "another"
    path.write_text(json.dumps(figures))
    with pytest.raises(CatalogueError, match="set the same encoder"):
        Tokenizer(config, run).encode(pa.table({"item_id": ["n1"], "title": ["x"]}))


def test_what_goes_wrong_leaves_the_earlier_sids(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = made(tmp_path, cache)
    stage.sid(config, run)
    before = {path: path.read_bytes() for path in sorted(run.path("sid").rglob("*")) if path.is_file()}
    with pytest.raises(CatalogueError, match="54 items are fewer than the 64 codes .* sid.width=32"):
        stage.sid(replace(config, sid=replace(config.sid, width=64)), run)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "write_json", full)
    with pytest.raises(RunError, match="no space left"):
        stage.sid(replace(config, sid=replace(config.sid, seed=99)), run)
    assert {path: path.read_bytes() for path in sorted(run.path("sid").rglob("*")) if path.is_file()} == before
    assert not [path for path in run.folder.iterdir() if path.name.endswith((".part", ".old"))]


def test_without_prepared_data_the_first_stage_is_named(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path), data=DataConfig(name="x", source="mall"))
    with pytest.raises(RunError, match="oxyray prepare"):
        stage.sid(config, Run(tmp_path))
