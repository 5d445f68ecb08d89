"""Linear layers that multiply in float8, by torchao.

The operands of a layer's three matrix products (output, gradient of the input, gradient of the
weight) are scaled, each by its own largest value, and rounded to float8 for the product alone. That
is torchao's "tensorwise" recipe (https://github.com/pytorch/ao/tree/main/torchao/float8); the two
formats are those of Micikevicius et al., "FP8 Formats for Deep Learning" (2022). Weights, gradients
and all that is saved stay as precise as the model was made. The rest computes in bfloat16.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from paceline.errors import some
from paceline.log.plan import Plan
from paceline.world.world import World

_MULTIPLE = 16  # float8 matmul dimensions must be multiples of this
_NAMED = 4  # layers that the plan names


def missing(precision: str) -> str | None:
    """What is not installed and this precision needs; None if nothing is missing."""
    if precision != "fp8" or importlib.util.find_spec("torchao") is not None:
        return None
    return 'precision="fp8" needs the package torchao: pip install "paceline[fp8]".'


def configuration(device: torch.device) -> Any:
    """torchao's settings for a device, None for one that does not multiply in float8."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        capable = name.startswith(("gfx942", "gfx950"))
    else:
        capable = torch.cuda.get_device_capability(device) >= (8, 9)
    if not capable:
        return None
    from torchao.float8 import (  # pyright: ignore[reportMissingImports] - an extra
        Float8LinearConfig,
    )

    return Float8LinearConfig(pad_inner_dim=True)  # so that a batch may be of any size


def float8_layers(precision: str, world: World, plan: Plan) -> Float8Layers | None:
    """What a run's models multiply in float8 by; None if they do not, which is said if asked for.

    All ranks have to be able to.

    Args:
        precision: the run's.
        world: the ranks.
        plan: takes what is missing.
    """
    if precision != "fp8":
        return None
    config = configuration(world.device)
    if all(world.all_gather_object(config is not None)):
        return Float8Layers(config, world.parallel.tensor)
    lacking = "no float8 on this device (CUDA 8.9 or later, MI300 or later): computes in bf16"
    plan.add(lacking, "precision")
    world.say(f"precision='fp8': {lacking}.")
    return None


class Float8Layers:
    """The linear layers of a run that multiply in float8.

    Args:
        config: torchao's `Float8LinearConfig`.
        parts: into how many a plan may split a layer, either way.

    Attributes:
        converted: the layers.
        left: why others multiply as before, by name.
    """

    def __init__(self, config: Any, parts: int = 1) -> None:
        self.converted: list[nn.Linear] = []
        self.left: dict[str, str] = {}
        self._config = config
        self._multiple = _MULTIPLE * parts  # so that each part's sizes are multiples too
        self._added: set[str] = set()  # attributes of a layer that multiplies so

    def convert(self, model: nn.Module, name: str) -> None:
        """Has the linear layers of a model multiply in float8.

        They stay the objects they are and get another class, as what FSDP2 shards does: parameters
        keep their names, and hooks of a layer and other references to it hold.

        Args:
            model: not sharded yet; it may be on the meta device.
            name: its name, for the plan.
        """
        from torchao.float8 import (  # pyright: ignore[reportMissingImports] - an extra
            convert_to_float8_training,
        )

        for key, part in model.named_modules():
            if not isinstance(part, nn.Linear):
                continue
            if why := _why_not(part, self._multiple):
                self.left[f"{name}.{key}".rstrip(".")] = why
                continue
            like_it: Any = convert_to_float8_training(part, config=self._config)
            own = {key: value for key, value in vars(like_it).items() if key not in vars(part)}
            self._added |= own.keys()
            vars(part).update(own)
            part.__class__ = type(like_it)
            self.converted.append(part)

    def take_back(self) -> None:
        """Has them multiply as before."""
        for part in self.converted:
            for key in self._added & vars(part).keys():
                del vars(part)[key]
            part.__class__ = nn.Linear
        self.converted = []

    def __str__(self) -> str:
        """As a line of the plan."""
        count = len(self.converted)
        line = f"{count} of {count + len(self.left)} linear layers multiply in float8"
        left = some((f"{name} ({why})" for name, why in self.left.items()), _NAMED)
        return f"{line}; not {left}" if left else line


def _why_not(layer: nn.Linear, multiple: int) -> str | None:
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}"
    if "forward" in vars(layer):
        return "with a forward of its own"
    if any(size % multiple for size in layer.weight.shape):
        sizes = " x ".join(map(str, layer.weight.shape))
        return f"{sizes}, not multiples of {multiple}"
    return None
