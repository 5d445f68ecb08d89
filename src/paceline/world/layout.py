"""The layout of a run over processes: its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from paceline.errors import ConfigError, counted, refuses_unknown

_SIZES = ("dp_replicate", "dp_shard", "context", "tensor", "pipeline")


@refuses_unknown(
    data="dp_replicate",
    tensor_parallel="tensor",
    context_parallel="context",
    pipeline_parallel="pipeline",
    expert_parallel="expert",
)
@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The layout of a run over its processes.

    The product of the sizes is the world size, except that `expert` adds no processes.

    Args:
        dp_replicate: replicas of the model's state; `"auto"` for as many as the processes allow.
        dp_shard: processes over which each replica is sharded (FSDP2). Each has its own samples.
        tensor: processes over which modules are split (tensor parallelism), according to `plan`.
            They have the same samples.
        context: processes over which sequences are split (context parallelism). The model calls
            `paceline.parallel.attention` and `paceline.parallel.positions`.
        context_attention: how attention sees whole sequences. "all_to_all": each process computes
            some of the heads. "ring": torch's ring attention, on CUDA only; keys and values
            circulate, the number of heads need not divide, and attention has to be causal.
        pipeline: stages over which layers are split (pipeline parallelism), each on its own
            processes. The model is a `Sequential`, or lists in `pipeline_order` the modules that
            compute it, in order. The processes of a stage may replicate it, shard it (`dp_shard`),
            split its modules (`tensor`), or have parts of sequences (`context`).
        expert: processes over which the experts of a mixture are split (expert parallelism),
            according to `plan`. They are some of the `dp_replicate` x `dp_shard` x `context`
            processes, whose number it divides, and have their own samples or parts of sequences;
            experts are replicated or sharded over the remaining ones. The processes of a
            tensor-parallel group have the same experts.
        activation_checkpointing: what the model's repeated blocks recompute in the backward pass.
            "full": everything. "selective": everything but matrix products, attention and rows of
            other processes. None: nothing. A number from 0 to 1: the fraction of its activations
            that a compiled model keeps.
        frozen: how frozen models, such as a teacher, are placed where `dp_shard` shards the others.
            "shard": sharded too; every process has to call them equally often. "replicate": each
            process keeps the whole. Stages, split modules and experts are for trained models only.
        cpu_offload: keep sharded parameters, their gradients and optimizer state in host memory,
            and step there.
        plan: how `tensor` splits modules: a module's name in its model, with "*" for any part of
            it, -> "colwise" (its output features are split), "rowwise" (its input features are),
            "colwise_rep" (like colwise, with the output gathered), "colwise_loss" (like colwise,
            for logits that only a cross-entropy uses, which then takes them split) or a
            ParallelStyle of torch. With None the model decides: its `parallelize(mesh)` or
            `tp_plan`. With `expert`: the name of a module of experts -> "experts"; with None, the
            model's `ep_plan`.
        find_unused_parameters: with replicas (DDP), exchange in each window which parameters have a
            gradient on any process. Without it the first window decides whether that is done; if it
            finds a gradient for each parameter, a later one without is an error.
        timeout: seconds that a process waits for the others, at the start and in each collective,
            before it raises an error.
    """

    dp_replicate: int | Literal["auto"] = "auto"
    dp_shard: int = 1
    tensor: int = 1
    context: int = 1
    context_attention: Literal["all_to_all", "ring"] = "all_to_all"
    pipeline: int = 1
    expert: int = 1
    activation_checkpointing: Literal["full", "selective"] | float | None = None
    frozen: Literal["shard", "replicate"] = "shard"
    cpu_offload: bool = False
    plan: dict[str, Any] | None = None
    find_unused_parameters: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        recomputed = self.activation_checkpointing
        budget = isinstance(recomputed, float) and 0 <= recomputed <= 1
        if not budget and recomputed not in (None, "full", "selective"):
            raise ConfigError(
                f"parallel.activation_checkpointing={recomputed!r}: expected 'full', 'selective', "
                "a fraction such as 0.5, or None."
            )
        if self.context_attention not in ("all_to_all", "ring"):
            raise ConfigError(
                f"parallel.context_attention={self.context_attention!r}: expected 'all_to_all' or "
                "'ring'."
            )
        if self.frozen not in ("shard", "replicate"):
            raise ConfigError(f"parallel.frozen={self.frozen!r}: expected 'shard' or 'replicate'.")
        if not self.timeout > 0:
            raise ConfigError(f"parallel.timeout={self.timeout!r}: expected seconds, more than 0.")
        for name in (*_SIZES, "expert"):
            size = getattr(self, name)
            if not (name == "dp_replicate" and size == "auto") and size < 1:
                raise ConfigError(f"parallel.{name}={size!r}: expected 1 or more processes.")
        if self.cpu_offload and self.dp_shard == 1:
            raise ConfigError(
                "parallel.cpu_offload=True: only sharded parameters are offloaded; shard them "
                "with parallel.dp_shard=2 or more, or leave it out."
            )

    @property
    def rings(self) -> bool:
        """Whether sequences are split, and attention is torch's ring."""
        return self.context > 1 and self.context_attention == "ring"

    @property
    def partitions_state(self) -> bool:
        """Whether a process holds only a part of the model's state."""
        return self.dp_shard * self.tensor * self.expert * self.pipeline > 1

    @property
    def calls_together(self) -> bool:
        """Whether a call of a model communicates with processes that have other samples."""
        return self.dp_shard * self.expert > 1

    def sizes(self, world_size: int) -> tuple[int, int]:
        """The number of replicas, and the number of data-parallel processes of each.

        Args:
            world_size: the number of processes.

        Raises:
            ConfigError: the sizes do not multiply to the world size.
        """
        given = {name: getattr(self, name) for name in _SIZES}
        asked = [
            f"{name}={size}"
            for name, size in given.items()
            if size != "auto" and (size > 1 or name == "dp_replicate")
        ]
        processes = counted(world_size, "process", "es")
        if self.dp_replicate == "auto":
            one_copy = self.dp_shard * self.context * self.tensor * self.pipeline
            replicate, rest = divmod(world_size, one_copy)
            if rest or not replicate:
                raise ConfigError(
                    f"parallel.{' x '.join(asked)} does not fit {processes}: start a "
                    f"multiple of {one_copy} (--nproc), or choose a divisor of {world_size}."
                )
        elif (product := math.prod(given.values())) != world_size:
            raise ConfigError(
                f"parallel.{' x '.join(asked)} does not fit "
                f"{processes}: start {product} processes (--nproc) or leave "
                "dp_replicate at 'auto'."
            )
        else:
            replicate = self.dp_replicate
        if (parts := replicate * self.dp_shard * self.context) % self.expert:
            beside = f" x context={self.context}" if self.context > 1 else ""
            with_rows = counted(parts, "process", "es")
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide dp_replicate={replicate} x "
                f"dp_shard={self.dp_shard}{beside}, the {with_rows} with rows of their "
                f"own: start a multiple of {self.expert} (--nproc), or choose a divisor of {parts}."
            )
        return replicate, self.dp_shard
