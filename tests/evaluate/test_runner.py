"""The stage `evaluate` on a tiny run: its files, its table against the same table made with dictionaries, its errors."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import groupby, pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from oxyray.config import from_dict, to_dict
from oxyray.errors import ConfigError, RunError
from oxyray.evaluate import sasrec_cache
from oxyray.evaluate.predictions import recompute
from oxyray.evaluate.requests import TEST, asked
from oxyray.evaluate.runner import PolicyRecommender, evaluate
from oxyray.evaluate.table import entry, published, text
from oxyray.files import read_json
from oxyray.model.inputs import Inputs
from oxyray.model.saved import model_folder
from tests.evaluate.shop import DAY, prepared_run, whole_run

MODELS = ["policy", "popularity", "knn", "sasrec"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    config, run = whole_run(tmp_path_factory.mktemp("shop"))
    evaluate(config, run)
    return (
        config,
        run,
        read_json(run.path("evaluate", "metrics.json")),
        pq.read_table(run.path("evaluate", "predictions.parquet")).to_pylist(),
    )


def events_by_definition(run):
    """Read the prepared events without OxyRay: rows with ids, and each request's beginning and end."""
    items = pq.read_table(run.path("data", "items.parquet"))["item_id"].to_pylist()
    users = pq.read_table(run.path("data", "users.parquet"))["user_id"].to_pylist()
    scenarios = json.loads(run.path("data", "meta.json").read_text())["scenarios"]
    rows = []
    for path in sorted(run.path("data", "events").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    for row in rows:
        row |= {"item": items[row["item"]], "user": users[row["user"]], "scenario": scenarios[row["scenario"]]}
    begin, end = {}, {}
    for row in rows:
        begin[row["request"]] = min(begin.get(row["request"], row["time"]), row["time"])
        end[row["request"]] = max(end.get(row["request"], row["time"]), row["time"])
    return rows, begin, end


def test_every_model_answers_every_test_request_in_both_protocols(evaluated):
    _, run, results, predictions = evaluated
    rows, _, _ = events_by_definition(run)
    want = sorted((row["request"], row["user"], row["scenario"], row["item"]) for row in rows if row["split"] == 2)
    answered = defaultdict(list)
    for row in predictions:
        answered[row["model"], row["protocol"]].append((row["request_id"], row["user_id"], row["scenario"], row["target_item_id"]))
    assert set(answered) == {(model, protocol) for model in MODELS for protocol in ("all", "seen_out")}
    for found in answered.values():
        assert sorted(found) == want
    assert results["requests"] == len(want)


def test_lists_are_legal_distinct_and_sorted_and_seen_out_has_nothing_of_the_history(evaluated):
    _, run, results, predictions = evaluated
    rows, begin, end = events_by_definition(run)
    items = sorted({row["item"] for row in rows} | {f"i{i:03d}" for i in range(40)})
    for row in predictions:
        ids, scores = row["item_ids"], row["scores"]
        assert len(set(ids)) == len(ids) == len(scores) <= 10
        assert scores == sorted(scores, reverse=True)
        assert len(set(row["sids"])) == len(row["sids"]) <= 10
        pool = items[:20] if row["scenario"] == "cart" else items
        history: set[str] = set()
        assert set(ids) <= set(pool)
        if row["protocol"] == "seen_out":
            now = row["request_id"]
            history = {e["item"] for e in rows if e["user"] == row["user_id"] and e["request"] != now and end[e["request"]] < begin[now]}
            assert not history & set(ids)
        if row["model"] != "policy":
            assert len(ids) == min(10, len(set(pool) - history))
    assert set(results["outside_pool"]) == set(MODELS)
    assert all(share == 0 for share in results["outside_pool"].values())


def test_the_table_equals_the_definitions(evaluated):
    config, run, results, predictions = evaluated
    rows, begin, _ = events_by_definition(run)
    catalog = pq.read_table(run.path("sid", "catalog", "items.parquet")).to_pylist()
    sid = {row["item_id"]: (row["code_1"], row["code_2"], row["code_3"]) for row in catalog}
    number = {code: leaf for leaf, code in enumerate(sorted(set(sid.values())))}
    positives = defaultdict(set)
    for row in rows:
        if row["split"] == 2:
            positives[row["user"], begin[row["request"]] // DAY].add(row["item"])
    sums, counts = defaultdict(float), defaultdict(int)
    for row in predictions:
        wanted = positives[row["user_id"], begin[row["request_id"]] // DAY]
        target = row["target_item_id"]
        for level, ranked, aim, goal in (
            ("item", row["item_ids"], target, wanted),
            ("sid", row["sids"], number[sid[target]], {number[sid[item]] for item in wanted}),
        ):
            for scenario in (None, row["scenario"]):
                at = row["model"], row["protocol"], level, scenario
                counts[at] += 1
                for k in config.evaluate.ks:
                    top = ranked[:k]
                    sums[(*at, f"HR@{k}")] += aim in top
                    sums[(*at, f"Recall@{k}")] += len(goal & set(top)) / len(goal)
                    sums[(*at, f"NDCG@{k}")] += 1 / math.log2(2 + top.index(aim)) if aim in top else 0
    assert len(results["table"]) == len(counts) == 4 * 2 * 2 * 3
    for line in results["table"]:
        at = line["model"], line["protocol"], line["level"], line["scenario"]
        assert line["requests"] == counts[at]
        for name, value in line["metrics"].items():
            assert value == pytest.approx(sums[(*at, name)] / counts[at], abs=1e-12), (at, name)
    policy = {(e["protocol"], e["level"]): e["metrics"] for e in results["table"] if e["model"] == "policy" and e["scenario"] is None}
    for row in results["against"]:
        theirs = next(
            e
            for e in results["table"]
            if (e["model"], e["protocol"], e["level"], e["scenario"]) == (row["baseline"], row["protocol"], row["level"], None)
        )
        for name, figure in row["metrics"].items():
            assert figure["difference"] == pytest.approx(policy[row["protocol"], row["level"]][name] - theirs["metrics"][name], abs=1e-12)
            assert figure["interval"][0] <= figure["interval"][1]


def test_anyone_can_recompute_the_table_from_the_files(evaluated):
    config, run, results, _ = evaluated
    inputs = Inputs.load(run)
    leaf_I = inputs.catalog.index.leaf_of(inputs.catalog.codes_IL)
    path = run.path("evaluate", "predictions.parquet")
    again = recompute(path, inputs.prepared, leaf_I, config.evaluate.ks, config.evaluate.bootstrap, config.seed)
    assert again == {"table": results["table"], "against": results["against"]}
    alone = recompute(path, inputs.prepared, None, config.evaluate.ks)
    assert [e["metrics"] for e in alone["table"]] == [e["metrics"] for e in results["table"] if e["level"] == "item"]


def test_items_of_one_sid_stand_together_by_training_events_then_index(evaluated):
    """With beams as wide as the catalogue the policy's list is its whole pool."""
    config, run, _, _ = evaluated
    inputs = Inputs.load(run)
    wide = from_dict(type(config), to_dict(config) | {"generate": {"beams": inputs.catalog.index.leaves}})
    model = PolicyRecommender.load(wide, inputs, model_folder(run), "cpu")
    counts_I, leaf_I = inputs.prepared.train_counts_I(), inputs.catalog.index.leaf_of(inputs.catalog.codes_IL)
    for requests in asked(inputs.prepared, TEST):
        rows = requests.take(slice(0, 20))
        found = model.recommend(rows, 40)
        for r in range(len(rows)):
            ids = found.item_RK[r][found.item_RK[r] >= 0].tolist()
            scores = found.score_RK[r][: len(ids)].tolist()
            pool = inputs.prepared.pools[inputs.prepared.meta.scenarios[rows.scenario_R[r]]]
            assert set(ids) >= set(np.flatnonzero(pool))
            assert scores == sorted(scores, reverse=True)
            for (i, first), (j, second) in pairwise(zip(ids, scores, strict=True)):
                assert leaf_I[i] != leaf_I[j] or (first == second and (-counts_I[i], i) < (-counts_I[j], j))
            assert len(list(groupby(leaf_I[ids]))) == len(set(leaf_I[ids]))


def test_the_printed_table_speaks_of_every_model_and_scenario(evaluated, capsys):
    _, _, results, _ = evaluated
    printed = text(results)
    for word in ("OxyRay policy", "co-visitation KNN", "SASRec", "popularity", "seen out", "SID level", "cart", "home", "95%"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_sasrec_is_not_trained_twice(evaluated, monkeypatch):
    config, run, results, _ = evaluated

    def never(*args, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(sasrec_cache, "train", never)
    evaluate(config, run)
    assert read_json(run.path("evaluate", "metrics.json"))["table"] == results["table"]
    other = from_dict(type(config), to_dict(config))
    other.evaluate.sasrec.dropout = 0.3
    with pytest.raises(AssertionError, match="trained again"):
        evaluate(other, run)
    assert read_json(run.path("evaluate", "metrics.json"))["table"] == results["table"], "a failed evaluation keeps the earlier one"


def test_a_sample_is_drawn_by_the_seed(tmp_path):
    config, run = whole_run(tmp_path, max_requests=25, baselines=["popularity"], bootstrap=0)
    evaluate(config, run)
    first = pq.read_table(run.path("evaluate", "predictions.parquet"))
    evaluate(config, run)
    assert pq.read_table(run.path("evaluate", "predictions.parquet")) == first
    results = read_json(run.path("evaluate", "metrics.json"))
    assert results["requests"] == 25 < results["requests_in_split"]
    assert first.num_rows == 25 * 2 * 2
    config.seed += 1
    evaluate(config, run)
    assert pq.read_table(run.path("evaluate", "predictions.parquet"))["request_id"] != first["request_id"]


def test_predictions_of_other_data_are_refused(evaluated, tmp_path):
    _, run, _, _ = evaluated
    inputs = Inputs.load(run)
    table = pq.read_table(run.path("evaluate", "predictions.parquet"))
    for column, value in (("target_item_id", "stranger"), ("request_id", 10**9)):
        strange = table.to_pylist()
        strange[0][column] = value
        pq.write_table(type(table).from_pylist(strange, schema=table.schema), tmp_path / "p.parquet")
        with pytest.raises(RunError, match="run `oxyray evaluate` again"):
            recompute(tmp_path / "p.parquet", inputs.prepared, None, [1])


def test_missing_stages_and_too_many_beams_are_one_clear_line(tmp_path):
    config, run = prepared_run(tmp_path)
    with pytest.raises(RunError, match="oxyray pretrain"):
        evaluate(config, run)
    config.generate.beams = 1000
    with pytest.raises(ConfigError, match="beams"):
        evaluate(config, run)
    assert not run.path("evaluate").exists()


def test_published_rows_need_the_published_set(evaluated):
    _, run, results, _ = evaluated
    assert results["published"] == []
    meta = Inputs.load(run).prepared.meta
    beauty = replace(meta, users_with_events=22_363, items=12_101, events=198_502, split="leave_one_out")
    rows = published(beauty)
    assert {row["system"] for row in rows} >= {"TIGER", "LC-Rec, reproduced", "OneRec-Think"}
    assert all(0 < value < 0.2 for row in rows for name, value in row.items() if "@" in name)
    assert published(replace(beauty, split="time")) == []
    assert {row["set"] for row in rows} == {"amazon_beauty"}


def test_with_a_second_opinion_the_beams_alone_stand_beside_it(tmp_path):
    config, run = whole_run(tmp_path)
    config = replace(config, evaluate=replace(config.evaluate, baselines=()))
    evaluate(config, run)
    plain = json.loads(run.path("evaluate", "metrics.json").read_text())
    evaluate(replace(config, generate=replace(config.generate, followers=2.0)), run)
    both = json.loads(run.path("evaluate", "metrics.json").read_text())
    assert (plain["models"], both["models"]) == (["policy"], ["policy", "beams"])
    assert entry(both, "beams", "all")["metrics"] == entry(plain, "policy", "all")["metrics"]
    assert entry(both, "policy", "all")["metrics"] != entry(plain, "policy", "all")["metrics"]


def test_what_is_hidden_from_the_policy_is_not_read(tmp_path):
    config, run = whole_run(tmp_path)
    inputs = Inputs.load(run)
    [asked_] = list(asked(inputs.prepared, TEST, 20, seed=1))
    read = []
    for hide in ((), ("trigger",), ("trigger", "text")):
        model = PolicyRecommender.load(replace(config, evaluate=replace(config.evaluate, hide=hide)), inputs, model_folder(run), "cpu")
        collate, generate = model.collate, model.generator.generate

        def with_both(*args, collate=collate, **kwargs):
            return replace(made := collate(*args, **kwargs), trigger_Q=made.trigger_Q * 0 + 3, text_Q=made.text_Q * 0)

        def noted(batch, *args, generate=generate, **kwargs):
            read.append((set(batch.trigger_Q.tolist()), set(batch.text_Q.tolist())))
            return generate(batch, *args, **kwargs)

        model.collate, model.generator.generate = with_both, noted
        model.recommend(asked_, 5)
    assert read == [({3}, {0}), ({-1}, {0}), ({-1}, {-1})]
