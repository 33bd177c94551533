"""Freshness, order and safety of the stages, with small real stages that write small real files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from oxyray.config import Config, ModelConfig, from_dict
from oxyray.errors import RunError
from oxyray.files import whole
from oxyray.pipeline import STAGES, Stage, borrow, plan, run_all, run_one, source_files, why_stale
from oxyray.run import Run
from oxyray.train.course import MAY_CHANGE


@dataclass
class Shop:
    """Three stages in a row: each adds up what it reads and its own setting. `ran` lists what ran; `fails` breaks half-way."""

    folder: Path
    ran: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    fails: str | None = None

    @property
    def source(self) -> Path:
        return self.folder / "source" / "events.json"

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                name="read",
                about="a",
                work=self.work("read", self.read),
                folder="data",
                settings=("data",),
                files=lambda config: [self.source],
            ),
            Stage(
                name="code",
                about="b",
                work=self.work("code", self.code),
                folder="code",
                reads=("read",),
                settings=("sid",),
                speed=("sid.workers",),
            ),
            Stage(
                name="learn", about="c", work=self.work("learn", self.learn), folder="learn", reads=("read", "code"), settings=("model",)
            ),
        )

    def work(self, name: str, make: Callable[[Config, Run], int]) -> Callable[[Config, Run], None]:
        def stage(config: Config, run: Run) -> None:
            self.ran.append(name)
            with whole(run.path({"read": "data"}.get(name, name))) as part:
                part.mkdir()
                (part / "value.json").write_text(json.dumps(make(config, run)))
                if self.fails == name:
                    raise RuntimeError("half-way")
            run.log(name, {"value": make(config, run)}, step=1)

        return stage

    def read(self, config: Config, run: Run) -> int:
        return int(json.loads(self.source.read_text()))

    def code(self, config: Config, run: Run) -> int:
        return value(run, "data") + config.sid.width

    def learn(self, config: Config, run: Run) -> int:
        return value(run, "data") + value(run, "code") + config.model.width

    def run(self, config: Config) -> list[str]:
        """Run all; gives what ran."""
        self.ran.clear()
        self.said.clear()
        run_all(config, self.stages(), self.said.append)
        return list(self.ran)


def value(run: Run, folder: str) -> int:
    return int(json.loads(run.path(folder, "value.json").read_text()))


def config_of(folder: Path, **more: Any) -> Config:
    return from_dict(Config, {"run_dir": str(folder / "run"), "data": {"name": "shop", "source": "mall"}, **more})


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    made = Shop(tmp_path)
    made.source.parent.mkdir()
    made.source.write_text("1000")
    return made


def test_all_stages_run_in_order_and_a_second_run_skips_them_and_says_so(shop: Shop) -> None:
    config = config_of(shop.folder)
    assert shop.run(config) == ["read", "code", "learn"]
    assert value(Run(config.run_dir), "learn") == 1000 + (1000 + 256) + 64
    assert shop.run(config) == []
    assert shop.said == [
        f"[{n}/3] {name}: fresh, skipped (force=true makes it anew)" for n, name in enumerate(["read", "code", "learn"], 1)
    ]


def test_a_changed_setting_remakes_its_stage_and_what_stands_on_it(shop: Shop) -> None:
    shop.run(config_of(shop.folder))
    assert shop.run(config_of(shop.folder, model={"width": 128})) == ["learn"]
    assert "model.width was 64 and is now 128" in shop.said[2]
    assert shop.run(config_of(shop.folder, model={"width": 128}, sid={"width": 512})) == ["code", "learn"]
    assert shop.run(
        config_of(shop.folder, model={"width": 128}, sid={"width": 512}, data={"name": "shop", "source": "mall", "core": 5})
    ) == [
        "read",
        "code",
        "learn",
    ]
    assert value(Run(shop.folder / "run"), "learn") == 1000 + (1000 + 512) + 128


def test_settings_of_speed_and_of_others_remake_nothing(shop: Shop) -> None:
    shop.run(config_of(shop.folder))
    assert shop.run(config_of(shop.folder, sid={"workers": 4}, evaluate={"bootstrap": 3}, cluster={"cpus": 1})) == []


DECIDES = {"epochs", "max_minutes", "max_steps", "patience", "eval_every_epochs", "eval_requests"}
"""Of the keys that a run may go on with when they change: those that decide when it ends and which of its models is the best."""


def test_a_finished_policy_stays_fresh_when_what_changes_is_only_how_it_was_trained(tmp_path: Path) -> None:
    stages = tuple(replace(stage, work=empty_folder(stage.folder), reads=()) for stage in STAGES if stage.name == "pretrain")
    shorter: dict[str, Any] = {
        "workers": 3, "gpu": "never", "threads_per_worker": 2, "micro_batches": 4, "profile_steps": 5, "save_every_minutes": 0.5,
        "keep_checkpoints": 9, "max_restarts": 1, "timeout_s": 77.0,
    }  # fmt: skip
    assert set(shorter) == set(MAY_CHANGE) - DECIDES
    run_all(config_of(tmp_path), stages, lambda line: None)
    steps = plan(config_of(tmp_path, train=shorter | {"optim": {"zero_stage": 3}}), ["pretrain"], stages)
    assert steps == [("pretrain", None)]
    earlier = tuple(replace(stage, speed=()) for stage in stages)  # a stamp from before a key was counted as one of speed
    run_all(replace(config_of(tmp_path, train=shorter), force=True), earlier, lambda line: None)
    assert plan(config_of(tmp_path), ["pretrain"], stages) == [("pretrain", None)]
    for name, value in {"epochs": 99, "targets_per_step": 77, "eval_requests": 3}.items():
        ((_, why),) = plan(config_of(tmp_path, train={name: value}), ["pretrain"], stages)
        assert why is not None
        assert f"train.{name} was" in why


def empty_folder(name: str) -> Callable[[Config, Run], None]:
    return lambda config, run: run.path(name).mkdir(exist_ok=True)


def test_changed_source_files_and_force_remake_everything(shop: Shop) -> None:
    config = config_of(shop.folder)
    shop.run(config)
    shop.source.write_text("2000")
    assert shop.run(config) == ["read", "code", "learn"]
    assert value(Run(config.run_dir), "learn") == 2000 + (2000 + 256) + 64
    assert shop.run(replace(config, force=True)) == ["read", "code", "learn"]


def test_a_removed_artifact_is_made_anew(shop: Shop) -> None:
    config = config_of(shop.folder)
    shop.run(config)
    Run(config.run_dir).path("learn", "value.json").unlink()
    Run(config.run_dir).path("learn").rmdir()
    assert shop.run(config) == ["learn"]


def test_a_stage_that_breaks_leaves_the_earlier_result_and_runs_again(shop: Shop) -> None:
    config = config_of(shop.folder)
    shop.run(config)
    wider = replace(config, model=ModelConfig(width=128))
    shop.fails = "learn"
    with pytest.raises(RuntimeError, match="half-way"):
        shop.run(wider)
    run = Run(config.run_dir)
    assert value(run, "learn") == 1000 + (1000 + 256) + 64
    assert [path.name for path in run.folder.iterdir() if path.name.endswith(".part")] == []
    shop.fails = None
    assert shop.run(config) == []  # what stands there is still what this configuration gives
    assert shop.run(wider) == ["learn"]


def test_one_stage_alone_runs_alone(shop: Shop) -> None:
    config = config_of(shop.folder)
    stages = shop.stages()
    run_one("read", config, stages, shop.said.append)
    run_one("code", config, stages, shop.said.append)
    run_one("code", config, stages, shop.said.append)
    assert shop.ran == ["read", "code"]
    assert shop.said[-1].startswith("code: fresh, skipped")


def test_one_stage_alone_refuses_missing_and_unfitting_earlier_stages(shop: Shop) -> None:
    config, stages = config_of(shop.folder), shop.stages()
    with pytest.raises(RunError, match="learn needs read, which .* does not hold: run `oxyray read`"):
        run_one("learn", config, stages)
    run_one("read", config, stages)
    with pytest.raises(RunError, match="learn needs code, which .* does not hold: run `oxyray code`"):
        run_one("learn", config, stages)
    run_one("code", config, stages)
    with pytest.raises(RunError, match="made with other settings: sid.width was 256 and is now 128"):
        run_one("learn", config_of(shop.folder, sid={"width": 128}), stages)
    run_one("read", replace(config, force=True), stages)
    with pytest.raises(RunError, match="needs code, but .* does not fit: read was made anew since"):
        run_one("learn", config, stages)
    assert shop.ran == ["read", "code", "read"]


def test_a_stage_may_need_another_by_its_settings_alone(shop: Shop) -> None:
    read, code, learn = shop.stages()
    some = (read, code, replace(learn, reads=("read",), uses=("code",), needs=lambda config: ("code",) if config.generate.ranker else ()))
    config = config_of(shop.folder)
    run_one("read", config, some)
    with pytest.raises(RunError, match="learn needs code, which .* does not hold"):
        run_one("learn", replace(config, generate=replace(config.generate, ranker=1.0)), some)
    [evaluate] = [stage for stage in STAGES if stage.name == "evaluate"]
    assert evaluate.needs(config) == ()
    assert evaluate.needs(replace(config, generate=replace(config.generate, ranker=1.0))) == ("rank",)


def test_the_plan_tells_what_a_run_would_do_and_writes_nothing(shop: Shop) -> None:
    stages, names = shop.stages(), ["read", "code", "learn"]
    config = config_of(shop.folder)
    assert plan(config, names, stages) == [(name, "not made yet") for name in names]
    assert not (shop.folder / "run").exists()
    shop.run(config)
    assert plan(config, names, stages) == [(name, None) for name in names]
    changed = plan(config_of(shop.folder, sid={"width": 128}), names, stages)
    assert changed == [
        ("read", None),
        ("code", "made with other settings: sid.width was 256 and is now 128"),
        ("learn", "code is made anew"),
    ]


def test_every_stage_writes_configuration_versions_metrics_and_its_stamp(shop: Shop) -> None:
    config = config_of(shop.folder)
    shop.run(config)
    run = Run(config.run_dir)
    assert run.config() == config
    assert json.loads(run.path("versions.json").read_text())["python"]
    assert [(line["stage"], "stage_seconds" in line) for line in run.metrics()] == [
        (n, s) for n in ("read", "code", "learn") for s in (False, True)
    ]
    assert sorted(path.name for path in run.path("stages").iterdir()) == ["code.json", "learn.json", "read.json"]


def test_a_stage_that_writes_nothing_is_reported(shop: Shop) -> None:
    lazy = Stage(name="lazy", about="", work=lambda config, run: None, folder="lazy")
    with pytest.raises(RunError, match="stage lazy ended without writing"):
        run_all(config_of(shop.folder), (lazy,))


def test_a_stage_that_the_settings_do_without_makes_none_stale(shop: Shop) -> None:
    read, code, learn = shop.stages()
    learn = replace(learn, skips=lambda config: () if config.model.width == 64 else ("code",))
    wide, narrow = config_of(shop.folder, model={"width": 128}), config_of(shop.folder)
    run_all(wide, (read, code, learn))
    run_one("code", replace(wide, force=True), (read, code, learn))
    assert why_stale(learn, wide, Run(wide.run_dir)) is None
    run_all(narrow, (read, code, learn))
    run_one("code", replace(narrow, force=True), (read, code, learn))
    assert why_stale(learn, narrow, Run(narrow.run_dir)) == "code was made anew since"


def test_text_codes_do_not_depend_on_an_encoder_that_nobody_wants(shop: Shop) -> None:
    stage = next(stage for stage in STAGES if stage.name == "sid")
    assert stage.inputs(config_of(shop.folder)) == ["prepare"]
    assert stage.inputs(config_of(shop.folder, sid={"vectors": "fused"})) == ["prepare", "fuse"]


def together(at_once: int, *, workers: int = 1, reads: tuple[str, ...] = ()) -> tuple[Stage, ...]:
    """Two training stages, each of which waits a moment for the other and writes whether it came. The second reads `reads`."""
    both = threading.Barrier(2)

    def work(name: str) -> Callable[[Config, Run], None]:
        def stage(config: Config, run: Run) -> None:
            try:
                both.wait(10 if at_once > 1 else 0.2)
                met = True
            except threading.BrokenBarrierError:
                both.reset()
                met = False
            run.path(name).mkdir(exist_ok=True)
            (run.path(name) / "met.json").write_text(json.dumps(met))

        return stage

    return (
        Stage(name="learn", about="", work=work("learn"), folder="learn", workers=lambda config: workers),
        Stage(name="judge", about="", work=work("judge"), folder="judge", workers=lambda config: workers, reads=reads),
    )


def met(run: Run) -> list[bool]:
    return [json.loads((run.path(name) / "met.json").read_text()) for name in ("learn", "judge")]


def test_stages_that_need_nothing_of_each_other_may_run_side_by_side(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster={"stages_at_once": 2, "cpus": 2, "object_store_gb": 0.1})
    run_all(config, together(2))
    assert met(Run(config.run_dir)) == [True, True]
    assert all(why_stale(stage, config, Run(config.run_dir)) is None for stage in together(2))


@pytest.mark.parametrize(
    ("at_once", "workers", "cpus", "reads"),
    [(1, 1, 2, ()), (2, 1, 2, ("learn",)), (2, 1, 1, ()), (2, 1000, 2, ())],
    ids=["unless told", "one reads the other", "one core", "no room"],
)
def test_stages_run_one_after_the_other(at_once: int, workers: int, cpus: int, reads: tuple[str, ...], tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster={"stages_at_once": at_once, "cpus": cpus, "object_store_gb": 0.1})
    run_all(config, together(1, workers=workers, reads=reads))
    assert met(Run(config.run_dir)) == [False, False]


def test_two_commands_do_not_work_in_one_run_folder(shop: Shop) -> None:
    config = config_of(shop.folder)

    def second(config: Config, run: Run) -> None:
        code = f"from oxyray.pipeline import *; from oxyray.pipeline import _alone\nwith _alone(Run({config.run_dir!r})): print('in')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert "RunError" in done.stderr
        assert "is in use by another oxyray (process" in done.stderr
        run.path("alone").mkdir()

    run_all(config, (Stage(name="alone", about="", work=second, folder="alone"),))
    assert shop.run(config) == ["read", "code", "learn"]


def test_a_job_borrows_what_fits_and_never_writes_through_it(shop: Shop) -> None:
    base, stages = config_of(shop.folder), shop.stages()
    shop.run(base)
    job = replace(config_of(shop.folder, model={"width": 128}), run_dir=str(shop.folder / "job"))
    assert borrow(Run(base.run_dir), Run(job.run_dir), job, "learn", stages) == ["read", "code"]
    shop.ran.clear()
    run_one("learn", job, stages)
    assert shop.ran == ["learn"]
    assert value(Run(job.run_dir), "learn") == 1000 + (1000 + 256) + 128
    run_one("code", replace(job, force=True), stages)  # made anew in the job's folder: the base keeps its own
    assert not Run(job.run_dir).path("code").is_symlink()
    assert why_stale(stages[1], base, Run(base.run_dir)) is None
    assert value(Run(base.run_dir), "code") == 1256


def test_what_was_borrowed_is_stale_once_its_lender_has_made_it_anew(shop: Shop) -> None:
    base, stages = config_of(shop.folder), shop.stages()
    shop.run(base)
    job, third = (replace(base, run_dir=str(shop.folder / name)) for name in ("job", "third"))
    borrow(Run(base.run_dir), Run(job.run_dir), job, "run", stages)
    borrow(Run(job.run_dir), Run(third.run_dir), third, "run", stages)  # of one that has borrowed it too
    assert [why_stale(stages[0], each, Run(each.run_dir)) for each in (base, job, third)] == [None, None, None]
    run_one("read", replace(base, force=True), stages)
    for each in (job, third):
        assert why_stale(stages[0], each, Run(each.run_dir)) == "the run that it is borrowed from has made it anew since"
    shop.ran.clear()
    run_all(third, stages)
    assert shop.ran == ["read", "code", "learn"]
    assert not Run(third.run_dir).path("data").is_symlink()


def test_a_stage_that_writes_in_place_does_not_write_into_the_base(shop: Shop) -> None:
    def grow(config: Config, run: Run) -> None:
        run.path("grown").mkdir(exist_ok=True)
        (run.path("grown") / f"{config.model.width}").write_text("x")

    stages = (Stage(name="grow", about="", work=grow, folder="grown", settings=("model",)),)
    base = config_of(shop.folder)
    run_all(base, stages)
    job = Run(shop.folder / "job")
    assert borrow(Run(base.run_dir), job, base, "run", stages) == ["grow"]
    run_all(replace(config_of(shop.folder, model={"width": 128}), run_dir=str(job.folder)), stages)
    assert [path.name for path in Run(base.run_dir).path("grown").iterdir()] == ["64"]
    assert [path.name for path in job.path("grown").iterdir()] == ["128"]


def test_a_job_borrows_anew_what_has_moved_or_no_longer_fits_and_never_stamps_unfinished_work(shop: Shop) -> None:
    base, stages = config_of(shop.folder), shop.stages()
    shop.run(base)
    job = replace(base, run_dir=str(shop.folder / "job"))
    lender, taker = Run(base.run_dir), Run(job.run_dir)
    taker.path("learn").mkdir(parents=True)  # begun and not finished
    assert borrow(lender, taker, job, "run", stages) == ["read", "code"]
    assert not taker.stamp("learn").exists()
    run_one("read", replace(base, force=True), stages)
    run_all(base, stages)
    assert borrow(lender, taker, job, "learn", stages) == ["read", "code"], "links of before are renewed"
    moved = lender.folder.rename(shop.folder / "moved")
    assert why_stale(stages[0], job, taker) == "not made yet"
    assert borrow(Run(moved), taker, job, "learn", stages) == ["read", "code"]
    shop.ran.clear()
    run_one("learn", job, stages)
    assert shop.ran == ["learn"]
    assert borrow(Run(moved), taker, replace(job, model=ModelConfig(width=128)), "learn", stages) == []


def test_a_job_borrows_what_its_stage_uses_unless_that_is_not_wanted(shop: Shop) -> None:
    measure = Stage(name="measure", about="d", work=shop.work("measure", shop.code), folder="measure", reads=("code",), uses=("learn",))
    base, stages = config_of(shop.folder), (*shop.stages(), measure)
    run_all(base, stages)
    force = replace(base, force=True)
    assert borrow(Run(base.run_dir), Run(shop.folder / "one"), force, "measure", stages) == ["read", "code", "learn"]
    assert borrow(Run(base.run_dir), Run(shop.folder / "two"), force, "measure", stages, used=False) == ["read", "code"]


def test_a_job_borrows_nothing_that_stands_on_what_does_not_fit(shop: Shop) -> None:
    base, stages = config_of(shop.folder), shop.stages()
    shop.run(base)
    other = config_of(shop.folder, data={"name": "shop", "source": "mall", "core": 5})
    assert borrow(Run(base.run_dir), Run(shop.folder / "job"), other, "run", stages) == []
    wider = config_of(shop.folder, sid={"width": 512})
    assert borrow(Run(base.run_dir), Run(shop.folder / "job2"), wider, "run", stages) == ["read"]


def test_the_shipped_table_reads_only_earlier_stages_and_known_settings() -> None:
    from oxyray.config.keys import groups, keys

    known = {key.name for key in keys()} | set(groups())
    for number, stage in enumerate(STAGES):
        assert set(stage.reads) <= {earlier.name for earlier in STAGES[:number]}
        assert set(stage.settings) | set(stage.speed) <= known
        assert callable(stage.function())


def test_the_sources_are_the_files_that_are_read_and_no_others_beside_them(tmp_path: Path) -> None:
    names = (
        "items.csv",
        "items.parquet",
        "events/2024/a.parquet",
        "exposures.parquet",
        "conf/data/shop.yaml",
        "runs/shop/data/items.parquet",
    )
    for name in (*names, "meta_Toys.jsonl", "Toys.jsonl.gz", "users.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def read(source: str, **more: object) -> list[str]:
        config = config_of(tmp_path, data={"name": "x", "source": source, "path": str(tmp_path), **more})
        return [str(path.relative_to(tmp_path)) for path in source_files(config)]

    assert read("tables") == ["events/2024/a.parquet", "exposures.parquet", "items.parquet"]
    assert read("files", events_file="items.*") == ["exposures.parquet", "items.csv", "items.parquet", "users.csv"]
    assert read("amazon_reviews", events_file="Toys.jsonl.gz") == ["Toys.jsonl.gz", "exposures.parquet", "meta_Toys.jsonl"]
    assert read("files") == []  # no file of events: `prepare` says so
    assert source_files(config_of(tmp_path)) == []
