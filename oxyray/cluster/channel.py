"""Arrays from one process to several in one collective: NCCL where each has a GPU of its own, else gloo.

A channel is a process group beside whatever groups its members are in already; none of these is touched. Its members are fixed, rank 0
sends. One that dies breaks it: the others get ChannelLost within the limit, and who wants to go on opens another. (NCCL has no limit for
the moment in which its communicator is made: a member that dies just then leaves the others to who waits for them.) Arrays travel as bytes,
packed into large buckets in the order of their names, so a model of many small parameters is a few broadcasts.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from oxyray.cluster.wait import first_line
from oxyray.errors import ClusterError

if TYPE_CHECKING:
    import torch

Array = np.ndarray

_BUCKET = 1 << 28  # bytes, where an array is not larger by itself
_ALIGNED = 16
_POLL_S = 0.0005


class ChannelLost(ClusterError):
    """Not all members took part in time."""


@dataclass(frozen=True)
class Seat:
    """A member's place in a channel; two of one channel differ in `rank` alone. Rank 0 listens at `address`:`port`."""

    address: str
    port: int
    rank: int
    size: int
    seconds: float


@dataclass(frozen=True)
class Form:
    """What a receiver must know of an array beforehand."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


def forms(arrays: Mapping[str, Array]) -> list[Form]:
    return [Form(name, str(value.dtype), value.shape) for name, value in sorted(arrays.items())]


class Channel:
    """Opening waits for all members. Every member makes the same calls; each raises ChannelLost when that cannot be done within the seat's
    `seconds`."""

    def __init__(self, seat: Seat) -> None:
        import torch

        self.seat, self.device = seat, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self._broken():
            self._group = _group(seat, self.device)
            self._finish(self._group.barrier())

    def send(self, arrays: Mapping[str, Array]) -> None:
        """Rank 0's part."""
        import torch

        for bucket, size in _buckets(forms(arrays)):
            buffer = torch.empty(size, dtype=torch.uint8)
            for form, first in bucket:
                flat = np.ascontiguousarray(arrays[form.name]).reshape(-1)
                buffer[first : first + form.nbytes] = torch.from_numpy(flat.view(np.uint8))
            self._broadcast(buffer.to(self.device))

    def receive(self, expected: Sequence[Form]) -> dict[str, torch.Tensor]:
        """The others' part: what rank 0 sends, whose `forms` these are."""
        import torch

        found: dict[str, torch.Tensor] = {}
        for bucket, size in _buckets(expected):
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._broadcast(buffer)
            for form, first in bucket:
                kind = torch.from_numpy(np.empty(0, form.dtype)).dtype
                found[form.name] = buffer[first : first + form.nbytes].view(kind).view(form.shape)
        return found

    def _broadcast(self, buffer: torch.Tensor) -> None:
        with self._broken():
            self._finish(self._group.broadcast(buffer, 0))

    def _finish(self, work: Any) -> None:
        """Wait for a collective, by our own clock: NCCL's watchdog, which has a longer one, ends the whole process."""
        if self.device.type == "cpu":
            work.wait()
            return
        ends = time.monotonic() + self.seat.seconds
        while not work.is_completed():
            if time.monotonic() > ends:
                self._group.abort()
                raise RuntimeError("no answer in time")
            time.sleep(_POLL_S)

    @contextmanager
    def _broken(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            who = f"member {self.seat.rank} of {self.seat.size}"
            raise ChannelLost(f"{who} did not reach the others within {self.seat.seconds:g} s ({first_line(error)})") from error


def _group(seat: Seat, device: torch.device) -> Any:
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=seat.seconds)
    store = dist.TCPStore(seat.address, seat.port, seat.size, seat.rank == 0, limit)  # type: ignore[attr-defined]
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, seat.rank, seat.size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 100 * limit
    return dist.ProcessGroupNCCL(store, seat.rank, seat.size, options)


def _buckets(all_forms: Sequence[Form]) -> Iterator[tuple[list[tuple[Form, int]], int]]:
    """What goes together, each array with its first byte, and how many bytes that is."""
    bucket: list[tuple[Form, int]] = []
    size = 0
    for form in all_forms:
        room = -(-form.nbytes // _ALIGNED) * _ALIGNED
        if bucket and size + room > _BUCKET:
            yield bucket, size
            bucket, size = [], 0
        bucket.append((form, size))
        size += room
    if bucket:
        yield bucket, size
