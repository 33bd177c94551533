"""What a command says, kept: one folder an attempt under `RUN/logs/`, one file a process in it, and `latest` leading to the newest.

Everything printed and logged goes to `main.log`, with warnings and, where a command dies, the traceback. The terminal shows what is
printed.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_FORMAT = "%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"


class _Tee(io.TextIOBase):
    """A text stream that also writes to a file."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextmanager
def attempt(run_folder: Path, words: list[str]) -> Iterator[Path]:
    """Keep what happens inside in a new folder of `run_folder/logs`;

    gives its `main.log`. `words` is the command, written on the first line.
    """
    folder = run_folder / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    _point(folder.parent / "latest", folder.name)
    path = folder / "main.log"
    with open(path, "a", buffering=1) as file:
        file.write(f"$ {' '.join(words)}\n")
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.addFilter(lambda record: record.name.startswith("oxyray") or record.levelno >= logging.WARNING)
        root, level = logging.getLogger(), logging.getLogger().level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        stdout = sys.stdout
        sys.stdout = _Tee(stdout, file)  # type: ignore[assignment]
        try:
            yield path
        except BaseException:
            file.write(traceback.format_exc())
            raise
        finally:
            sys.stdout = stdout
            logging.captureWarnings(False)
            root.removeHandler(handler)
            root.setLevel(level)


def log_warnings(run_folder: Path, name: str) -> None:
    """A process's warnings go to `NAME.log` in the attempt's folder, where there is one."""
    folder = run_folder / "logs" / "latest"
    if folder.is_dir():
        handler = logging.FileHandler(folder / f"{name}.log", delay=True)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logging.getLogger().addHandler(handler)


def _point(link: Path, target: str) -> None:
    beside = link.with_name(f".latest.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, link)
