"""Loss scaling for spread models: an overflow that one rank sees skips the step on all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from paceline.world.dtensors import local_part
from paceline.world.world import World


class SpreadScaler(torch.amp.GradScaler):
    """torch's GradScaler, for gradients of which each rank has a part.

    Gradients may be spread over several meshes, or whole. What is found in this rank's parts is
    agreed on by one exchange of a number, which stays on the device.

    Args:
        device: the kind of device, such as "cuda".
        world: the ranks.
    """

    def __init__(self, device: str, world: World) -> None:
        super().__init__(device)
        self._world = world

    @torch.no_grad()
    def _unscale_grads_(
        self, optimizer: Any, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        parts: list[torch.Tensor] = []
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                part = local_part(parameter).detach()
                part.grad = local_part(parameter.grad)
                parts.append(part)
        here: Any = SimpleNamespace(param_groups=[{"params": parts}])
        found = super()._unscale_grads_(here, inv_scale, found_inf, allow_fp16)
        anywhere = torch.stack([found_inf, *found.values()]).amax()
        return {anywhere.device: self._world.all_reduce(anywhere, "max")}
