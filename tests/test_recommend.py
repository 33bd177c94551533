"""Recommendations for people and code, from a real run folder with an untrained policy."""

from __future__ import annotations

import numpy as np
import pytest

from oxyray import Recommender
from oxyray.errors import CatalogueError, DataError, RunError
from oxyray.sid.catalog import Catalog
from tests.evaluate.shop import whole_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, run = whole_run(tmp_path_factory.mktemp("shop"))
    run.write_config(config)
    return run.folder


def test_items_are_of_the_scenarios_pool_best_first_and_readable(folder):
    recommender = Recommender.load(folder)
    for scenario, pool in (("home", 40), ("cart", 20)):
        found = recommender.recommend("u03", scenario, k=6)
        assert found.scenario == scenario
        assert len({shown.item_id for shown in found.items}) == 6
        assert all(int(shown.item_id[1:]) < pool for shown in found.items)
        assert [s.score for s in found.items] == sorted((s.score for s in found.items), reverse=True)
        text = str(found)
        assert all(shown.title[:60] in text for shown in (*found.items, *found.recent))


def test_recent_history_is_the_users_own_newest_first(folder):
    recommender = Recommender.load(folder)
    events = recommender.prepared.user_events(recommender.prepared.user_index("u03"))
    want = recommender.prepared.items["item_id"].take(events["item"][::-1][:8]).to_pylist()
    assert [shown.item_id for shown in recommender.recommend("u03").recent] == want


def test_seen_items_can_be_left_out(folder):
    recommender = Recommender.load(folder)
    events = recommender.prepared.user_events(recommender.prepared.user_index("u03"))
    seen = set(recommender.prepared.items["item_id"].take(events["item"]).to_pylist())
    assert seen & {shown.item_id for shown in recommender.recommend("u03", "home", k=30).items}
    assert not seen & {shown.item_id for shown in recommender.recommend("u03", "home", k=30, include_seen=False).items}


def test_a_newcomer_and_a_trigger_item_work(folder):
    recommender = Recommender.load(folder)
    newcomer = recommender.recommend(None, "home", k=3)
    assert newcomer.recent == []
    assert len(newcomer.items) == 3
    triggered = recommender.recommend("u03", "home", trigger="i007", k=3)
    assert triggered.trigger.item_id == "i007"
    scores = [[round(shown.score, 6) for shown in r.items] for r in (recommender.recommend("u03", "home", k=3), triggered)]
    assert scores[0] != scores[1]


def test_a_newcomer_is_nobody_and_least_of_all_the_first_user(folder):
    recommender = Recommender.load(folder)
    before = [shown.score for shown in recommender.recommend(None, "home", k=5).items]
    recommender._collate.profile_UP[:] += 1
    tables = recommender.generator.lookup.__self__.tables
    tables["user"] += 1
    assert [shown.score for shown in recommender.recommend(None, "home", k=5).items] == before


def test_a_request_in_the_past_knows_what_was_known_then_and_is_asked_as_asked(folder):
    recommender = Recommender.load(folder)
    events = recommender.prepared.user_events(recommender.prepared.user_index("u03"))
    times = np.unique(events["time"])
    then = int(times[len(times) // 2])
    early = recommender.recommend("u03", "home", at=then)
    known = recommender.prepared.items["item_id"].take(events["item"][events["time"] <= then][::-1][:8]).to_pylist()
    assert [shown.item_id for shown in early.recent] == known
    answers = [
        [shown.score for shown in recommender.recommend("u03", scenario, trigger, at=then).items]
        for scenario, trigger in (("home", None), ("cart", None), ("home", "i007"))
    ]
    assert answers[0] == [shown.score for shown in early.items]
    assert answers[1] != answers[0] != answers[2]


def test_events_of_the_moment_that_is_asked_about_are_seen(folder, monkeypatch):
    recommender = Recommender.load(folder)
    asked, generate = [], recommender.generator.generate
    monkeypatch.setattr(recommender.generator, "generate", lambda batch, *more: [asked.append(batch), generate(batch, *more)][1])
    events = recommender.prepared.user_events(recommender.prepared.user_index("u03"))
    history = recommender._model.history
    for time in np.unique(events["time"]).tolist():
        recommender.recommend("u03", "home", at=time)
        recommender.recommend("u03", "home", at=time + 1)
        seen = events["item"][events["time"] <= time]
        for batch in asked[-2:]:
            assert batch.items.ids_U[batch.item_N].tolist() == seen[-history:].tolist()
            assert batch.visible_Q.tolist() == [min(len(seen), history)]


def test_all_that_is_asked_for_comes_also_beyond_the_beams(folder):
    recommender = Recommender.load(folder)
    assert len(recommender.recommend("u03", "home", k=40).items) == 40
    assert len(recommender.recommend("u03", "cart", k=100).items) == 20
    assert len(recommender.recommend("u03", "home", k=3).items) == 3


def test_the_same_question_has_the_same_answer_and_the_answer_depends_on_the_user(folder):
    recommender = Recommender.load(folder)
    answers = [[shown.score for shown in recommender.recommend(user, "home", at=10**7).items] for user in ("u03", "u03", "u04")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"user": "nobody"}, "user 'nobody' is not in"),
        ({"user": "u03", "scenario": "moon"}, "scenario 'moon' is unknown; this shop has"),
        ({"user": "u03", "trigger": "i999"}, "item 'i999' is not in"),
        ({"user": "u03", "k": 0}, "k must be at least 1"),
    ],
)
def test_what_is_unknown_is_named(folder, asked, said):
    with pytest.raises(DataError, match=said):
        Recommender.load(folder).recommend(**asked)


def test_an_empty_folder_names_the_stage_to_run(tmp_path):
    with pytest.raises(RunError, match="oxyray prepare"):
        Recommender.load(tmp_path)


def test_a_model_of_another_catalogue_is_refused(tmp_path):
    config, run = whole_run(tmp_path)
    run.write_config(config)
    old = Catalog.load(run.path("sid", "catalog"))
    codes_IL = old.codes_IL.copy()
    codes_IL[0] = (codes_IL[0] + 1) % 3
    Catalog.of(old.item_ids, codes_IL, old.width).save(run.path("sid", "catalog"))
    with pytest.raises(CatalogueError, match=f"trained with catalogue {old.version}"):
        Recommender.load(run.folder)


def test_a_query_to_a_model_that_reads_none_is_an_error(folder):
    with pytest.raises(DataError, match=r"reads no queries: its shop's events have none, or model.instruction leaves them out"):
        Recommender.load(folder).recommend("u03", "home", query="red shoes")
