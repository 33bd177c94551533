"""`oxyray sid encode`, `lookup` and `--report`, as people call them; the page opened in a real browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oxyray.cli.sid import read_items
from oxyray.data.tables import titled
from oxyray.run import Run
from oxyray.sid import stage
from oxyray.sid.catalog import Catalog
from oxyray.sid.encoder import item_texts
from tests.sid.test_stage import cache, made
from tests.test_cli import said

__all__ = ["cache"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Run:
    config, run = made(tmp_path_factory.mktemp("asked"), cache, collisions="none")
    stage.sid(config, run)
    run.write_config(config)
    return run


def test_lookup_there_and_back(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    codes = Catalog.load(run.path("sid", "catalog")).codes_IL[3]
    name = "-".join(map(str, codes))
    code, out, _ = said(capsys, "sid", "lookup", "item=i03", f"run_dir={run.folder}")
    assert code == 0
    assert re.fullmatch(rf"i03 +{name} +black lipstick\n", out)
    for asked in (name, str(codes[0])):
        assert "i03" in said(capsys, "sid", "lookup", f"code={asked}", f"run_dir={run.folder}")[1]


def test_ids_of_a_csv_file_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("item_id,title,price\n0012345,a lamp,3.5\n7,a rug,\n")
    table = read_items(tmp_path / "new.csv")
    assert (table["item_id"].to_pylist(), table["price"].to_pylist()) == (["0012345", "7"], [3.5, None])
    (tmp_path / "new.csv").write_text("item_id,title,category_1\n1,1984,007\n2,,008\n")
    table = titled(read_items(tmp_path / "new.csv"))
    assert item_texts(table) == ["1984. Category: 007", "2. Category: 008"], "as `prepare` would have read them"
    assert titled(table.drop_columns(["title"]))["title"].to_pylist() == ["1", "2"]


def test_encode_says_sids_and_drift_and_writes_them(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, out_file = tmp_path / "new.csv", tmp_path / "codes.parquet"
    new.write_text("item_id,title,category_1\nn1,red lipstick,Lips\nn2,a submarine,Boats\n")
    code, out, _ = said(capsys, "sid", "encode", f"items={new}", f"out={out_file}", f"run_dir={run.folder}")
    assert code == 0
    assert "drift: not known, as fewer than 100 items were held out" in out
    table = pq.read_table(out_file)
    assert table.column_names == ["item_id", "code_1", "code_2"]
    assert table.num_rows == 2
    assert len(Catalog.load(run.path("sid", "catalog"))) == 54, "the run's own catalogue stays as it is"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lookup"], "item or code: one of them must be given"),
        (["lookup", "item=nobody"], "not in catalogue"),
        (["lookup", "code=a-b"], "code=a-b: expected codes with dashes"),
        (["lookup", "item=i03,", "i04"], "i04: expected key=value, without spaces between several"),
        (["lookup", "code=1-2-3-4"], "a SID of this catalogue has 2 codes, got 4"),
        (["encode"], "items: must be given"),
        (["encode", "items=/nowhere.parquet"], "items=/nowhere.parquet: cannot be read"),
        (["encode", "item=3"], "item: `oxyray sid encode` takes items and out"),
        (["decode"], "sid decode: expected encode or lookup"),
        (["--report", "depth=3"], "depth: `oxyray sid --report` takes run_dir or data"),
    ],
)
def test_what_cannot_be_answered_is_one_line(run: Run, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, _, err = said(capsys, "sid", *words, f"run_dir={run.folder}")
    assert code in (1, 2)
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_items_without_an_id_are_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"title": ["x"]}), tmp_path / "bad.parquet")
    _, _, err = said(capsys, "sid", "encode", f"items={tmp_path / 'bad.parquet'}", f"run_dir={run.folder}")
    assert "no column item_id; it has title" in err
    pq.write_table(pa.table({"item_id": ["x"], "name": ["a lamp"]}), tmp_path / "bad.parquet")
    _, _, err = said(capsys, "sid", "encode", f"items={tmp_path / 'bad.parquet'}", f"run_dir={run.folder}")
    assert "no text to read: it needs one or more of the columns title, brand" in err


@pytest.mark.browser
def test_the_page_in_a_real_browser(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "sid", "--report", f"beside={run.folder}", f"run_dir={run.folder}")
    assert code == 0
    assert "sid_report.html" in out
    text = run.path("sid_report.html").read_text()
    assert "<script" not in text
    assert "black lipstick" in text
    assert "belong to more than one item" in text
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"], timeout=120_000)
        try:
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
            page.goto(run.path("sid_report.html").as_uri(), timeout=120_000)
            for width in (390, 1280):
                page.set_viewport_size({"width": width, "height": 844})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("details").count() == 8
            page.locator("summary").first.click()
            assert page.locator("details[open] h4").first.is_visible()
        finally:
            browser.close()
    assert not complaints
