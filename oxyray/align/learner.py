"""The learning side of the loop, without Ray: candidates and rewards in, a better policy out (paper 2.4.3).

One learner is one rank of a process group; all learners make the same calls. The engine, the sharded tables and the checkpoints are those
of pre-training.

Legend: B requests, G candidates of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oxyray.align.lesson import AlignedPolicy, Lesson
from oxyray.align.requests import Requests
from oxyray.align.rollout import Pools, Rolled, paths
from oxyray.cluster.publish import PublishedShard
from oxyray.config import AlignConfig, Config
from oxyray.data.batch import Batch
from oxyray.data.stream import SegmentStream
from oxyray.errors import TrainingError
from oxyray.files import whole
from oxyray.model.inputs import Inputs
from oxyray.model.policy import Policy
from oxyray.model.saved import about_model, read_model, write_model
from oxyray.run import Run
from oxyray.train import checkpoint
from oxyray.train.engine import TrainEngine
from oxyray.train.validate import Validation

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a piece's candidates were worth, and the items really taken (NaN for synthetic requests)."""

    reward_BG: Array
    target_reward_B: Array


class Learner:
    """Starts from the supervised model (or from the newest checkpoint in `checkpoints`), and publishes its tables into `folder`."""

    def __init__(
        self, config: Config, settings: AlignConfig, folder: Path, checkpoints: Path, rank: int, world: int, device: str = "cpu"
    ) -> None:
        self.config, self.settings, self.rank, self.world = config, settings, rank, world
        run = Run(config.run_dir)
        self.inputs = Inputs.load(run)
        self.requests = Requests(self.inputs, config, settings)
        model = config.model
        start, tables = read_model(run.need("pretrain", "model", stage="pretrain"), self.inputs)
        policy = self.inputs.policy(model)
        policy.load_state_dict(start.state_dict())
        aligned = AlignedPolicy(policy, settings.objective, settings.supervised_rate, settings.temperature)
        found = checkpoint.latest(checkpoints)
        if found:
            aligned.load_state_dict(found.weights())
        self.engine = TrainEngine(
            aligned, self.inputs.tables(model), settings.optim, total_steps=settings.steps, device=device,
            micro_batches=settings.pieces // world, seed=settings.seed, moments=found.moments() if found else None,
        )  # fmt: skip
        if found:
            found.load_tables(self.engine.tables)
        else:
            for shard in self.engine.tables.shards():
                shard.weight.copy_(tables.tables[shard.table][shard.first : shard.first + len(shard.weight)])
        self._checkpoints, self._policy = checkpoints, policy
        self.pools = Pools(self.inputs, policy.tree)  # behind the engine, which moves the policy to its device
        shards = list(self.engine.tables.shards())
        self._published = {s.table: PublishedShard(folder, s.table, rank, s.first, *s.weight.shape) for s in shards}
        self._touched: dict[str, list[Array]] | None = None  # ids; None: all, as nothing was published yet
        self._supervised = self._stream()
        self._validation = Validation(config, self.inputs, rank, world, settings.eval_requests)
        self._twin: Policy | None = None

    @property
    def step(self) -> int:
        return self.engine.step_count

    def learn(self, pieces: Sequence[tuple[Rolled, Judged]]) -> dict[str, float]:
        """One optimizer step on this rank's pieces; what the log wants to know. Raises TrainingError when they are of another step."""
        step = self.engine.step_count
        lessons = []
        supervised = next(self._supervised) if self._supervised else [None] * len(pieces)
        for (rolled, judged), more in zip(pieces, supervised, strict=True):
            if rolled.step != step:
                raise TrainingError(f"candidates of step {rolled.step} came to step {step}: the loop is out of order")
            lessons.append(self._lesson(rolled, judged, more))
        self._note(lessons)
        stats = self.engine.step(lessons)
        found = {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, "weight": stats.weight, **stats.parts}
        return found | {f"seconds/{name}": value for name, value in stats.seconds.items()}

    def publish(self, version: int) -> dict[str, Array]:
        """Publish this rank's tables as of `version`; rank 0 also gives the dense weights. Collective."""
        touched = self._touched_anywhere()
        for shard in self.engine.tables.shards():
            rows = np.arange(len(shard.weight))
            if touched is not None:
                rows = touched.get(shard.table, rows[:0]) - shard.first
                rows = rows[(rows >= 0) & (rows < len(shard.weight))]
            if shard.weight.is_cpu:
                self._published[shard.table].publish_from(version, rows, shard.weight.numpy())
            else:
                self._published[shard.table].publish(version, rows, shard.weight[torch.from_numpy(rows)].cpu().numpy())
        self._touched = {}
        weights = self.engine.gather_dense()
        return {name.removeprefix("policy."): value.numpy() for name, value in weights.items()}

    def validate(self) -> dict[str, float]:
        """Loss and hit rates by generation on the validation sample. Collective."""
        return self._validation.measure(self.engine, self._whole_policy()) if self._validation.requests else {}

    def save(self, meta: dict[str, Any]) -> None:
        """A checkpoint, whole or absent. Collective."""
        checkpoint.save(
            self._checkpoints, self.engine, meta | {"objective": asdict(self.settings.objective)}, self.config.train.keep_checkpoints
        )

    def export(self, folder: Path, **about: Any) -> None:
        """The aligned model, in the form that pre-training leaves its own. Collective."""
        place: AbstractContextManager[Any] = whole(folder) if self.rank == 0 else nullcontext(folder)
        with place as part:
            weights = {name.removeprefix("policy."): value for name, value in self.engine.gather_dense().items()}
            if self.rank == 0:
                write_model(part, weights, about_model(self.config.model, self.inputs, step=self.step, **about))
            self.engine.tables.export(part / "tables.safetensors")

    def close(self) -> None:
        self.engine.close()
        for shard in self._published.values():
            shard.close()

    def _whole_policy(self) -> Policy:
        """The policy, or a copy where ZeRO-3 keeps only pieces of it. Collective."""
        if self.settings.optim.zero_stage < 3:
            return self._policy
        self._twin = self._twin or self.inputs.policy(self._policy.config).to(self.engine.device)
        self._twin.load_state_dict({name.removeprefix("policy."): value for name, value in self.engine.whole().items()})
        return self._twin

    def _lesson(self, rolled: Rolled, judged: Judged, supervised: Batch | None) -> Lesson:
        batch = self.requests.at(rolled.step)[rolled.piece]
        path_BJL = paths(self.inputs, torch.from_numpy(rolled.leaf_BG), self.requests.taken(rolled.step, rolled.piece))
        return Lesson(
            requests=batch,
            legal=self.pools.legal(batch),
            path_BGL=path_BJL[:, :-1],
            behaviour_BGL=torch.from_numpy(rolled.behaviour_BGL),
            reward_BG=torch.from_numpy(judged.reward_BG),
            target_path_BL=path_BJL[:, -1],
            target_behaviour_BL=torch.from_numpy(rolled.target_behaviour_BL),
            target_reward_B=torch.from_numpy(judged.target_reward_B),
            reference_BJL=None if rolled.reference_BJL is None else torch.from_numpy(rolled.reference_BJL),
            supervised=supervised,
            seed=hash((self.settings.seed, rolled.step, rolled.piece)) % 2**63,
        )

    def _stream(self) -> Any:
        """Logged targets for the supervised term: this rank's micro-batches, from the step on that the engine stands at."""
        settings, model = self.settings, self.config.model
        if not settings.supervised_rate:
            return None
        stream = SegmentStream(
            self.inputs.prepared, self.inputs.collator(model, self.config.train), history=model.history,
            targets_per_step=settings.supervised_targets, seed=settings.seed + 1, one_query=not model.causal_encoder,
        )  # fmt: skip
        epoch, within = divmod(self.engine.step_count, stream.steps_per_epoch())
        stream.load_state_dict({"epoch": epoch, "step": within})
        return stream.batches(self.rank, self.world, settings.pieces // self.world)

    def _note(self, lessons: Sequence[Lesson]) -> None:
        """Remember which rows the step touches."""
        if self._touched is None:
            return
        for lesson in lessons:
            for name, ids in lesson.lookups().items():
                self._touched.setdefault(name, []).append(torch.unique(ids).cpu().numpy())

    def _touched_anywhere(self) -> dict[str, Array] | None:
        """Ids that any learner's steps touched since the last publication, by table; None: all. Collective."""
        if self._touched is None:
            return None
        mine = {name: np.unique(np.concatenate(ids)) for name, ids in self._touched.items()}
        everywhere: list[Any] = [mine]
        if self.world > 1:
            everywhere = [None] * self.world
            dist.all_gather_object(everywhere, mine)
        names = {name for found in everywhere for name in found}
        return {name: np.unique(np.concatenate([found[name] for found in everywhere if name in found])) for name in names}
