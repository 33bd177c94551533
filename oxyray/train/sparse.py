"""Embedding tables sharded by rows over the workers, with TorchRec's fused optimizer (paper 3.1's sparse side, first version).

They live beside the DeepSpeed engine, never in it: `deepspeed.initialize` would broadcast rank 0's shard over the others'. `lookup` is
collective: all ranks call it together, with as many ids as each likes, none included. The optimizer is fused into the backward pass of
the looked-up rows, so a training step makes one lookup and one backward (see `oxyray.train.engine`). TorchRec divides gradients by the
number of ranks, as DeepSpeed does.

EmbeddingCollection is used, not one-id bags: on CPU both cost the same within noise (`benchmarks/pretrain.py` measures it), and sequences
let ranks and tables differ in how many ids they ask for. What is private API of TorchRec 1.8 is held by tests/train/test_sparse.py.

Legend: n ids, D row width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oxyray.config import OptimConfig
from oxyray.errors import TrainingError
from oxyray.files import whole
from oxyray.model.tables import BLOCK_ROWS, PlainTables, TableSpec, TensorWriter, check_ids, initial_rows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's rows `first : first + len(weight)` of one table, as views into the live memory: writing to them writes the table.
    `state` are the fused optimizer's tensors by name, one row or value a table row."""

    table: str
    first: int
    weight: Tensor
    state: dict[str, Tensor]


class ShardedTables:
    """Needs an initialised process group. Each rank holds about rows / world of every table."""

    def __init__(self, specs: Sequence[TableSpec], optim: OptimConfig, device: torch.device, seed: int) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.device, self._lr = device, optim.table_lr
        dims = sorted({spec.dim for spec in specs})  # a collection's tables must have one width
        groups = [[spec for spec in specs if spec.dim == dim] for dim in dims]
        self._modules = [(_shard(group, optim, device), [spec.name for spec in group]) for group in groups]
        for shard in self.shards():
            shard.weight.copy_(initial_rows(self.specs[shard.table], seed, shard.first, shard.first + len(shard.weight)))

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows (n, D) by table, with the graph that the fused backward runs through. Tables not named in `ids` are asked for no row;
        names that are no table are passed over. Ids below 0 give zeros. Collective. Raises DataError on an id behind the end."""
        asked = {name: ids.get(name, torch.empty(0, dtype=torch.int64)).to(self.device) for name in self.specs}
        for name, ids_n in asked.items():
            check_ids(name, ids_n, self.specs[name].rows)
        real = {name: torch.where(ids_n >= 0, ids_n, 0) for name, ids_n in asked.items()}
        rows: dict[str, Tensor] = {}
        for module, names in self._modules:
            found = module(_features({name: real[name] for name in names}))
            rows |= {name: found[name].values() for name in names}
        return {name: torch.where((asked[name] >= 0)[:, None], rows[name], 0.0) for name in self.specs if name in ids}

    def set_lr(self, lr: float) -> None:
        """Learning rate of the updates of later lookups: the rate is bound when rows are looked up, not when the gradient comes."""
        self._lr = lr
        for module, _ in self._modules:
            for group in module.fused_optimizer.param_groups:
                group["lr"] = lr
            module.fused_optimizer.step()

    def shards(self) -> Iterator[Shard]:
        """This rank's part of every table."""
        for module, _ in self._modules:
            states = module.fused_optimizer.state_dict()["state"]
            for key, sharded in module.state_dict().items():
                state = {full.split(".")[-1]: _local(value) for full, value in states.get(key, {}).items()}
                for part in sharded.local_shards():
                    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
                    yield Shard(key.split(".")[1], part.metadata.shard_offsets[0], part.tensor, tensors)

    def export(self, path: Path) -> None:
        """Write the full tables to one file, from rank 0, a block of rows at a time. Collective."""
        shapes = {name: ((spec.rows, spec.dim), torch.float32) for name, spec in self.specs.items()}
        if dist.get_rank():
            for _ in self._blocks():
                pass
            return
        with whole(path) as part, TensorWriter(part, shapes) as writer:
            for name, rows_nD in self._blocks():
                writer.write(name, rows_nD)

    def plain(self) -> PlainTables:
        """Full tables in this process's memory, on every rank. Collective; for tables that fit."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.specs}
        for name, rows_nD in self._blocks(everywhere=True):
            rows[name].append(rows_nD.clone())
        return PlainTables({name: torch.cat(blocks) for name, blocks in rows.items()})

    def _blocks(self, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, spec in self.specs.items():
            for first in range(0, spec.rows, 16 * BLOCK_ROWS):
                last = min(first + 16 * BLOCK_ROWS, spec.rows) if everywhere or dist.get_rank() == 0 else first
                with torch.no_grad():
                    yield name, self.lookup({name: torch.arange(first, last)})[name]


@dataclass
class Leaves:
    """The leaf cut: rows of a step's distinct ids, cut off from the tables' graph. Micro-batches read slices of `leaf`; `backward` hands
    the gradients that gathered there to the tables at once, so that the fused optimizer runs once a step."""

    rows: dict[str, Tensor]
    leaf: dict[str, Tensor]
    inverse: list[dict[str, Tensor]]

    @classmethod
    def look_up(cls, tables: ShardedTables, wanted: Sequence[Mapping[str, Tensor]]) -> Leaves:
        """One lookup of the distinct ids that the micro-batches want. Collective."""
        # A table that nobody here asks for is looked up too: its backward must be entered by every rank.
        distinct = {name: torch.empty(0, dtype=torch.int64) for name in tables.specs}
        inverse: list[dict[str, Tensor]] = [{} for _ in wanted]
        for name in tables.specs:
            users = [micro for micro, asked in enumerate(wanted) if name in asked]
            ids = [wanted[micro][name].to(tables.device) for micro in users]
            if ids:
                distinct[name], index_n = torch.unique(torch.cat(ids), return_inverse=True)
                for micro, part_n in zip(users, torch.split(index_n, [len(x) for x in ids]), strict=True):
                    inverse[micro][name] = part_n
        rows = tables.lookup(distinct)
        return cls(rows, {name: value.detach().requires_grad_() for name, value in rows.items()}, inverse)

    def slice(self, micro: int) -> dict[str, Tensor]:
        """Rows of one micro-batch, in its own order."""
        return {name: self.leaf[name].index_select(0, index_n) for name, index_n in self.inverse[micro].items()}

    def finite(self) -> bool:
        """False where a gradient holds a NaN or an infinity."""
        return all(leaf.grad is None or bool(torch.isfinite(leaf.grad.sum())) for leaf in self.leaf.values())

    def backward(self) -> None:
        """Update the tables. Collective: a rank without any id takes part too."""
        gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self.leaf.items()}
        torch.autograd.backward([self.rows[name] for name in gradients], list(gradients.values()))


def _shard(specs: Sequence[TableSpec], optim: OptimConfig, device: torch.device) -> Any:
    import torchrec  # noqa: F401 - loads the embedding kernels
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    world = dist.get_world_size()
    too_small = [spec.name for spec in specs if spec.rows < world]
    if too_small:
        raise TrainingError(f"table {too_small[0]!r} has fewer rows than there are workers ({world}): use fewer workers")
    tables = [EmbeddingConfig(name=s.name, num_embeddings=s.rows, embedding_dim=s.dim, feature_names=[s.name]) for s in specs]
    module = EmbeddingCollection(tables=tables, device=torch.device("meta"))
    kind = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}[optim.table_optimizer]
    settings = {"lr": optim.table_lr} | ({} if optim.table_optimizer == "sgd" else {"eps": 1e-8})
    apply_optimizer_in_backward(kind, module.parameters(), settings)
    sharder = EmbeddingCollectionSharder()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # workers on this machine: which device of it a rank has
    if device.type == "cuda":
        places: list[Any] = [None] * world
        dist.all_gather_object(places, (here, torch.cuda.current_device()))
        check_spread(places)
    plan = construct_module_sharding_plan(
        module, {spec.name: row_wise() for spec in specs}, sharder=sharder, local_size=here, world_size=world, device_type=device.type
    )
    return sharder.shard(module, plan, ShardingEnv.from_process_group(dist.group.WORLD), device=device)


def check_spread(places: Sequence[tuple[int, int]]) -> None:
    """`places`: each rank's (workers on its machine, device). TorchRec knows a rank's device by its number alone. Raises TrainingError."""
    here = places[0][0]
    if any(workers != here or device != rank % here for rank, (workers, device) in enumerate(places)):
        told = ", ".join(str(workers) for workers, device in places if device == 0)
        raise TrainingError(f"the machines have {told} workers: sharded tables need as many on each; use a number that all can have alike")


def _features(ids: Mapping[str, Tensor]) -> Any:
    """The ids as TorchRec's jagged form: one bag a table."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    lengths = torch.tensor([len(ids_n) for ids_n in ids.values()], dtype=torch.int64)
    values = torch.cat(list(ids.values()))
    return KeyedJaggedTensor(keys=list(ids), values=values, lengths=lengths.to(values.device))


def _local(value: Any) -> Any:
    """A sharded tensor's local part; anything else as it is."""
    parts = value.local_shards() if hasattr(value, "local_shards") else None
    return value if parts is None else (parts[0].tensor if parts else None)
