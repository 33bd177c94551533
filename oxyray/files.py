"""Writing so that a crash, a full disk or a killed process never leaves half a file or folder under its final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oxyray.errors import RunError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (file or folder, as the caller makes it); on success it takes `path`'s place in one rename.

    On any error the temporary is removed and what stood at `path` stays. A full disk is a RunError that says so.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(beside)
    try:
        yield beside
        _sync(beside)
        if path.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            _remove(old)
            path.rename(old)
            beside.rename(path)
            _remove(old)
        else:
            os.replace(beside, path)
        _sync_entry(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"no space left on the disk of {path.parent}: free some or set run_dir to another disk; nothing earlier was lost"
            ) from error
        raise
    finally:
        _remove(beside)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed inside `whole` left in `folder`; what they had just put aside takes its place again.

    Only for a folder that no other process is writing to.
    """
    for left in sorted(folder.glob(".*.old")) + sorted(folder.glob(".*.part")):
        name, _, pid = left.name[1:].rpartition(".")[0].rpartition(".")
        if not (name and pid.isdigit()):
            continue
        if left.suffix == ".old" and not folder.joinpath(name).exists():
            left.rename(folder / name)
        else:
            _remove(left)


def files_under(path: str | Path) -> list[Path]:
    """The file itself, or all files in the folder and its folders but hidden ones, in order."""
    place = Path(path).expanduser()
    return [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))


def marks(paths: Sequence[Path]) -> list[list[str | int]]:
    """Name, size and time of each file: they change when a file does."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def write_json(path: Path, value: Any) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises RunError when the file is absent or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: run the stage that writes it first") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not valid JSON ({error}): delete it and run its stage again") from None


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _sync_entry(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
