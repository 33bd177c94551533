"""What pre-training leaves to alignment, against a slow reading of the rule, on random events."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from oxyray.data.held_back import HeldBack
from oxyray.data.prepared import Prepared
from oxyray.data.stream import SegmentStream
from oxyray.model.inputs import Inputs
from oxyray.run import Run
from tests.evaluate.shop import prepared_run


class Shop:
    """As much of `Prepared` as the rule reads: events in two parts, cut between users."""

    def __init__(self, random: np.random.Generator, by_time: bool) -> None:
        count_U = random.integers(1, 9, 12)
        user = np.repeat(np.arange(12), count_U)
        time = np.concatenate([np.sort(random.integers(0, 40, count)) for count in count_U])
        split = (time >= 30).astype(np.int8) + (time >= 36) if by_time else np.zeros(len(user), np.int8)
        if not by_time:
            for u in range(12):
                rows = np.flatnonzero(user == u)
                if len(rows) >= 3:
                    split[rows[-1]], split[rows[-2]] = 2, 1
        self.columns = {"user": user, "time": time, "split": split}
        self.parts = 2
        self.meta = SimpleNamespace(valid_start=30 if by_time else None, splits={"train": int((split == 0).sum())}, time_range=[0, 39])

    def events(self, part: int, columns: list[str] | None = None) -> dict[str, np.ndarray]:
        here = (self.columns["user"] >= 6) == bool(part)
        return {name: values[here] for name, values in self.columns.items() if columns is None or name in columns}


@pytest.mark.parametrize("by_time", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_the_newest_training_events_are_held_back(by_time: bool, share: float, seed: int) -> None:
    shop = Shop(np.random.default_rng(seed), by_time)
    rule = HeldBack(shop, share)
    held = np.concatenate([rule.among(shop.events(part)) for part in range(2)])
    user, time, split = (shop.columns[name] for name in ("user", "time", "split"))
    expected = np.zeros(len(user), bool)
    if by_time and share:
        train = sorted(time[split == 0])
        expected = (split == 0) & (time >= train[min(math.floor(len(train) * (1 - share)), len(train) - 1)])
    elif share:
        for u in range(12):
            rows = np.flatnonzero((user == u) & (split == 0))
            count = min(math.ceil(len(rows) * share - 1e-9), len(rows) - 1)
            expected[rows[len(rows) - count :]] = True
    np.testing.assert_array_equal(held, expected)


def test_streams_share_the_targets_out_and_the_earlier_one_sees_nothing_of_the_later(tmp_path: Path) -> None:
    config, _ = prepared_run(tmp_path)
    inputs = Inputs.load(Run(config.run_dir))
    prepared: Prepared = inputs.prepared

    def asked(which: str, held_back: float) -> tuple[list[tuple[int, int, int]], int]:
        """User, time and item of all targets; and the newest moment in any history."""
        stream = SegmentStream(
            prepared, inputs.collator(config.model), history=config.model.history, targets_per_step=30, seed=1, held_back=held_back,
            which=which, one_query=which == "held_back",
        )  # type: ignore[arg-type]  # fmt: skip
        found, newest, steps = [], -1, iter(stream.batches())
        for _ in range(stream.steps_per_epoch()):
            (batch,) = next(steps)
            user_Q = np.repeat(batch.user_B.numpy(), np.diff(batch.query_offset.numpy()))
            items = batch.items.ids_U[batch.target_Q].tolist()
            found += list(zip(user_Q.tolist(), batch.time_Q.tolist(), items, strict=True))
            newest = max([newest, *batch.time_N.tolist()])
        return sorted(found), newest

    everything, _ = asked("all", 0.0)
    earlier, seen = asked("earlier", 0.3)
    held, _ = asked("held_back", 0.3)
    assert sorted(earlier + held) == everything
    assert len(held) == pytest.approx(0.3 * len(everything), rel=0.15)
    assert max(time for _, time, _ in earlier) <= min(time for _, time, _ in held)
    assert seen <= min(time for _, time, _ in held)
    assert asked("held_back", 0.0)[0] == everything, "nothing is held back: alignment asks for all"
