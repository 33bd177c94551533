"""Whole or absent: errors, full disks and processes killed while they write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oxyray.errors import RunError
from oxyray.files import clear_leftovers, read_json, whole, write_json

_KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from oxyray.files import whole
with whole(Path(sys.argv[1])) as part:
    part.mkdir()
    (part / 'half').write_text('x')
    os.kill(os.getpid(), signal.SIGKILL)
"""
_KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from oxyray.files import whole
before = Path.rename
def rename(self, target):
    before(self, target)
    if str(target).endswith('.old'):
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
with whole(Path(sys.argv[1])) as part:
    part.mkdir()
    (part / 'new').write_text('x')
"""


def killed(code: str, path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=120).returncode == -9


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_take_their_place_when_they_are_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        write_json(tmp_path / "file.json", content)
        with whole(tmp_path / "folder") as part:
            part.mkdir()
            (part / content).write_text(content)
    assert read_json(tmp_path / "file.json") == "new"
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["file.json", "folder"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", "old")

    def write_half() -> None:
        with whole(tmp_path / "file.json") as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert read_json(tmp_path / "file.json") == "old"
    assert names(tmp_path) == ["file.json"]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no space left on the disk"), whole(tmp_path / "file.json"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_process_killed_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    with whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "old").write_text("x")
    killed(_KILLED_WHILE_WRITING, tmp_path / "folder")
    assert names(tmp_path / "folder") == ["old"]
    assert len(names(tmp_path)) == 2
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["folder"]


def test_a_process_killed_between_its_two_renames_loses_nothing(tmp_path: Path) -> None:
    with whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "old").write_text("x")
    killed(_KILLED_BETWEEN_THE_RENAMES, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


def test_other_hidden_files_are_left_alone(tmp_path: Path) -> None:
    for name in (".lock", ".part", ".mine.part", f".x.{os.getpid()}.tmp"):
        (tmp_path / name).write_text("x")
    clear_leftovers(tmp_path)
    assert len(names(tmp_path)) == 4


def test_broken_json_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="is not valid JSON .* delete it and run its stage again"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(RunError, match="is missing"):
        read_json(tmp_path / "none.json")
