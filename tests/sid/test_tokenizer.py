"""Looking SIDs up and back, and drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oxyray.errors import CatalogueError, RunError
from oxyray.files import write_json
from oxyray.sid import stage
from oxyray.sid.behaviour import Joiner
from oxyray.sid.rqkmeans import RQKMeans, fit
from oxyray.sid.tokenizer import Drift, Tokenizer, errors_at_fit
from tests.sid.test_stage import cache, made

__all__ = ["cache"]


@pytest.fixture
def tokenizer(tmp_path: Path, cache: Path) -> Tokenizer:
    config, run = made(tmp_path, cache)
    stage.sid(config, run)
    run.write_config(config)
    return Tokenizer.load(run.folder)


def test_there_and_back(tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.catalog.item_ids[:5])
    for item_id, codes in zip(ids, tokenizer.sids(ids), strict=True):
        assert item_id in tokenizer.items(codes.tolist())
        below = tokenizer.items(codes[:1].tolist())
        assert item_id in below
        assert all(tokenizer.sids([other])[0, 0] == codes[0] for other in below)
    with pytest.raises(CatalogueError, match="not in catalogue"):
        tokenizer.sids(["nobody"])
    with pytest.raises(CatalogueError, match="got 9"):
        tokenizer.items([0] * 9)


def test_a_codebook_of_another_width_is_refused(tokenizer: Tokenizer) -> None:
    book = tokenizer.codebook.centroids_LVF
    for other, says in ((book[:, :-1], f"of {book.shape[1] - 1} codes"), (np.concatenate([book, book]), f"has {2 * len(book)} levels")):
        RQKMeans(np.ascontiguousarray(other)).save(tokenizer.folder / "codebook.npz")
        with pytest.raises(CatalogueError, match=f"{says}.* not of one run"):
            Tokenizer.load(tokenizer.run.folder)


def test_the_settings_are_those_that_the_sids_were_made_with(tokenizer: Tokenizer) -> None:
    run = tokenizer.run
    write_json(run.stamp("sid"), {"settings": {"sid.collisions": "none", "sid.vectors": "text"}, "inputs": {"fuse": None}})
    failed = tokenizer.config
    failed.sid.collisions, failed.sid.vectors = "extra_level", "fused"
    run.write_config(failed)
    again = Tokenizer.load(run.folder)
    assert (again.config.sid.collisions, again.config.sid.vectors) == ("none", "text")
    write_json(run.stamp("sid"), {"settings": {"sid.vectors": "fused"}, "inputs": {"fuse": "monday"}})
    write_json(run.stamp("fuse"), {"settings": {}, "inputs": {}, "made": "tuesday"})
    with pytest.raises(CatalogueError, match="the item encoder was made anew since"):
        Tokenizer.load(run.folder)


def test_a_run_without_sids_is_told(tmp_path: Path, cache: Path) -> None:
    config, run = made(tmp_path, cache)
    run.write_config(config)
    with pytest.raises(RunError, match="oxyray sid"):
        Tokenizer.load(run.folder)


def test_drift_tells_the_same_from_the_moved() -> None:
    random = np.random.default_rng(4)
    vectors = random.normal(size=(4000, 8)).astype(np.float32)
    joiner = Joiner.fit(vectors[:2000], None, 1.0, 0)
    assert errors_at_fit(fit(vectors[:2000], levels=2, width=16), joiner, vectors[:2000]) is None, "what was learned from lies too near"
    made = fit(vectors[:2000], levels=2, width=16, held_out=0.25)
    then = errors_at_fit(made, joiner, vectors[:2000])
    assert then is not None

    def drift(new: np.ndarray) -> Drift:
        error = made.codebook.errors(new, made.codebook.assign(new))
        return Drift(len(new), float(error.mean()) / then["mean"], float((error > then["far"]).mean()))

    same, moved = drift(vectors[2000:]), drift(vectors[2000:] * 0.5 + 3)
    assert same.far < 0.08
    assert "fits them" in str(same)
    assert moved.far > 0.9
    assert moved.error > 2
    assert "new semantic IDs" in str(moved)
