"""Semantic IDs for whoever has items: `Tokenizer.load(run)` looks SIDs of known items up, finds the items of a SID or of its first codes,
and codes new items by the run's own codebook. Coding new items also says how far they have drifted from what the codebook was made of.

Legend: N items, L levels, J dimensions of the quantised vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oxyray.config import Config, SidConfig
from oxyray.errors import CatalogueError
from oxyray.files import read_json
from oxyray.run import Run
from oxyray.sid.behaviour import Joiner
from oxyray.sid.catalog import Catalog
from oxyray.sid.collisions import numbered, told_apart
from oxyray.sid.encoder import encode, encoder_folder, encoder_identity, item_texts
from oxyray.sid.fusion import Fusion
from oxyray.sid.given import given_vectors
from oxyray.sid.pictures import item_tokens
from oxyray.sid.rqkmeans import Fit, RQKMeans

Array = np.ndarray

FAR = 0.95  # an item is far when the codebook describes it worse than this share of the items of its time
_WATCH, _RETRAIN = 0.15, 0.30  # shares of far items; without drift 0.05 are
ENOUGH = 100  # items held out, to know how far 19 in 20 lie


@dataclass(frozen=True)
class Drift:
    """`error`: the new items' mean squared error over that of the items that were held out when the codebook was made. `far`: share of the
    new items that lie farther from their codes than 19 in 20 of those did."""

    items: int
    error: float
    far: float

    def __str__(self) -> str:
        if self.far > _RETRAIN:
            advice = "the codebook does not describe them: make new semantic IDs (`oxyray sid force=true`) and train the policy again"
        elif self.far > _WATCH:
            advice = "the catalogue is moving away from its codebook: plan new semantic IDs"
        else:
            advice = "the codebook fits them"
        count = f"{self.items:,} new item" + ("s" if self.items != 1 else "")
        return f"{count}: {self.error:.2f} times the catalogue's error, {self.far:.0%} far (5% without drift): {advice}"


@dataclass(frozen=True, eq=False)
class Encoded:
    """`catalog` is the run's catalogue with the new items behind the old; `codes_NL` are theirs. `drift` is None where too few
    items were held out to tell."""

    catalog: Catalog
    codes_NL: Array
    drift: Drift | None


class Tokenizer:
    """Of a run that holds semantic IDs. Raises RunError where it does not, CatalogueError where its files are damaged."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        self.folder = run.need("sid", stage="sid")
        self.catalog = Catalog.load(self.folder / "catalog")
        self.codebook, self._joiner = RQKMeans.load(self.folder / "codebook.npz"), Joiner.load(self.folder / "joiner.npz")
        more = self.catalog.levels - self.codebook.levels
        if self.codebook.width != self.catalog.width or more not in (0, 1):  # an extra level has no centroids
            raise CatalogueError(
                f"{self.folder}: the codebook has {self.codebook.levels} levels of {self.codebook.width} codes, the catalogue "
                f"{self.catalog.levels} of {self.catalog.width}: they are not of one run; run `oxyray sid` again"
            )
        self._figures: dict[str, Any] = read_json(self.folder / "quality.json")

    @classmethod
    def load(cls, run: str | Path) -> Tokenizer:
        """With the settings that the run's semantic IDs were made with. Raises CatalogueError where the item encoder is of a later day."""
        place = Run(run)
        made, fused = (read_json(path) if path.is_file() else {} for path in (place.stamp("sid"), place.stamp("fuse")))
        tokenizer = cls(place.config("fuse", "sid"), place)
        if tokenizer.config.sid.vectors == "fused" and made and made["inputs"].get("fuse") != fused.get("made"):
            raise CatalogueError(f"{place.folder}: the item encoder was made anew since the semantic IDs were: run `oxyray sid` again")
        return tokenizer

    @property
    def reads_texts(self) -> bool:
        return not (self.config.sid.vectors == "given" and self.config.sid.given)

    def sids(self, item_ids: Sequence[str]) -> Array:
        """(N, L). Raises CatalogueError on an unknown item."""
        return self.catalog.codes_IL[self.catalog.rows(item_ids)]

    def items(self, codes: Sequence[int]) -> list[str]:
        """The items of a SID, or of all SIDs that begin with these codes. Raises CatalogueError on more codes than levels."""
        if not 1 <= len(codes) <= self.catalog.levels:
            raise CatalogueError(f"a SID of this catalogue has {self.catalog.levels} codes, got {len(codes)}")
        found = np.flatnonzero((self.catalog.codes_IL[:, : len(codes)] == np.asarray(codes)).all(axis=1))
        return [self.catalog.item_ids[row] for row in found]

    def encode(self, items: pa.Table) -> Encoded:
        """Codes of new items (canonical columns, as in `items.parquet`) by the run's codebook; old items stay as they are, nothing is
        saved. Raises CatalogueError when the text encoder is another than the run's, or an item is in already."""
        made_with, now = self._figures["encoder"]["identity"], encoder_identity(encoder_folder(self.config.sid.encoder))
        if made_with != now:
            raise CatalogueError(
                f"{self.folder} was made with encoder {made_with}, sid.encoder={self.config.sid.encoder} is {now}: set the same encoder"
            )
        vectors_NJ = self._joiner.apply(self._vectors(items))
        plain_NL = self.codebook.assign(vectors_NJ)
        codes_NL = settled(self.config.sid, plain_NL, vectors_NJ, self.codebook, self.catalog.codes_IL)
        drift = None
        if self._figures.get("error"):
            error_N, then = self.codebook.errors(vectors_NJ, plain_NL), self._figures["error"]
            drift = Drift(len(error_N), float(error_N.mean()) / then["mean"], float((error_N > then["far"]).mean()))
        return Encoded(self.catalog.append(items.column("item_id").to_pylist(), codes_NL), codes_NL, drift)

    def _vectors(self, items: pa.Table) -> Array:
        config = self.config
        if config.sid.vectors == "given" and config.sid.given:
            return given_vectors(config.sid.given, items.column("item_id").to_pylist())
        if config.sid.vectors != "fused":
            return encode(item_texts(items), config.sid, config.cluster)
        fusion = Fusion.load(self.run.need("fuse", "model", stage="fuse"))
        return fusion.vectors(item_tokens(items, config.fuse, config.sid, config.cluster))


def settled(config: SidConfig, codes_NL: Array, vectors_NJ: Array, codebook: RQKMeans, taken_IL: Array | None = None) -> Array:
    """What the collision policy makes of the codes; published SIDs (`taken_IL`) stay whose they are."""
    if config.collisions == "reassign":
        return told_apart(codes_NL, vectors_NJ, codebook, config.collision_limit, taken_IL)
    return numbered(codes_NL, config.width, taken_IL) if config.collisions == "extra_level" else codes_NL


def errors_at_fit(fit: Fit, joiner: Joiner, content_IF: Array) -> dict[str, float] | None:
    """What drift is measured against: the mean squared error of the items that were held out, read as new ones are (without behaviour), and
    the one that 19 in 20 of them stay below. None where they are too few: the others were learned from, and lie too near to their codes."""
    if len(fit.row_O) < ENOUGH:
        return None
    vectors_OJ = joiner.apply(content_IF[fit.row_O])
    error_O = fit.codebook.errors(vectors_OJ, fit.codebook.assign(vectors_OJ))
    return {"mean": float(error_O.mean()), "far": float(np.quantile(error_O, FAR))}
