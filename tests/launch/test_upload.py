"""What a job takes along: held to the package that Ray writes, and to a head that answers as Ray's does. No Ray is started."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from oxyray.cluster import upload as asked
from oxyray.cluster.upload import EXCLUDES, MOST_BY_HTTP, Upload, check_size, check_words, knock, look, outcome, token
from oxyray.errors import ClusterError, ConfigError

ROOT = Path(__file__).parents[2]
NAMES = [
    "data",
    "runs",
    "oxyray",
    "conf",
    "tables",
    "käse",
    "a_b",
    "x.py",
    "y.csv",
    "z.parquet",
    "notes.md",
    ".env",
    "__pycache__",
    ".venv",
]
PATTERNS = ["*.csv", "tables/", "/conf", "oxyray/**", "!x.py", "data", "*", "!tables", "# told", "", "käse/", "a_b", "conf/*.md", "**/x.py"]


def grow(folder: Path, chance: random.Random, depth: int = 0) -> None:
    """A tree at random, with ignore files at random in it."""
    for ignore in (".gitignore", ".rayignore"):
        if chance.random() < (0.5 if depth == 0 else 0.15):
            (folder / ignore).write_text("\n".join(chance.sample(PATTERNS, 3)) + "\n")
    for name in chance.sample(NAMES, 7):
        if "." in name[1:] or name == ".env" or depth == 3:
            (folder / name).write_bytes(b"x" * chance.randrange(3000))
        else:
            (folder / name).mkdir()
            if chance.random() < 0.8:
                grow(folder / name, chance, depth + 1)


def package(root: Path, to: Path) -> tuple[set[str], int]:
    """The names in the zip file that Ray itself makes of a job's working directory, and its size."""
    from ray._private.runtime_env.packaging import create_package
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    def put(working_dir: str, excludes: list[str], is_file: bool = False) -> None:
        create_package(working_dir, to, include_gitignore=True, excludes=excludes)

    upload_working_dir_if_needed({"working_dir": str(root), "excludes": list(EXCLUDES)}, include_gitignore=True, upload_fn=put)
    with zipfile.ZipFile(to) as file:
        return set(file.namelist()), to.stat().st_size


@pytest.mark.parametrize("seed", range(12))
def test_the_listing_is_what_ray_uploads(seed: int, tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    grow(root, random.Random(seed))
    found = look(root)
    names, size = package(root, tmp_path / "package.zip")
    assert set(found.files) == names
    assert found.size == size
    for folder, _, files in os.walk(root):  # whatever is not in the package is accounted for
        for name in files:
            path = (Path(folder) / name).relative_to(root)
            behind = any(path.is_relative_to(left) for left in found.left_out)
            assert behind != (path.as_posix() in names), path


def test_of_this_checkout_goes_what_a_job_needs_and_no_more() -> None:
    found = look(ROOT)
    parts = [path for part in ("oxyray", "conf", "hydra_plugins") for path in (ROOT / part).rglob("*")]
    needed = [path for path in parts if path.suffix in (".py", ".yaml", ".txt", ".css")]
    assert len(needed) > 100
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= set(found.files)
    assert not [name for name in found.files if name.startswith((".git/", ".venv/", "runs/", "multirun/")) or "__pycache__" in name]
    assert found.size < 20 * 2**20
    check_size(found)
    assert f"{len(found.files)} files" in found.text()
    assert ".git" in found.left_out
    assert Upload(ROOT, {}, ("a/__pycache__", "b/__pycache__", "c/d")).text().endswith("left out: __pycache__ (2 times), c/d")


def test_an_upload_that_the_cluster_would_refuse_is_refused_here() -> None:
    check_size(Upload(Path("/x"), {"a": MOST_BY_HTTP - 200}, ()))
    with pytest.raises(ClusterError, match=r"the upload has 100.0 MiB.*name the largest files above in .rayignore"):
        check_size(Upload(Path("/x"), {"a": MOST_BY_HTTP}, ()))


@pytest.fixture
def checkout(tmp_path: Path) -> Upload:
    root = tmp_path / "checkout"
    for name in ("tables/items.csv", "shop/items.csv", "shop/events.parquet", "mine/items.csv", "conf/config.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / ".gitignore").write_text("tables/\n")
    (tmp_path / "elsewhere").mkdir()
    return look(root)


SHARED = "run_dir=/shared/runs/x"


MISSED = {
    "data=mall": "run_dir: must be a full path that the whole cluster shares",
    "run_dir=runs/x": "run_dir: must be a full path",
    f"-m {SHARED} seed=1,2": "hydra.sweep.dir: must be a full path",
    f"{SHARED} data.path=tables": "not uploaded, as .gitignore, .rayignore or the excludes match tables/items.csv: put it on a disk",
    f"{SHARED} +data.path='tables'": "data.path=tables: not uploaded",
    f"{SHARED} data.path=tables/items.csv": "data.path=tables/items.csv: not uploaded",
    f"{SHARED} data.path=shop": "match shop/events.parquet: put it on a disk that the whole cluster shares and give its full path there",
    f"{SHARED} data.path=../elsewhere": "data.path=../elsewhere: not uploaded, as it lies outside of the checkout",
    f"{SHARED} data.path=nowhere": "data.path=nowhere: no such file or folder in the checkout",
    f"{SHARED} --config-dir=mine/../tables": "--config-dir=mine/../tables: not uploaded",
    f"{SHARED} --config-dir mine/../tables": "--config-dir=mine/../tables: not uploaded",
}


@pytest.mark.parametrize(("words", "complaint"), MISSED.items(), ids=MISSED)
def test_a_path_that_the_job_would_miss_or_lose_is_an_error(words: str, complaint: str, checkout: Upload) -> None:
    with pytest.raises(ConfigError) as caught:
        check_words("run", words.split(), checkout)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_the_job_finds_are_taken(checkout: Upload) -> None:
    assert check_words("run", [SHARED, "data.path=mine", "data.items_columns.title=a/b", "tracking=wandb"], checkout) == []
    assert check_words("run", ["run_dir=~/runs/x", "data.path=/shared/tables"], checkout) == []
    assert check_words("run", ["-m", SHARED, "hydra.sweep.dir=/shared/sweep"], checkout) == []
    assert check_words("doctor", [], checkout) == []
    assert check_words("pretrain", ["--help"], checkout) == []
    (note,) = check_words("run", [SHARED, f"data.path={checkout.root}/tables"], checkout)
    assert "a full path is not uploaded" in note


def test_the_command_ends_with_one_line(checkout: Upload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(checkout.root)
    assert asked.main(["check", "", "run", SHARED, "data.path=tables"]) == 2
    said = capsys.readouterr()
    assert [line.startswith("error: data.path=tables") for line in said.err.splitlines()] == [False, False, False, True]
    assert said.out == ""
    assert asked.main(["check", "", "run", SHARED]) == 0
    mode, environment = capsys.readouterr().out.splitlines()
    assert mode == "none"
    assert json.loads(environment) == {"working_dir": str(checkout.root), "excludes": list(EXCLUDES)}


def test_the_token_is_found_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert token() == "from-home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH=.*other: cannot be read"):
        token()
    (tmp_path / "other").write_text("from-file")
    assert token() == "from-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "said")
    assert token() == "said"


class Head(BaseHTTPRequestHandler):
    """Answers as a Ray head with the token `right` does."""

    def do_GET(self) -> None:
        jobs = {
            "done": {"status": "SUCCEEDED", "driver_exit_code": 0},
            "bad": {"status": "FAILED", "driver_exit_code": 2},
            "killed": {"status": "FAILED", "driver_exit_code": -9},
            "lost": {"status": "FAILED", "driver_exit_code": None, "message": "its node is gone"},
            "stopped": {"status": "STOPPED", "driver_exit_code": -15},
            "busy": {"status": "RUNNING"},
        }
        said = self.headers.get("Authorization")
        if self.path == "/api/authentication_mode":
            self._say(200, {"authentication_mode": "token"})
        elif said != "Bearer right":
            self._say(403 if said else 401, {})
        elif self.path == "/api/version":
            self._say(200, {"ray_version": "9.9.9"})
        else:
            job = jobs.get(self.path.rpartition("/")[2])
            self._say(200 if job else 404, job or {})

    def _say(self, status: int, values: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(asked, "_PATIENCE_S", 2.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_head_says_how_it_wants_to_be_spoken_to(head: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert knock(head) == "token"
    assert "the cluster runs Ray 9.9.9" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ClusterError, match="refuses the token: bring the head's own"):
        knock(head)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(ClusterError, match="asks for a token and none is here: set RAY_AUTH_TOKEN, or copy"):
        knock(head)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match="no answer from a Ray head .*ssh -N -L"):
            knock(f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_job_ends_as_its_command_did(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [outcome(head, job) for job in ("done", "bad", "killed", "lost", "stopped")] == [0, 2, 137, 1, 143]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: job bad failed with exit status 2"
    assert said[-2:] == ["error: job lost failed: its node is gone", "error: job stopped was stopped"]
    with pytest.raises(ClusterError, match="knows no job other: it was not submitted"):
        outcome(head, "other")
    with pytest.raises(ClusterError, match="job busy is RUNNING, but its log ended here: follow it again"):
        outcome(head, "busy")
