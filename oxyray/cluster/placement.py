"""Where processes go: one placement group for all, so that a run starts with everything or says what is missing.

A `Plan` is plain data and needs no Ray. Shares of a GPU are for memory's sake: processes of one device take turns by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from oxyray.errors import ClusterError

Bundle = dict[str, float]
_UNITS = 10_000  # Ray counts resources in fractions of so many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`bundles` are reserved together; `places` says for each role's processes in which bundle they run, and `gpus` their share."""

    bundles: list[Bundle]
    places: dict[str, list[int]]
    gpus: dict[str, float]


def colocated(learners: int, rollouts: int, judges: int, gpu: bool) -> Plan:
    """Learners and rollout workers share devices: a bundle is a device with one learner, one rollout worker, or both. Judges share the
    first devices."""
    size = max(learners, rollouts)
    places = {"learner": list(range(learners)), "rollout": list(range(rollouts)), "judge": [n % size for n in range(judges)]}
    cpus = [float(sum(place.count(bundle) for place in places.values())) for bundle in range(size)]
    bundles = [{"CPU": cpu} | ({"GPU": 1.0} if gpu else {}) for cpu in cpus]
    per_judge = _share(0.1, -(-judges // size))
    return Plan(bundles=bundles, places=places, gpus={"learner": 0.5, "rollout": 0.4, "judge": per_judge} if gpu else {})


def split(learners: int, rollouts: int, judges: int, gpu: bool) -> Plan:
    """Every learner and every rollout worker has a device of its own; judges share the rollout workers' devices."""
    places = {
        "learner": list(range(learners)),
        "rollout": [learners + n for n in range(rollouts)],
        "judge": [learners + n % rollouts for n in range(judges)],
    }
    cpus = [float(sum(place.count(bundle) for place in places.values())) for bundle in range(learners + rollouts)]
    bundles = [{"CPU": cpu} | ({"GPU": 1.0} if gpu else {}) for cpu in cpus]
    per_judge = _share(0.2, -(-judges // rollouts))
    return Plan(bundles=bundles, places=places, gpus={"learner": 1.0, "rollout": 0.8, "judge": per_judge} if gpu else {})


def _share(of: float, processes: int) -> float:
    """What each of them gets, rounded down to what Ray counts in: it would round to the nearest, and find no room for the last one."""
    return math.floor(round(of * _UNITS) / processes) / _UNITS


@contextmanager
def reserved(plan: Plan, seconds: float, mend: str) -> Iterator[Any]:
    """The placement group for the body. Raises ClusterError when Ray cannot reserve it within `seconds`, with what there is and what was
    asked for."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    asked = {kind: sum(bundle.get(kind, 0) for bundle in plan.bundles) for kind in ("CPU", "GPU")}
    have = ray.cluster_resources()
    if lacking := [kind for kind, count in asked.items() if have.get(kind, 0) < count]:
        told = ", ".join(f"{asked[kind]:g} {kind}s are asked for, Ray has {have.get(kind, 0):g}" for kind in lacking)
        raise ClusterError(f"{told}: {mend}")
    group = placement_group(plan.bundles, strategy="PACK")
    try:
        if not group.wait(seconds):
            raise ClusterError(
                f"Ray could not reserve {plan.bundles} within {seconds:g} s (free: {ray.available_resources()}): others use them, or no "
                f"node has room for a bundle; {mend}"
            )
        yield group
    finally:
        remove_placement_group(group)


def options(plan: Plan, group: Any, role: str, number: int) -> dict[str, Any]:
    """Ray's options for the actor of this role and number."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=plan.places[role][number])
    return {"num_cpus": 1, "num_gpus": plan.gpus.get(role, 0), "scheduling_strategy": place}
