"""World: this process among the others of its run; the same interface with one process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paceline.errors import ConfigError
from paceline.world import meeting
from paceline.world.dtensors import forget_other_meshes
from paceline.world.environment import adopt_slurm, is_srun_task
from paceline.world.layout import Parallel

_POLL = 0.001  # seconds between two looks of who waits for the others


class World:
    """The processes of a run and the device of this one.

    A process group is created from the launcher's environment (torchrun, srun, `paceline train
    --nproc`) unless one exists. `close` destroys only what this object created, and has to run on
    every exit path, since exiting with a live group can abort the interpreter.

    Args:
        parallel: the layout, checked against the number of processes, and the timeout.

    Attributes:
        device: where this process computes.
        rank, size, local_rank: the rank of this process, the number of processes, and the rank on
            this machine.
        dp_rank, dp_size: this process's share of the data, and the number of shares.
        stage: this process's pipeline stage, with `Parallel(pipeline=...)`; else 0.
        part, parts: this process's part of what the loss is computed on, and the number of parts:
            shares of the data, and of each sequence with `Parallel(context=...)`.
        copies, shards: replicas of each model's state, and shares of the data per replica.
        timeout: seconds that a collective may wait.
        mesh: the DeviceMesh over which models are distributed, or None with one process.
        context_mesh: the processes that share this one's sequences, or None.
        expert_mesh: the processes of `mesh`, arranged for experts, which are split along its
            dimension "expert"; or None.
        control_group: a gloo group for small host-side messages, or None with one process.
        on_paper: whether it is simulated; see `WorldOnPaper`.
    """

    on_paper = False

    def __init__(self, parallel: Parallel | None = None) -> None:
        adopt_slurm()
        self.parallel = parallel or Parallel()
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = _device(self.local_rank)
        self.copies, self.shards = self.parallel.sizes(self.size)
        self.dp_size = self.copies * self.shards
        self._stage_size = self.size // self.parallel.pipeline
        self.stage, place = divmod(self.rank, self._stage_size)
        self.dp_rank = place // (self._stage_size // self.dp_size)
        self.parts = self._stage_size // self.parallel.tensor
        self.part = place // self.parallel.tensor
        self.mesh: DeviceMesh | None = None
        self.context_mesh: DeviceMesh | None = None
        self.expert_mesh: DeviceMesh | None = None
        self.control_group: Any = None
        self._parts_group: Any = None
        self._stage_groups: list[Any] = []
        self._owns_group = False
        self.timeout = self.parallel.timeout

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a line about the run, on rank 0."""
        if self.is_main:
            print(f"paceline: {text}", file=sys.stderr, flush=True)

    @property
    def leads_part(self) -> bool:
        """Whether this process is the first of its part."""
        return self.stage == 0 and self.rank % self.parallel.tensor == 0

    @property
    def dp_mesh(self) -> DeviceMesh | None:
        """The mesh without the dimensions of tensor and pipeline parallelism."""
        return _dp_dimensions(self.mesh)

    @property
    def expert_dp_mesh(self) -> DeviceMesh | None:
        """The ranks that have the same experts, as replicas and shards."""
        return _dp_dimensions(self.expert_mesh)

    @property
    def reads_are_free(self) -> bool:
        """Whether reading a tensor's value does not wait for a device."""
        return self.device.type == "cpu"

    def open(self) -> World:
        """Joins the process group; does nothing in a world of one."""
        if self.size == 1 or self.mesh is not None:
            return self
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
            meeting.join(backend, self.rank, self.size, timedelta(seconds=self.timeout))
            self._owns_group = True
        self.control_group = self.new_group()
        self._check_one_layout()
        if self.parts < self.size:
            step, size = self.parallel.tensor, self._stage_size
            self._parts_group, _ = dist.new_subgroups_by_enumeration(
                [
                    list(range(stage + first, stage + size, step))
                    for stage in range(0, self.size, size)
                    for first in range(step)
                ],
                timeout=timedelta(seconds=self.timeout),
            )
        self.mesh = self._make_mesh()
        if self.parallel.context > 1:
            self.context_mesh = self._make_context_mesh()
        if self.parallel.expert > 1:
            self.expert_mesh = self._make_expert_mesh()
        made = (self.mesh, self.context_mesh, self.expert_mesh)
        meshes = [mesh for mesh in made if mesh is not None]
        forget_other_meshes(meshes)
        for group in (group for mesh in meshes for group in mesh.get_all_groups()):
            # torch sets another timeout
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout), group)
        return self

    def _check_one_layout(self) -> None:
        """Checks that the ranks are about to make the same groups.

        Raises:
            ConfigError: on every rank, their layouts differ.
        """
        layouts = self.all_gather_object(repr(replace(self.parallel, plan=None)))
        if len(set(layouts)) > 1:
            other = next(rank for rank, each in enumerate(layouts) if each != layouts[0])
            raise ConfigError(
                f"parallel has to be the same on every rank, and is {layouts[0]} on rank 0, "
                f"{layouts[other]} on rank {other}."
            )

    def _make_mesh(self) -> DeviceMesh:
        copies, shards = self._copies_and_shards()
        sizes = {
            "pipeline": self.parallel.pipeline,
            "dp_replicate": copies,
            "dp_shard": shards,
            "tensor": self.parallel.tensor,
        }
        # FSDP2 keeps replicas equal, and takes a mesh with a dimension of shards.
        spread = self.parallel.tensor * self.parallel.expert > 1
        return self._mesh_of(sizes, kept=("dp_shard",) if copies > 1 and spread else ())

    def _mesh_of(self, sizes: dict[str, int], kept: Sequence[str] = ()) -> DeviceMesh:
        """A mesh without dimensions of one rank, except those in `kept`.

        Each dimension costs process groups, and the number of torch's sharding plans grows
        exponentially with them.
        """
        sizes = {name: size for name, size in sizes.items() if size > 1 or name in kept}
        return init_device_mesh(
            self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )

    def _copies_and_shards(self) -> tuple[int, int]:
        """The number of replicas of the models' state, and the number of ranks of each.

        Ranks that share a sequence share the state like ranks that share the data.
        """
        context = self.parallel.context
        if self.shards > 1:
            return self.copies, self.shards * context
        return self.copies * context, 1

    def _make_context_mesh(self) -> DeviceMesh:
        parallel = self.parallel
        sizes = {
            "pipeline": parallel.pipeline,
            "data": self.dp_size,
            "context": parallel.context,
            "tensor": parallel.tensor,
        }
        return self._mesh_of(sizes)["context"]

    def _make_expert_mesh(self) -> DeviceMesh:
        """Ranks with the same experts shard them within a replica of the model."""
        experts, (_, sharing) = self.parallel.expert, self._copies_and_shards()
        shards = sharing // experts if sharing % experts == 0 else 1
        sizes = {
            "dp_replicate": self.parts // (shards * experts),
            "dp_shard": shards,
            "expert": experts,
            "tensor": self.parallel.tensor,
        }
        return self._mesh_of(sizes, kept=("dp_shard",))

    def group_of_stages(self, stages: Sequence[int]) -> Any:
        """The group of this rank's counterparts in some stages, or None if it is in none of them.

        Every rank has to call it, with the same stages.
        """
        size = self._stage_size
        group, _ = dist.new_subgroups_by_enumeration(
            [[stage * size + place for stage in stages] for place in range(size)],
            timeout=timedelta(seconds=self.timeout),
        )
        self._stage_groups.append(group)
        return group

    def close(self) -> None:
        """Destroys the process group if this object created it; else only its own subgroups."""
        if dist.is_initialized():
            if self._owns_group:
                dist.destroy_process_group()
                meeting.end()
            elif self.control_group is not None:
                dist.destroy_process_group(self.control_group)
                for group in (self._parts_group, *self._stage_groups):
                    if group is not None:
                        dist.destroy_process_group(group)
        self.mesh = self.context_mesh = self.expert_mesh = None
        self.control_group = self._parts_group = None
        self._stage_groups = []
        self._owns_group = False

    def new_group(self, timeout: float | None = None) -> Any:
        """A gloo group of all ranks for host-side work during training, e.g. a background save.

        Args:
            timeout: seconds that its collectives may wait; by default as long as others.
        """
        if self.size == 1:
            return None
        seconds = self.timeout if timeout is None else timeout
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def store(self) -> Any:
        """A separate connection to the group's key-value store, for use in another thread.

        None in a world of one, and if there is no group (yet, or any more).
        """
        if self.size == 1 or not dist.is_initialized():
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        return store.clone()

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.control_group is not None:
            dist.barrier(self.control_group)

    def wait_for_all(self, group: Any = None) -> None:
        """Waits until every rank is here, as `barrier`; meanwhile this one's signals are heard.

        Args:
            group: from `new_group`, for its time limit; by default `control_group`.
        """
        if (group := group or self.control_group) is None:
            return
        work: Any = dist.barrier(group, async_op=True)
        while not work.is_completed():
            time.sleep(_POLL)
        work.wait()  # raises what has gone wrong

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduces a tensor over all ranks, in place, and returns it.

        Args:
            tensor: of the same shape and dtype on every rank.
            op: "sum", "max" or "min".
        """
        if self.size > 1:
            group = self.control_group if tensor.device.type == "cpu" else None
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group=group)
        return tensor

    def sum_parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the parts, in place, and returns it."""
        if self._parts_group is None:
            return self.all_reduce(tensor)
        dist.all_reduce(tensor, group=self._parts_group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.all_reduce(torch.tensor([flag], dtype=torch.int32), "max"))

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank. Between our own processes only; never from a file."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control_group)
        return box

    def gather_parts(self, value: Any) -> list[Any]:
        """One `value` of each part, in their order, on every rank."""
        return self.all_gather_object(value)[: self._stage_size : self.parallel.tensor]


def _dp_dimensions(mesh: DeviceMesh | None) -> DeviceMesh | None:
    if mesh is None:
        return None
    names = tuple(n for n in mesh.mesh_dim_names or () if n.startswith("dp_"))
    if len(names) == mesh.ndim:
        return mesh
    return mesh[names] if names else None


@torch.no_grad()
def send(tensors: Iterable[torch.Tensor], group: Any = None) -> None:
    """Broadcasts tensors from the first rank of a group, in place.

    Args:
        tensors: of the same shapes and dtypes on every rank.
        group: the process group; None for all ranks.
    """
    for tensor in tensors:
        # gloo does not support complex tensors
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        whole = real.contiguous()
        dist.broadcast(whole, group=group, group_src=0)
        if whole is not real:
            real.copy_(whole)


def _device(local_rank: int) -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    count = torch.accelerator.device_count()
    if count == 1 and _by_srun():  # each task sees only its own device (--gpus-per-task)
        return torch.device(kind.type, 0)
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no device: there are {count}. "
            "Start at most that many processes per machine (--nproc)."
        )
    return torch.device(kind.type, local_rank)


def _by_srun() -> bool:
    return is_srun_task(os.environ) and "TORCHELASTIC_RUN_ID" not in os.environ
