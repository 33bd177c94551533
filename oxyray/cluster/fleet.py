"""Processes that do the same work, any of which may die: rollout workers, reward actors.

Jobs have keys. A job goes to an idle member; when its member dies the job goes to another, so that each key is answered once or the fleet
raises. Ray starts a dead member anew; before it serves again it is enrolled (gets the current weights). A member that died and came back
between two jobs, when nobody looked, says so itself: each job names the enrolment that it needs. Health and calls are kept by RLlib's
FaultTolerantActorManager; what it does not know is here: jobs, enrolment, limits. Its `FaultAwareApply`, which ends the process on any
error, is not used: an error of a job is raised here, with its own type.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from oxyray.cluster.wait import ProcessLost, first_line, own_error
from oxyray.errors import ClusterError

Enrol = tuple[str, dict[str, Any]]  # a method and its arguments
_POLL_S = 0.005
_PING_S = 0.5


class Member:
    """What an actor of a fleet extends: the methods that the manager and the fleet call."""

    enrolment = 0

    def ping(self) -> str:
        return "pong"

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def enter(self, method: str, enrolment: int, **arguments: Any) -> None:
        """Be enrolled, for the so-manieth time in the fleet's life."""
        getattr(self, method)(**arguments)
        self.enrolment = enrolment

    def serve(self, method: str, enrolment: int, **arguments: Any) -> Any:
        """Do a job. Raises ProcessLost in a process that was not enrolled."""
        if self.enrolment != enrolment:
            raise ProcessLost("it died while it was idle, and came back")
        return getattr(self, method)(**arguments)


@dataclass
class _Job:
    method: str
    arguments: dict[str, Any]


@dataclass
class Fleet:
    """`name` is for messages (`rollout worker`). `seconds` is the longest wait for a job; a member that passes it is killed, and counts as
    dead. More than `max_restarts` deaths end the fleet."""

    name: str
    actors: list[Any]
    seconds: float
    max_restarts: int
    restarts: int = 0
    enrolment: Enrol | None = None
    enrolments: int = 0
    _jobs: dict[Hashable, _Job] = field(default_factory=dict)
    _waiting: deque[Hashable] = field(default_factory=deque)
    _running: dict[int, tuple[Hashable, float]] = field(default_factory=dict)
    _done: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)  # whole tracebacks; we say it in one line
        self._manager: Any = FaultTolerantActorManager(self.actors, max_remote_requests_in_flight_per_actor=1)
        self._lost: set[int] = set()
        self._since = dict[int, float]()

    def enrol(self, method: str, *, at_once: tuple[str, dict[int, dict[str, Any]]] | None = None, **arguments: Any) -> None:
        """Call `method` on every member, and from now on on every newcomer before it serves. Only while no job runs. `at_once` names
        another method for the members that it has arguments for."""
        if self._running:
            raise ClusterError(f"{self.name}: jobs are running; a fleet is enrolled while it rests")
        self.enrolment, self.enrolments = (method, arguments), self.enrolments + 1
        members = self.healthy()
        if at_once is None:
            return self._enrolled(members)
        other, each = at_once
        self._enrolled([member for member in members if member in each], [(other, each[member]) for member in members if member in each])
        return self._enrolled([member for member in members if member not in each])

    def healthy(self) -> list[int]:
        """The members that are known to live."""
        found: list[int] = self._manager.healthy_actor_ids()
        return found

    def submit(self, key: Hashable, method: str, **arguments: Any) -> None:
        """Queue a job; nothing happens to a key that is queued, running or answered already."""
        if key not in self._jobs:
            self._jobs[key] = _Job(method, arguments)
            self._waiting.append(key)
        self.pump()

    def collect(self, keys: Iterable[Hashable], what: str) -> list[Any]:
        """The answers of these jobs, in order; each is given once. Raises a job's own error, ClusterError when too many members died or
        nothing came for three times `seconds`."""
        wanted = list(keys)
        last, progress = time.monotonic(), len(self._done)
        while any(key not in self._done for key in wanted):
            self.pump(_POLL_S)
            if len(self._done) > progress:
                last, progress = time.monotonic(), len(self._done)
            if time.monotonic() - last > 3 * self.seconds:
                missing = [key for key in wanted if key not in self._done]
                raise ProcessLost(f"{what}: no {self.name} answered within {3 * self.seconds:g} s; {len(missing)} jobs are missing")
        for key in wanted:
            del self._jobs[key]
        return [self._done.pop(key) for key in wanted]

    def idle(self) -> bool:
        """Nothing is running and nothing waits."""
        self.pump()
        return not self._running and not self._waiting

    def rest(self, what: str) -> None:
        """Wait until nothing runs."""
        ends = time.monotonic() + 3 * self.seconds
        while not self.idle():
            if time.monotonic() > ends:
                raise ProcessLost(f"{what}: {len(self._running)} {self.name}s are still at work after {3 * self.seconds:g} s")
            self.pump(_POLL_S)

    def forget(self) -> None:
        """Drop every job, running ones too: their answers will not be looked at."""
        for member in list(self._running):
            self._manager.set_actor_state(member, False)
            self._manager.set_actor_state(member, True)
        for kept in (self._jobs, self._waiting, self._running, self._done):
            kept.clear()  # type: ignore[attr-defined]

    def pump(self, seconds: float = 0.0) -> None:
        """Take answers, look after the dead, hand out jobs. Waits so many seconds at most, and less where all that runs is answered."""
        if seconds and not self._running:
            time.sleep(seconds)
        for result in self._manager.fetch_ready_async_reqs(timeout_seconds=seconds):
            if result.actor_id not in self._running:
                continue
            key, _ = self._running.pop(result.actor_id)
            if result.ok:
                self._done[key] = result.get()
            else:
                self._failed(result.actor_id, key, result.get())
        for member, (key, since) in list(self._running.items()):
            if time.monotonic() - since > self.seconds:
                self._kill(member)
                del self._running[member]
                self._failed(member, key, ProcessLost(f"no answer within {self.seconds:g} s"))
        self._recover()
        for member in self._manager.healthy_actor_ids():
            if not self._waiting:
                break
            if member not in self._running:
                self._hand_out(member, self._waiting.popleft())

    def stop(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def _hand_out(self, member: int, key: Hashable) -> None:
        job = self._jobs[key]
        asked = job.arguments | {"method": job.method, "enrolment": self.enrolments}
        sent = self._manager.foreach_actor_async("serve", tag=str(key), kwargs=[asked], remote_actor_ids=[member])
        if sent:
            self._running[member] = key, time.monotonic()
        else:
            self._waiting.appendleft(key)

    def _failed(self, member: int, key: Hashable, error: Any) -> None:
        import ray

        lost = isinstance(error, ProcessLost) or (
            isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)
        )
        if not lost:
            self._alive(member)  # it lives, whatever the manager makes of an error
            raise own_error(error)
        self._waiting.appendleft(key)
        self._died(member, own_error(error) if isinstance(error, ProcessLost) else error)

    def _died(self, member: int, error: BaseException) -> None:
        self._manager.set_actor_state(member, False)
        self._lost.add(member)
        self.restarts += 1
        if self.restarts > self.max_restarts:
            raise ClusterError(
                f"{self.name} {member} was lost ({first_line(error)}), and {self.max_restarts} restarts (align.max_restarts) are used up: "
                "see its log, free memory, or allow more"
            )
        print(f"{self.name} {member} was lost ({first_line(error)}): another takes its place", flush=True)

    def _recover(self) -> None:
        """Dead members that live again are enrolled, then serve."""
        unhealthy = [member for member in self._manager.actor_ids() if not self._manager.is_actor_healthy(member)]
        for member in unhealthy:
            if member not in self._lost:  # the manager noticed before us: while nothing was asked of it
                self._died(member, ProcessLost("it died while it was idle"))
        due = [member for member in unhealthy if time.monotonic() - self._since.get(member, 0.0) > 1.0]
        if not due:
            return
        self._since |= dict.fromkeys(due, time.monotonic())
        back = [
            r.actor_id for r in self._manager.foreach_actor("ping", healthy_only=False, remote_actor_ids=due, timeout_seconds=0.5) if r.ok
        ]
        if back:
            self._enrolled(back)

    def _enrolled(self, members: list[int], each: list[Enrol] | None = None) -> None:
        import ray

        if self.enrolment is None or not members:
            for member in members:
                self._alive(member)
            return
        asked = [
            arguments | {"method": method, "enrolment": self.enrolments} for method, arguments in each or [self.enrolment] * len(members)
        ]
        results = self._manager.foreach_actor(
            "enter", kwargs=asked, healthy_only=False, remote_actor_ids=members, timeout_seconds=self.seconds
        )
        answered, raised = set(), None
        for result in results:
            answered.add(result.actor_id)
            if result.ok:
                self._alive(result.actor_id)
            elif isinstance(result.get(), ray.exceptions.RayError) and not isinstance(result.get(), ray.exceptions.RayTaskError):
                self._died(result.actor_id, result.get())
            else:
                self._alive(result.actor_id)  # it lives, whatever the manager makes of an error
                raised = raised or own_error(result.get())
        for member in set(members) - answered:
            self._kill(member)
            self._died(member, ProcessLost(f"{asked[members.index(member)]['method']} took more than {self.seconds:g} s"))
        if raised is not None:
            raise raised

    def _alive(self, member: int) -> None:
        self._lost.discard(member)
        self._manager.set_actor_state(member, True)

    def _kill(self, member: int) -> None:
        """End a member that hangs; Ray starts it anew."""
        import ray

        ray.kill(self.actors[member], no_restart=False)
