"""How a run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from paceline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The layout of a run over its processes; the product of the sizes is the world size.

    Data parallelism by replication (DDP) works today. Every other dimension is refused with a
    clear error until it is built.

    Args:
        dp_replicate: replicas that see different samples; `"auto"` takes all processes.
        dp_shard: processes over which each replica's state is sharded (FSDP2).
        tensor: tensor-parallel size.
        context: context-parallel size.
        pipeline: pipeline stages.
        expert: expert-parallel size.
        activation_checkpointing: which activations to recompute in the backward pass.
        cpu_offload: keep parameters and optimizer state in host memory between uses.
        plan: how the model's modules split, module name -> ParallelStyle.
    """

    dp_replicate: int | Literal["auto"] = "auto"
    dp_shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    activation_checkpointing: str | None = None
    cpu_offload: bool = False
    plan: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        default = {f.name: f.default for f in fields(self)}
        unbuilt = [
            f"{name}={getattr(self, name)!r}"
            for name in default
            if name != "dp_replicate" and getattr(self, name) != default[name]
        ]
        if unbuilt:
            raise ConfigError(
                f"parallel: {', '.join(unbuilt)} does not exist yet: this version replicates the "
                "model over the processes (dp_replicate) and has no other layout."
            )

    def replicas(self, world_size: int) -> int:
        """The number of data-parallel replicas in a world of `world_size` processes.

        Raises:
            ConfigError: the sizes do not multiply to the world size.
        """
        if self.dp_replicate == "auto":
            return world_size
        if self.dp_replicate != world_size:
            raise ConfigError(
                f"parallel.dp_replicate={self.dp_replicate} does not fit {world_size} "
                f"process{'es' * (world_size != 1)}: start {self.dp_replicate} processes "
                "(--nproc) or leave dp_replicate at 'auto'."
            )
        return self.dp_replicate
