"""How a run uses its devices, as one value with presets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from paceline.errors import ConfigError, refuses_unknown
from paceline.world.layout import Parallel

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@refuses_unknown(
    reduce_dtype="nothing: gradients are summed in float32",
    error_if_nonfinite="Trainer(on_nonfinite=...)",
    force_fsdp="DeviceParameters.FSDP()",
    force_ddp="DeviceParameters.DDP()",
    async_tensor_parallel="nothing: the compiler may overlap what it can",
    compiled_autograd="nothing: the forward and backward passes are compiled",
    loss_parallel='a module of Parallel(plan=...) as "colwise_loss"',
    comm="Parallel(timeout=...)",
    _dp_shard="dp_shard",
    _dp_replicate="dp_replicate",
    _tensor_parallel="tensor_parallel",
    _context_parallel="context_parallel",
    _pipeline_parallel="pipeline_parallel",
)
@dataclass(frozen=True, kw_only=True)
class DeviceParameters:
    """Layout, precision and compilation of a run.

    Args:
        param_dtype: the dtype that models compute in: float32, or bfloat16 or float16 by autocast.
            Sharded parameters are gathered in it; weights keep their own dtype.
        compile_model: compile the models in place.
        checkpoint_activations: keep only the inputs of the models' repeated blocks, and recompute
            the rest in the backward pass.
        activation_memory_budget: the fraction of its activations, from 0 to 1, that a compiled
            model keeps; the rest is recomputed.
        cpu_offload: keep sharded parameters, their gradients and optimizer state in host memory.
        dp_replicate: replicas of the model's state; `"auto"` for as many as the processes allow.
        dp_shard: processes over which each replica is sharded (FSDP2); `"auto"` for all.
        tensor_parallel: processes over which modules are split; `"auto"` for those that a number
            for `dp_shard` leaves, and 1 if `dp_shard` or `dp_replicate` is to take all.
        context_parallel, pipeline_parallel: further sizes of the layout.

    Raises:
        ConfigError: the layout or dtype does not exist.
    """

    param_dtype: torch.dtype = torch.float32
    compile_model: bool = False
    checkpoint_activations: bool = False
    activation_memory_budget: float = 1.0
    cpu_offload: bool = False
    dp_replicate: int | Literal["auto"] = "auto"
    dp_shard: int | Literal["auto"] = 1
    tensor_parallel: int | Literal["auto"] = 1
    context_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        if self.param_dtype not in _PRECISIONS:
            names = ", ".join(str(dtype) for dtype in _PRECISIONS)
            raise ConfigError(f"param_dtype={self.param_dtype}: expected one of {names}.")
        if self.dp_shard == "auto" and self.dp_replicate == "auto":
            raise ConfigError(
                "dp_shard='auto' and dp_replicate='auto' are ambiguous: give one of them a number."
            )
        if self.checkpoint_activations and self.activation_memory_budget != 1:
            raise ConfigError(
                "checkpoint_activations=True and activation_memory_budget="
                f"{self.activation_memory_budget}: the first keeps only the inputs of blocks, the "
                "second a fraction of all activations; give one of them."
            )
        self.parallel  # noqa: B018  raises if the layout does not exist, before anything is built

    @property
    def parallel(self) -> Parallel:
        """The layout, in this process's current world."""
        budget = None if self.activation_memory_budget == 1 else self.activation_memory_budget
        return Parallel(
            dp_replicate=self.dp_replicate,
            dp_shard=self._all_but_copies() if self.dp_shard == "auto" else self.dp_shard,
            tensor=self._tensor(),
            context=self.context_parallel,
            pipeline=self.pipeline_parallel,
            activation_checkpointing="full" if self.checkpoint_activations else budget,
            cpu_offload=self.cpu_offload,
        )

    def _tensor(self) -> int:
        if self.tensor_parallel != "auto":
            return self.tensor_parallel
        if self.dp_replicate == "auto" or self.dp_shard == "auto":
            return 1  # models say how they are split, and most do not
        others = self.dp_replicate * self.dp_shard * self.context_parallel * self.pipeline_parallel
        return max(1, _processes() // max(1, others))

    def _all_but_copies(self) -> int:
        assert self.dp_replicate != "auto"
        others = self.dp_replicate * self._tensor() * self.context_parallel
        return max(1, _processes() // max(1, others * self.pipeline_parallel))

    def settings(self) -> dict[str, Any]:
        """These settings as keywords of `Trainer`."""
        return {
            "parallel": self.parallel,
            "precision": _PRECISIONS[self.param_dtype],
            "compile": self.compile_model,
        }

    @classmethod
    def SINGLE_DEVICE(cls, **others: Any) -> DeviceParameters:
        """One process."""
        return cls(dp_replicate=1, **others)

    @classmethod
    def DDP(cls, **others: Any) -> DeviceParameters:
        """One replica on each process."""
        return cls(dp_replicate="auto", **others)

    @classmethod
    def FSDP(cls, dp_shard: int | Literal["auto"] = "auto", **others: Any) -> DeviceParameters:
        """One copy of the state, sharded.

        Args:
            dp_shard: processes to shard over; `"auto"` for all.
            **others: further settings.
        """
        return cls(dp_replicate=1, dp_shard=dp_shard, **others)

    @classmethod
    def HSDP(cls, dp_shard: int, **others: Any) -> DeviceParameters:
        """Replicas, each of them sharded.

        Args:
            dp_shard: processes to shard each replica over.
            **others: further settings.
        """
        return cls(dp_replicate="auto", dp_shard=dp_shard, **others)


def _processes() -> int:
    """The number of processes in the current world."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))
