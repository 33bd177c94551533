"""The report: opened once in a real browser, written from half-empty run folders, never trusting what the data says."""

import io
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from oxyray.evaluate.report import last_training, render, report
from oxyray.evaluate.report_align import told
from oxyray.evaluate.report_people import picture
from oxyray.evaluate.report_plots import Bar, Line, bars, line_chart, thinned, ticks
from oxyray.evaluate.runner import evaluate
from oxyray.files import write_json
from oxyray.run import Run
from tests.evaluate.shop import config as shop_config
from tests.evaluate.shop import prepared_run, whole_run

SECTIONS = ("results", "data", "training", "align", "sids", "people", "about")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    config, run = whole_run(tmp_path_factory.mktemp("shop"))
    run.write_config(config)
    run.write_versions()
    for step in range(1, 60):
        run.log("pretrain", {"loss": 9 / step, "lr": 0.001, "targets_per_second": 1000.0, "share_data": 0.2, "share_forward": 0.8}, step)
    run.log("pretrain", {"valid_loss": 3.0, "valid_hit": 0.1, "valid_ndcg": 0.05}, 30)
    run.log("pretrain", {"valid_loss": 2.0, "valid_hit": 0.2, "valid_ndcg": 0.06}, 59)
    for step in range(1, 9):
        run.log(
            "align", {"loss": 1.0, "reward/all/reward": 1 + step / 10, "reward/all/click": step / 10, "entropy": 5.0, "drift": 0.0}, step
        )
    run.log("align", {"valid_hit": 0.3, "valid_hit1": 0.1}, 8)
    write_json(run.path("align", "outcome.json"), {"start": 0.2, "best": 0.3, "best_step": 8})
    line = {"model": "ranker", "scenario": None, "head": "click", "positives": 7, "auc": 0.8, "gauc": None, "calibration_error": 0.01}
    write_json(run.path("rank", "metrics.json"), {"table": [line], "titles": {"ranker": "unified ranker"}, "items": 70, "pages": 9})
    evaluate(config, run)
    report(config, run)
    return config, run


def test_the_report_says_what_alignment_did():
    def lines(*hits):
        return [{"step": step, "valid_hit": hit} for step, hit in enumerate(hits)]

    better = {"start": 0.2, "best": 0.3, "best_step": 1}
    assert told(lines(0.2, 0.3), better) == "HR@10 on validation: 0.2000 before, 0.3000 at step 1, whose weights were kept."
    assert told(lines(0.2, 0.3, 0.25), better).endswith("Further training hurt: 0.2500 at the end.")
    hurt = told(lines(0.2, 0.1), {"start": 0.2, "best": 0.2, "best_step": 0})
    assert hurt == "Training hurt: no validation was above the start's HR@10 of 0.2000 (the last: 0.1000). The start was kept."


def test_the_page_holds_every_section_and_nothing_from_outside(reported):
    _, run = reported
    page = run.path("report", "report.html").read_text()
    for section in SECTIONS:
        assert f'id="{section}"' in page
    assert page.count('class="card person"') == 10
    assert page.count("<svg") >= 5
    assert "data:image/png;base64," in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert 'class="missing"' not in page
    assert "Thing number 3 &lt;b&gt;&amp;&lt;/b&gt; more" in page, "titles are text, not markup"


@pytest.mark.browser
def test_a_real_browser_shows_it_on_desk_and_phone(reported):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    _, run = reported
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = started.chromium.launch(executable_path=chromium, args=flags, timeout=120_000)
        try:
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
            page.goto(run.path("report", "report.html").as_uri(), timeout=120_000)
            for width in (390, 1280):
                page.set_viewport_size({"width": width, "height": 844})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                sizes = page.eval_on_selector_all(".plot", "plots => plots.map(p => [p.clientWidth, p.clientHeight])")
                assert len(sizes) >= 8
                assert all(across > 150 and down > 10 for across, down in sizes)
                small = page.eval_on_selector_all("svg text", "texts => texts.map(t => t.getBoundingClientRect().height)")
                assert min(small) >= 9, "lettering of the plots can be read"
                assert all(page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth > 0)"))
        finally:
            browser.close()
    assert not complaints


def test_missing_stages_are_said_with_the_stage_that_makes_them(tmp_path):
    config = shop_config(tmp_path)
    page = render(config, Run(config.run_dir))
    assert re.findall(r"<code>oxyray (\w+)</code> with", page) == [
        *("evaluate", "prepare", "pretrain", "align", "sid", "evaluate", "prepare"),
    ]
    config, run = prepared_run(tmp_path)
    report(config, run)
    page = run.path("report", "report.html").read_text()
    assert re.findall(r"<code>oxyray (\w+)</code> with", page) == ["evaluate", "pretrain", "align", "evaluate", "prepare"]
    assert "Coverage" in page


def test_a_resumed_training_is_one_curve():
    def line(step, loss):
        return {"stage": "pretrain", "step": step, "loss": loss}

    lines = [line(1, 9.0), line(2, 8.0), line(3, 7.0), {"resumed": True}, line(2, 8.5), line(3, 7.5), line(4, 7.0)]
    assert [(x["step"], x["loss"]) for x in last_training(lines)] == [(1, 9.0), (2, 8.5), (3, 7.5), (4, 7.0)]
    assert last_training([line(5, 1.0), line(1, 9.0)]) == [line(1, 9.0)]
    assert last_training([line(1, 9.0), line(2, 8.0), line(2, 7.0)]) == [line(1, 9.0), line(2, 7.0)]


def test_pictures_are_checked_and_made_small():
    large = io.BytesIO()
    Image.effect_noise((600, 400), 80).save(large, "PNG")
    shown = picture(large.getvalue())
    assert shown is not None
    assert shown.startswith("data:image/jpeg;base64,")
    assert len(shown) < 20_000
    assert picture(b"<svg onload=alert(1)>") is None
    assert picture(None) is None
    assert picture(b"\x89PNG" + b"rubbish" * 5000) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.031, 0.034), (7, 7), (0, 0), (-3, 12_345), (1e-9, 2e-9)])
def test_ticks_enclose_the_values(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 8


def test_charts_survive_odd_input():
    assert line_chart([], "step") == ""
    assert line_chart([Line("x", [1, 2], [float("nan"), float("inf")])], "step") == ""
    assert "<circle" in line_chart([Line("x", [1], [2.0])], "step")
    assert "<script" not in bars([Bar("<script>", 0.0)], 0.0)
    assert len(thinned([(float(i), 1.0) for i in range(10_001)])) <= 400


def test_styles_ship_with_the_package():
    assert (Path(__file__).parents[2] / "oxyray" / "evaluate" / "report.css").is_file()
