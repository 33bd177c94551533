"""The rule about time, against brute force on random events; and the step plan: complete, independent of workers, resumable."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oxyray.data.requests import request_segments, timeline, training_segments
from oxyray.data.stream import Collator, ItemFeatures, SegmentStream
from tests.model.toys import Toy


@st.composite
def events(draw):
    """Random events of a few users whose requests may hold several events, overlap in time and share times."""
    size = draw(st.integers(1, 50))
    column = lambda low, high: np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))  # noqa: E731
    user = np.sort(column(0, 3))
    return {
        "user": user,
        "item": np.arange(size),
        "time": column(0, 12),
        "action": column(0, 2),
        "scenario": column(0, 1),
        "request": column(0, 14) + 100 * user,
        "trigger": np.full(size, -1),
        "split": column(0, 2),
    }


def _one_user(*requests):
    """Events of one user at one moment, in requests of so many events."""
    request = np.repeat(np.arange(len(requests)), requests)
    zero = np.zeros(len(request), dtype=np.int64)
    return {"user": zero, "item": np.arange(len(request)), "time": zero, "action": zero, "scenario": zero, "request": request,
            "trigger": zero - 1, "split": zero}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(raw=events(), history=st.integers(1, 9), most=st.integers(1, 9))
@example(raw=_one_user(40, 3, 1, 1), history=6, most=1)
def test_no_input_is_later_than_its_target_nor_of_its_own_request(raw, history, most):
    time = timeline(raw)
    begin = {r: raw["time"][raw["request"] == r].min() for r in raw["request"]}
    end = {r: raw["time"][raw["request"] == r].max() for r in raw["request"]}
    request_of = dict(zip(raw["item"], raw["request"], strict=True))  # items are unique here: they name events
    time_of = dict(zip(raw["item"], raw["time"], strict=True))
    user_of = dict(zip(raw["item"], raw["user"], strict=True))
    short = training_segments(time, history, most=most)
    assert short.query_length_B.max() <= most
    for segments in (training_segments(time, history), short, request_segments(time, np.arange(len(time)), history)):
        asked = []
        for start, length, first, count in zip(
            segments.start_B, segments.length_B, segments.query_start_B, segments.query_length_B, strict=True
        ):
            assert length <= history
            for event in range(first, first + count):
                target = time.item_E[event]
                asked.append(target)
                visible = max(0, time.user_start_E[event] + time.visible_E[event] - start)
                assert min((history + 1) // 2, time.visible_E[event]) <= visible <= length
                for seen in time.item_E[start : start + visible]:
                    assert user_of[seen] == user_of[target]
                    assert request_of[seen] != request_of[target]
                    assert time_of[seen] <= begin[request_of[target]] <= time_of[target]
        assert sorted(asked) == sorted(raw["item"]), "every event is asked exactly once"
    for event in range(len(time)):  # and nothing that was over is hidden
        target = time.item_E[event]
        seen = set(time.item_E[time.user_start_E[event] : time.user_start_E[event] + time.visible_E[event]])
        over = {i for i in raw["item"] if user_of[i] == user_of[target] and end[request_of[i]] < begin[request_of[target]]}
        assert over <= seen


@settings(max_examples=50, deadline=None)
@given(raw=events())
def test_a_training_timeline_holds_training_events_only(raw):
    assert sorted(timeline(raw, splits=(0,)).item_E) == sorted(raw["item"][raw["split"] == 0])


@settings(max_examples=50, deadline=None)
@given(raw=events(), data=st.data())
def test_rows_see_the_same_where_only_their_users_are_kept(raw, data):
    time = timeline(raw)
    rows = np.array(data.draw(st.lists(st.integers(0, len(time) - 1), min_size=1, max_size=5)))
    few, places = time.of_rows(rows)
    assert set(few.user_E) == set(time.user_E[rows])
    assert len(few) == np.isin(time.user_E, time.user_E[rows]).sum()
    for row, place in zip(rows, places, strict=True):
        assert few.request_E[place] == time.request_E[row]
        assert few.item_E[place] == time.item_E[row]
        seen, kept = (t.item_E[t.user_start_E[r] : t.user_start_E[r] + t.visible_E[r]] for t, r in ((time, row), (few, place)))
        assert seen.tolist() == kept.tolist()


class Parts:
    """Three parts of users, as `Prepared` gives them."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        self.parts, self.meta = 3, type("Meta", (), {"name": "toy"})
        self._parts = []
        for part in range(3):
            size = 200
            self._parts.append(
                {
                    "user": np.sort(random.integers(0, 12, size)) + 12 * part,
                    "item": np.arange(size) + size * part,
                    "time": random.integers(0, 10**4, size),
                    "action": random.integers(0, 3, size),
                    "scenario": random.integers(0, 2, size),
                    "request": np.arange(size) + size * part,
                    "trigger": np.full(size, -1),
                    "split": random.integers(0, 2, size) * random.integers(0, 2, size),
                }
            )

    def events(self, part: int):
        return self._parts[part]


def stream(seed: int = 0, **more) -> SegmentStream:
    features = ItemFeatures(torch.zeros(600, 3, dtype=torch.long), torch.zeros(600, 0, dtype=torch.long), None)
    collate = Collator(features, np.zeros((36, 0), int), np.outer([1.0, 2.0, 4.0], np.ones(9)), whole_catalogue=True)
    return SegmentStream(Parts(), collate, **({"history": 8, "targets_per_step": 40, "seed": seed} | more))


def targets_by_step(source: SegmentStream, steps: int, worlds: int = 1, micro: int = 1) -> list[list[int]]:
    """Targets of each step over all ranks and micro-batches, sorted."""
    ranks = []
    for rank in range(worlds):
        one = stream()
        one.load_state_dict(source.state_dict())
        batches = one.batches(rank, worlds, micro)
        ranks.append([[t for batch in next(batches) for t in batch.target_Q.tolist()] for _ in range(steps)])
    return [sorted(t for rank in ranks for t in rank[step]) for step in range(steps)]


def test_an_epoch_asks_every_training_event_once_and_epochs_differ():
    source = stream()
    steps = source.steps_per_epoch()
    seen = targets_by_step(source, 2 * steps)
    training = sorted(
        i for part in range(3) for i, s in zip(Parts().events(part)["item"], Parts().events(part)["split"], strict=True) if s == 0
    )
    assert sorted(t for step in seen[:steps] for t in step) == training
    assert sorted(t for step in seen[steps:] for t in step) == training
    assert seen[:steps] != seen[steps:]


def test_steps_are_the_same_for_any_number_of_workers_and_micro_batches():
    want = targets_by_step(stream(), 12)
    assert targets_by_step(stream(), 12, worlds=2) == want
    assert targets_by_step(stream(), 12, worlds=3, micro=2) == want


def test_resuming_goes_on_where_it_stopped_also_at_an_epoch_boundary():
    steps = stream().steps_per_epoch()
    want = targets_by_step(stream(), 2 * steps + 3)
    for stop in (1, steps - 1, steps, steps + 2):
        first = stream()
        batches = first.batches()
        for _ in range(stop):
            next(batches)
        second = stream()
        second.load_state_dict(first.state_dict())
        assert targets_by_step(second, 2 * steps + 3 - stop) == want[stop:]


@pytest.mark.parametrize("targets", [1, 3, 7, 10_000])
@pytest.mark.parametrize("history", [2, 8, 200])
def test_any_size_of_step_gives_steps_that_hold_targets_and_an_epoch_that_holds_all(targets: int, history: int) -> None:
    source = stream(targets_per_step=targets, history=history)
    batches = source.batches()
    steps = [next(batches)[0] for _ in range(source.steps_per_epoch())]
    assert min(batch.queries for batch in steps) > 0
    training = [i for part in range(3) for i, s in zip(Parts().events(part)["item"], Parts().events(part)["split"], strict=True) if s == 0]
    assert sorted(t for batch in steps for t in batch.target_Q.tolist()) == sorted(training)
    next(batches)
    assert source.state_dict() == {"epoch": 1, "step": 1}


def test_overfitting_repeats_the_same_few_steps():
    few = stream(overfit_steps=2)
    batches = few.batches()
    seen = [sorted(next(batches)[0].target_Q.tolist()) for _ in range(6)]
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3] == seen[5]


def test_a_block_of_the_batch_points_at_the_same_items_as_the_whole_catalogue():
    toy = Toy(head="codes")
    part = toy.training_batch()
    toy.collate.whole_catalogue = True
    whole = toy.training_batch()
    for name in ("item_N", "trigger_Q", "target_Q"):
        local, catalogue = getattr(part, name), getattr(whole, name)
        assert torch.equal(torch.where(local < 0, -1, part.items.ids_U[local.clamp(min=0)]), catalogue)
    assert torch.equal(part.items.codes_UL, whole.items.codes_UL[part.items.ids_U])


def test_a_worker_without_a_segment_takes_part_with_next_to_nothing() -> None:
    workers = [next(stream(targets_per_step=1, history=200).batches(rank, 3, 2)) for rank in range(3)]
    pieces = sorted((piece for worker in workers for piece in worker), key=lambda piece: -float(piece.weight_Q.sum()))
    live, idle = [p for p in pieces if p.weight_Q.sum()], [p for p in pieces if not p.weight_Q.sum()]
    assert live
    assert idle
    assert all(piece.queries == 1 and len(piece.item_N) <= 1 for piece in idle)


def test_a_request_that_went_on_for_long_keeps_its_history_in_training() -> None:
    """It began after ten events and ended behind four hundred: what it may see is far back of what its neighbours see."""
    at, clicks = np.concatenate([np.arange(400), [10, 390, 399]]), np.arange(400)
    order, nothing = np.argsort(at, kind="stable"), np.zeros(403, int)
    events = {
        "user": nothing, "item": np.arange(403), "time": at[order], "action": nothing, "scenario": nothing,
        "request": np.concatenate([clicks, [900] * 3])[order], "trigger": np.full(403, -1), "split": nothing,
    }  # fmt: skip
    time = timeline(events)
    segments = training_segments(time, 100)
    row_E = np.concatenate([np.arange(a, a + n) for a, n in zip(segments.query_start_B, segments.query_length_B, strict=True)])
    assert sorted(row_E.tolist()) == list(range(403))
    start_E = np.repeat(segments.start_B, segments.query_length_B)
    seen_E = np.minimum(time.user_start_E[row_E] + time.visible_E[row_E] - start_E, segments.length_B.repeat(segments.query_length_B))
    assert (seen_E >= np.minimum(time.visible_E[row_E], 50)).all()
