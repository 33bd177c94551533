"""Bounded waits for other processes. A wait that ends without an answer says what it waited for; a process that died is told apart from an
error that it raised, since only the first is mended by another try."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from oxyray.errors import ClusterError, OxyrayError


class ProcessLost(ClusterError):
    """A process or its node is gone, or gave no answer in time."""


class GroupLost(ProcessLost):
    """Processes that work in step lost one of them: the others are of no use, and begin anew together."""


def answers(refs: Sequence[Any], seconds: float, what: str) -> list[Any]:
    """What the calls behind `refs` returned, in order. The first failure ends the wait, whichever call it is of: where processes work in
    step, the others would wait for the lost one.

    Raises the call's own OxyrayError, ProcessLost (`what` names the work) when a process died or `seconds` passed, else the call's error.
    """
    import ray

    waiting, found = list(refs), dict[Any, Any]()
    ends = time.monotonic() + seconds
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=max(0.0, ends - time.monotonic()))
        if not ready:
            done = len(refs) - len(waiting)
            raise ProcessLost(f"{what}: {len(waiting)} of {len(refs)} processes gave no answer in {seconds:g} s ({done} did)")
        for ref in ready:
            found[ref] = answer(ref, what)
    return [found[ref] for ref in refs]


def lost_among(refs: Sequence[Any], seconds: float, what: str) -> ProcessLost | None:
    """That one of the processes behind `refs` died, if it comes out within `seconds`; their errors are passed over."""
    import ray

    waiting, ends = list(refs), time.monotonic() + seconds
    while waiting and time.monotonic() < ends:
        ready, waiting = ray.wait(waiting, timeout=max(0.0, ends - time.monotonic()))
        for ref in ready:
            try:
                answer(ref, what)
            except ProcessLost as error:
                return error
            except Exception:
                continue
    return None


def answer(ref: Any, what: str) -> Any:
    """What a finished call returned; raises as `answers`."""
    import ray

    try:
        return ray.get(ref, timeout=60)
    except ray.exceptions.RayTaskError as error:
        raise own_error(error) from error
    except ray.exceptions.RayError as error:
        raise ProcessLost(f"{what}: a process was lost ({first_line(error)})") from error


def own_error(error: Any) -> BaseException:
    """The error that a task raised, without Ray's wrapping."""
    cause: BaseException = getattr(error, "cause", None) or error
    if isinstance(cause, OxyrayError):
        return type(cause)(*cause.args)
    return cause


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
