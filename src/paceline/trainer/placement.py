"""Puts a trainer's components in place: checks, devices, compilation, replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from paceline.errors import ConfigError, LossError
from paceline.trainer.events import overrides

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class Replica(DistributedDataParallel):
    """DDP that answers for the attributes of the module it wraps, and knows if it was called.

    Attributes:
        called: whether the module was called through it, gradients on, in this micro-batch.
        sentinel: its smallest trainable parameter, whose gradient tells of the others' NaN.
    """

    called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            vars(self)["called"] = True
        return super().forward(*args, **kwargs)

    def begin(self, *, exchange: bool) -> None:
        """A micro-batch begins; gradients are exchanged in the window's last."""
        vars(self).update(called=False, require_backward_grad_sync=exchange)

    @cached_property
    def sentinel(self) -> torch.nn.Parameter:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return min(parameters, key=torch.Tensor.numel)

    def check_exchanged(self) -> None:
        """Refuses gradients that every rank keeps to itself.

        Raises:
            LossError: there are some, but the module was not called, so DDP exchanged none.
        """
        if self.called or all(p.grad is None for p in self.module.parameters()):
            return
        raise LossError(
            f"{type(self.module).__name__} has gradients that the ranks did not exchange: its "
            "parameters or methods were used without calling it, in the last micro-batch of the "
            "window at least. On several ranks call the model itself, self.model(...), and put "
            "the computation into its forward()."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The user's module, without a Replica around it."""
    return model.module if isinstance(model, Replica) else model


def components(holder: object, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """The attributes of `holder` of a kind, by name; a dictionary of them counts by its keys."""
    found: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if name.startswith("_"):
            continue
        if isinstance(value, kind):
            found[name] = value
        elif isinstance(value, dict) and value and all(isinstance(v, kind) for v in value.values()):
            found.update(value)
    return found


def check_components(trainer: Trainer) -> None:
    """Refuses what cannot train: no model, no optimizer, parameters in no optimizer or in two.

    Raises:
        ConfigError: with one line a mistake.
    """
    models, optimizers = trainer.named_models(), trainer.named_optimizers()
    wrong: list[str] = []
    if not models:
        wrong.append("there is no model: give model=... or assign one in configure().")
    if not optimizers:
        wrong.append("there is no optimizer: give optimizer=... or assign one in configure().")
    wrong += _check_parameters(models, optimizers)
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, torch.optim.LBFGS) and not _steps_itself(trainer):
            wrong.append(f"{name}: LBFGS needs a closure; override step(window) to give it one.")
    known = [id(optimizer) for optimizer in optimizers.values()]
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        if id(scheduler.optimizer) not in known:
            wrong.append(f"{name}: it follows an optimizer that is not this trainer's.")
    if wrong:
        raise ConfigError("this trainer cannot train:\n  " + "\n  ".join(wrong))


def _steps_itself(trainer: Trainer) -> bool:
    from paceline.trainer.trainer import Trainer

    return overrides(trainer, "step", Trainer)


def _check_parameters(models: Any, optimizers: Any) -> list[str]:
    names: dict[int, str] = {}
    trainable: dict[int, str] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), f"{model_name}.{name}")
            if parameter.requires_grad:
                trainable.setdefault(id(parameter), f"{model_name}.{name}")
    held = Counter(
        id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]
    )
    wrong: list[str] = []
    forgotten = [name for key, name in trainable.items() if key not in held]
    if forgotten and optimizers:
        wrong.append(
            f"in no optimizer: {_some(forgotten)}. Give them to one, or freeze them with "
            "requires_grad_(False)."
        )
    twice = [names.get(key, "a parameter of no model") for key, n in held.items() if n > 1]
    if twice:
        wrong.append(f"in more than one optimizer or group: {_some(twice)}.")
    strangers = sum(key not in names for key in held)
    if strangers:
        wrong.append(
            f"{strangers} parameter{'s' * (strangers != 1)} in an optimizer belong"
            f"{'s' * (strangers == 1)} to no model of this trainer, so no checkpoint would hold "
            "them. Was the optimizer made for another model, or before the model was replaced?"
        )
    return wrong


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def place(trainer: Trainer) -> None:
    """Moves every module to the device, compiles it if asked, and replicates it over the ranks."""
    for name, value in list(vars(trainer).items()):
        if isinstance(value, torch.nn.Module):
            setattr(trainer, name, _placed(trainer, value))
        elif isinstance(value, dict) and any(
            isinstance(v, torch.nn.Module) for v in value.values()
        ):
            for key, module in value.items():
                value[key] = _placed(trainer, module)


def take_back(trainer: Trainer) -> None:
    """Leaves the user with their own modules, after a run."""
    for name, value in list(vars(trainer).items()):
        if isinstance(value, Replica):
            setattr(trainer, name, value.module)
        elif isinstance(value, dict):
            for key, module in value.items():
                if isinstance(module, Replica):
                    value[key] = module.module


def _placed(trainer: Trainer, module: torch.nn.Module) -> torch.nn.Module:
    if isinstance(module, DistributedDataParallel) and not isinstance(module, Replica):
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel already: give the module itself; "
            "parallel=Parallel(...) decides how it is spread."
        )
    module.to(trainer.device)
    if trainer.compile:
        module.compile()
    if trainer.world.dp_size == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    device_ids = None if trainer.on_cpu else [trainer.device]
    replica = Replica(module, device_ids=device_ids)
    _settle_buckets(replica)
    return replica


def _settle_buckets(replica: Replica) -> None:
    """Makes DDP arrange its gradient buckets now, the same way in every process that ever starts.

    DDP rearranges them after its first backward pass, which moves elements between the ranks'
    partial sums: a run wrapped anew in the middle would round differently from one that went on.
    Two backward passes of a zero loss over all parameters, in their order, settle it.
    """
    module = replica.module
    parameters = [p for p in module.parameters() if p.requires_grad]
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    own = vars(module).get("forward")
    module.forward = partial(zero_loss, parameters)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for _ in range(2):
            replica().backward()
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    for parameter in parameters:
        parameter.grad = None
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)


def zero_loss(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """A loss of zero that depends on every parameter: each gets a gradient of zeros."""
    return torch.stack([(p * 0).sum().float() for p in parameters if p.requires_grad]).sum()


def share_buffers(trainer: Trainer) -> None:
    """Gives every rank rank 0's buffers, as DDP does before the next forward pass anyway."""
    if trainer.world.dp_size == 1:
        return
    for model in trainer.named_models().values():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
