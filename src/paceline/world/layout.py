"""How a run is spread over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from paceline.errors import ConfigError

_SIZES = ("dp_replicate", "dp_shard", "context", "tensor", "pipeline")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The layout of a run over its processes; the product of the sizes is the world size.

    Of the sizes `expert` alone adds no processes.

    Args:
        dp_replicate: copies of the model's state; `"auto"` takes all processes there are.
        dp_shard: processes over which each copy is sharded (FSDP2). Every process sees samples of
            its own.
        tensor: processes over which modules are split, as `plan` says. They see the same samples.
        context: processes over which sequences are split. The model calls
            `paceline.parallel.attention` and `paceline.parallel.positions`.
        context_attention: how attention sees whole sequences: "all_to_all", each process computes
            some of the heads; "ring", torch's ring, on CUDA alone: keys and values go round, heads
            need not divide, and attention has to be causal.
        pipeline: stages that a model is cut into, each on processes of its own, which pass a
            window's micro-batches on to each other. The model is a `Sequential`, or says in
            `pipeline_order` which of its modules compute it, one after the other. The processes
            of a stage may be copies, shard it (`dp_shard`), split its modules (`tensor`), or have
            parts of sequences (`context`).
        expert: processes over which the experts of a mixture are shared out, as `plan` says. They
            see samples, or parts of sequences, of their own, as part of the `dp_replicate` x
            `dp_shard` x `context` processes, whose number it divides; the same experts are then
            replicated or sharded over the others. Processes that split modules (`tensor`) have the
            same ones.
        activation_checkpointing: what the model's repeated blocks compute once more in the
            backward pass, to keep less: "full", all; "selective", all but matrix products,
            attention and rows of other processes; None, nothing. A number from 0 to 1 is the part
            of its activations that a compiled model keeps.
        frozen: what becomes of a model of which nothing is trained, such as a teacher, where
            `dp_shard` shards the others: "shard", it is sharded too, and has to be called equally
            often on every process; "replicate", each process keeps all of it. Stages, and modules
            that are split or experts, are of trained models alone.
        cpu_offload: keep sharded parameters, their gradients and optimizer state in host memory,
            and step there.
        plan: how modules split over the `tensor` processes: a module's name within its model, "*"
            for any part of one, -> "colwise" (its output's features are split), "rowwise" (its
            input's are), "colwise_rep" (as colwise, and its output is gathered), "colwise_loss" (as
            colwise; for logits that only a cross-entropy sees, which takes them as they are split)
            or a ParallelStyle of torch's. None asks the model: its `parallelize(mesh)` or
            `tp_plan`. With `expert`: the name of a module of experts -> "experts"; None asks for
            the model's `ep_plan`.
        timeout: seconds that a process waits for the others, at the start and in each collective,
            before it is an error.
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
    timeout: float = 600.0

    def __post_init__(self) -> None:
        recomputed = self.activation_checkpointing
        budget = isinstance(recomputed, float) and 0 <= recomputed <= 1
        if not budget and recomputed not in (None, "full", "selective"):
            raise ConfigError(
                f"parallel.activation_checkpointing={recomputed!r}: expected 'full', 'selective', "
                "a part such as 0.5, or None."
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
                "parallel.cpu_offload=True: what is offloaded is sharded parameters; share them "
                "over parallel.dp_shard=2 processes or more, or leave it out."
            )

    @property
    def rings(self) -> bool:
        """Whether sequences are in parts, and attention is torch's ring."""
        return self.context > 1 and self.context_attention == "ring"

    @property
    def is_spread(self) -> bool:
        """Whether a process holds no more than a part of the model's state."""
        return self.dp_shard * self.tensor * self.expert * self.pipeline > 1

    @property
    def calls_together(self) -> bool:
        """Whether processes that see other samples hold what a call of a model needs."""
        return self.dp_shard * self.expert > 1

    def sizes(self, world_size: int) -> tuple[int, int]:
        """Copies of the model's state, and processes with a share of the data that share one.

        Args:
            world_size: number of processes.

        Raises:
            ConfigError: the sizes do not multiply to the world size.
        """
        given = {name: getattr(self, name) for name in _SIZES}
        asked = [
            f"{name}={size}"
            for name, size in given.items()
            if size != "auto" and (size > 1 or name == "dp_replicate")
        ]
        if self.dp_replicate == "auto":
            one_copy = self.dp_shard * self.context * self.tensor * self.pipeline
            replicate, rest = divmod(world_size, one_copy)
            if rest or not replicate:
                raise ConfigError(
                    f"parallel.{' x '.join(asked)} does not fit {_processes(world_size)}: start a "
                    f"multiple of {one_copy} (--nproc), or choose a divisor of {world_size}."
                )
        elif (product := math.prod(given.values())) != world_size:
            raise ConfigError(
                f"parallel.{' x '.join(asked)} does not fit "
                f"{_processes(world_size)}: start {product} processes (--nproc) or leave "
                "dp_replicate at 'auto'."
            )
        else:
            replicate = self.dp_replicate
        if (parts := replicate * self.dp_shard * self.context) % self.expert:
            beside = f" x context={self.context}" * (self.context > 1)
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide dp_replicate={replicate} x "
                f"dp_shard={self.dp_shard}{beside}, the {_processes(parts)} with rows of their "
                f"own: start a multiple of {self.expert} (--nproc), or choose a divisor of {parts}."
            )
        return replicate, self.dp_shard


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count != 1)}"
