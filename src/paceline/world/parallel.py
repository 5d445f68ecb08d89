"""How a run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from paceline.errors import ConfigError

_BUILT = ("dp_replicate", "dp_shard", "activation_checkpointing", "cpu_offload", "timeout")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The layout of a run over its processes; the product of the sizes is the world size.

    Data parallelism works today: by replication (DDP), sharding (FSDP2) or both (HSDP). Every other
    dimension is refused with a clear error until it is built.

    Args:
        dp_replicate: copies of the model's state; `"auto"` takes all processes there are.
        dp_shard: processes over which each copy is sharded (FSDP2). Every process sees samples of
            its own.
        tensor: tensor-parallel size.
        context: context-parallel size.
        pipeline: pipeline stages.
        expert: expert-parallel size.
        activation_checkpointing: what the model's repeated blocks compute once more in the
            backward pass, to keep less: "full", all; "selective", all but matrix products and
            attention; None, nothing.
        cpu_offload: keep sharded parameters, their gradients and optimizer state in host memory,
            and step there.
        plan: how the model's modules split, module name -> ParallelStyle.
        timeout: seconds that a process waits for the others, at the start and in each collective,
            before it is an error.
    """

    dp_replicate: int | Literal["auto"] = "auto"
    dp_shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    activation_checkpointing: Literal["full", "selective"] | None = None
    cpu_offload: bool = False
    plan: dict[str, Any] | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        default = {f.name: f.default for f in fields(self)}
        unbuilt = [
            f"{name}={getattr(self, name)!r}"
            for name in default
            if name not in _BUILT and getattr(self, name) != default[name]
        ]
        if unbuilt:
            raise ConfigError(
                f"parallel: {', '.join(unbuilt)} does not exist yet: this version replicates the "
                "model over the processes (dp_replicate), shards it (dp_shard), or both."
            )
        recomputed = self.activation_checkpointing
        if recomputed not in (None, "full", "selective"):
            raise ConfigError(
                f"parallel.activation_checkpointing={recomputed!r}: expected 'full', 'selective' "
                "or None."
            )
        if not self.timeout > 0:
            raise ConfigError(f"parallel.timeout={self.timeout!r}: expected seconds, more than 0.")
        for name in ("dp_replicate", "dp_shard"):
            size = getattr(self, name)
            if not (name == "dp_replicate" and size == "auto") and size < 1:
                raise ConfigError(f"parallel.{name}={size!r}: expected 1 or more processes.")
        if self.cpu_offload and self.dp_shard == 1:
            raise ConfigError(
                "parallel.cpu_offload=True: what is offloaded is sharded parameters; share them "
                "over parallel.dp_shard=2 processes or more, or leave it out."
            )

    def sizes(self, world_size: int) -> tuple[int, int]:
        """Copies of the model's state, and processes that share one.

        Args:
            world_size: number of processes.

        Raises:
            ConfigError: the sizes do not multiply to the world size.
        """
        shard = self.dp_shard
        if self.dp_replicate == "auto":
            replicate, rest = divmod(world_size, shard)
            if rest or not replicate:
                raise ConfigError(
                    f"parallel.dp_shard={shard} does not fit {_processes(world_size)}: start a "
                    f"multiple of {shard} (--nproc), or set dp_shard to a divisor of {world_size}."
                )
            return replicate, shard
        if self.dp_replicate * shard != world_size:
            product = "" if shard == 1 else f" x dp_shard={shard}"
            raise ConfigError(
                f"parallel.dp_replicate={self.dp_replicate}{product} does not fit "
                f"{_processes(world_size)}: start {self.dp_replicate * shard} processes "
                "(--nproc) or leave dp_replicate at 'auto'."
            )
        return self.dp_replicate, shard


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count != 1)}"
