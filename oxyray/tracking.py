"""Send a run's metrics to a tracker (Weights & Biases), beside `metrics.jsonl` and never instead of it.

Stages write `metrics.jsonl` and know no tracker: lines come from training workers in other processes too. So the driver follows the file
and forwards each new line. `RUN/tracking.json` keeps the tracker's run id and how far the file was sent: a resumed run goes on under the
same id, and no line is sent twice. A tracker that fails later on is reported once and left; training does not stop for it.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from oxyray.config import TrackingConfig
from oxyray.errors import ConfigError
from oxyray.files import read_json, write_json
from oxyray.run import Run

log = logging.getLogger(__name__)
_POLL_S = 2.0


class Tracker(Protocol):
    def log(self, values: dict[str, Any], step: int | None) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """Each stage's values appear as `stage/name` over the stage's own step."""

    def __init__(self, config: TrackingConfig, run: Run, run_id: str, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("tracking=wandb: wandb is not installed: pip install 'oxyray[wandb]', or leave tracking=none") from None
        self._stages: set[str] = set()
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            id=run_id,
            resume="allow",
            name=run.folder.name,
            dir=str(run.folder),
            config=settings,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: dict[str, Any], step: int | None) -> None:
        stage = str(values["stage"])
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        sent = {f"{stage}/{name}": value for name, value in values.items() if name not in ("stage", "step", "time")}
        self._run.log(sent | ({} if step is None else {f"{stage}/step": step}))

    def finish(self) -> None:
        self._run.finish()


class Follower:
    """Forwards the lines that `metrics.jsonl` gains to `tracker`, starting where the last follower of this run ended."""

    def __init__(self, run: Run, tracker: Tracker, run_id: str, sent_bytes: int = 0) -> None:
        self._run, self._tracker, self._run_id, self._sent = run, tracker, run_id, sent_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._broken = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send what is left and end the tracker's run."""
        self._stop.set()
        self._thread.join(timeout=60)
        self._tracker.finish()

    def _loop(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(_POLL_S)
            self._forward()

    def _forward(self) -> None:
        path = self._run.path("metrics.jsonl")
        if self._broken or not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self._sent)
            lines = file.read().splitlines(keepends=True)
        try:
            for line in lines:
                if not line.endswith(b"\n"):  # still being written
                    break
                self._send(line)
                self._sent += len(line)
        except Exception:  # the tracker's own errors are of any kind; the metrics are safe in the file
            self._broken = True
            log.exception("tracking stopped")
            print("tracking stopped, see the log; metrics.jsonl has everything")
        write_json(self._run.path("tracking.json"), {"id": self._run_id, "sent_bytes": self._sent})

    def _send(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # a line torn by an earlier death
            return
        self._tracker.log(values, values.get("step"))


@contextmanager
def tracked(config: TrackingConfig, run: Run, settings: dict[str, Any]) -> Iterator[None]:
    """Follow the run's metrics while the body runs, when the configuration asks for it."""
    if not config.wandb:
        yield
        return
    path = run.path("tracking.json")
    state: dict[str, Any] = read_json(path) if path.exists() else {"id": uuid.uuid4().hex[:10], "sent_bytes": 0}
    write_json(path, state)
    follower = Follower(run, WandbTracker(config, run, state["id"], settings), state["id"], state["sent_bytes"])
    follower.start()
    try:
        yield
    finally:
        follower.stop()
