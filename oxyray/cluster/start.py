"""Start Ray, or join the one that runs.

`address=local` starts a Ray of this command's own, whatever address an older cluster left in the environment. `auto` and `HOST:PORT`
join. A process that already has Ray (a sweep's job, a training worker) keeps it. A cluster that does not answer is an error after a
limit, not a hang. Every stage that uses Ray gets it here: `ray_for` for the time of its work; stages that follow each other share one by
`one_ray`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from oxyray.config import ClusterConfig
from oxyray.errors import ClusterError

_LEAST_STORE = 80 * 2**20  # Ray refuses a smaller object store
_TRIES, _PAUSE_S = 6, 0.5
_shared_cpus: int | None = None  # within `one_ray`: what its Ray offers at least


def start(config: ClusterConfig, local_cpus: int | None = None, quiet: bool = False) -> str:
    """Make sure that this process has Ray; gives one line on how. `local_cpus` is what a local Ray offers at least (tests, small machines).
    `quiet` keeps what other processes print out of this one's output; it stays in Ray's own logs.

    Raises ClusterError when Ray does not start or answer within `config.start_timeout_s` seconds.
    """
    import ray

    if ray.is_initialized():
        return "Ray is already there"
    # Of several clusters on a machine the environment names the one that is meant (a Ray job's does so, too).
    address = os.environ.get("RAY_ADDRESS", "auto") if config.address == "auto" else config.address
    if address not in ("local", "auto"):
        _probe(address, config.start_timeout_s)
        _bring_token()
    with _limit(config.start_timeout_s, f"Ray ({config.address}) did not answer within {config.start_timeout_s:.0f} s"):
        try:
            if address != "local":
                ray.init(address=address, log_to_driver=not quiet, logging_level=logging.ERROR)
                return f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}"
            cpus = max(config.cpus or os.cpu_count() or 1, local_cpus or 0)
            # Ray's workers would otherwise yield to whatever else runs here (niceness 15); they are what this machine is to do.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # Nor are idle ones of use beforehand: all that is started here has variables of its own, and so processes of its own.
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=store_bytes(config.object_store_gb),
                include_dashboard=False,
                log_to_driver=not quiet,
                logging_level=logging.ERROR,
            )
            return f"started Ray with {cpus} CPUs"
        except ClusterError:
            raise
        except Exception as error:  # Ray raises bare ones too: a node that is slow to start does
            mend = "see `oxyray doctor`"
            if address != "local":
                mend = "start one with `ray start --head`, bring its token (RAY_AUTH_TOKEN), or leave cluster.address=local"
            raise ClusterError(
                f"cluster.address={config.address}: {(str(error).splitlines() or [type(error).__name__])[0]}: {mend}"
            ) from error


@contextmanager
def ray_for(config: ClusterConfig, workers: int, otherwise: str = "") -> Iterator[None]:
    """Ray for the body: the one that this process has, else one started or joined, which it leaves afterwards. A local one offers CPUs for
    `workers` at least. `otherwise` is the override that does without Ray, for the message.

    Raises ClusterError as `start` does.
    """
    import ray

    mine = not ray.is_initialized() and _shared_cpus is None
    try:
        start(config, local_cpus=max(workers, _shared_cpus or 0), quiet=True)
    except ClusterError as error:
        raise ClusterError(f"{error}{f'; {otherwise} does without Ray' if otherwise else ''}") from error
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def one_ray(processes: int) -> Iterator[None]:
    """The stages in the body share the Ray that the first of them starts or joins; it is left after the body. A local one offers CPUs for
    `processes` at least. Starting Ray takes a few seconds, so a body that needs none starts none."""
    global _shared_cpus
    before, _shared_cpus = _shared_cpus, processes
    had = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    try:
        yield
    finally:
        _shared_cpus = before
        if not had and before is None and "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def room_for(config: ClusterConfig, workers: int) -> bool:
    """Whether so many workers find a free core each, and a GPU each where there are GPUs. Starts or joins Ray as `ray_for`."""
    import ray

    kinds = ["CPU"]
    with ray_for(config, 1):
        kinds += ["GPU"] if ray.cluster_resources().get("GPU") else []
        for _ in range(_TRIES):  # what the stage before held comes free a moment later
            free = ray.available_resources()
            if found := all(free.get(kind, 0) >= workers for kind in kinds):
                break
            time.sleep(_PAUSE_S)
    own = config.address == "local"  # its cores may be more than the machine has
    return found and (not own or (config.cpus or os.cpu_count() or 1) >= workers)


def store_bytes(wanted_gb: float) -> int:
    """Bytes for the object store: as asked, but within what /dev/shm has free, as Ray would otherwise fall back to a slow disk."""
    wanted = int(wanted_gb * 2**30)
    with suppress(OSError):
        wanted = min(wanted, int(shutil.disk_usage("/dev/shm").free * 0.9))
    return max(wanted, _LEAST_STORE)


def _bring_token() -> None:
    """Show this user's Ray token to a cluster that is joined by its address, as Ray itself does only for `auto`: `ray start --head` asks
    for it wherever there is one. RAY_AUTH_MODE, where set, stands.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available as bring

    ray_log = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = ray_log.level
    ray_log.setLevel(logging.ERROR)  # it would advise on the cluster's behalf
    try:
        bring(warn_if_disabled=False)
    finally:
        ray_log.setLevel(before)


def _probe(address: str, seconds: float) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address={address}: expected local, auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=min(seconds, 20)).close()
    except OSError as error:
        raise ClusterError(f"cluster.address={address}: no answer ({error}): is the cluster running, and the port open?") from None


@contextmanager
def _limit(seconds: float, message: str) -> Iterator[None]:
    """Raise ClusterError in the main thread when the body takes longer.

    Elsewhere there is no way to interrupt it, and Ray's own limits stand.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise ClusterError(message)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
