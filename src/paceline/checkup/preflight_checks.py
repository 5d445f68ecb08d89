"""From a rehearsal's observations to the checks of the report, one function per stage.

Each function assumes that its stage was reached.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from paceline.checkup.rehearsal import LOOKED_INTO, VALIDATED, LossCall, Parameter, Seen, options_of
from paceline.checkup.report import Check, readable_seconds
from paceline.data.loader import loaders_by_name
from paceline.errors import some

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_INDEX_LOSSES = ("CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss")


def components(trainer: Trainer, seen: Seen) -> list[Check]:
    """The components, and how many parameters are trainable.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    parts = []
    for name, model in trainer.named_models().items():
        every = list(model.parameters())
        trained = sum(p.numel() for p in every if p.requires_grad)
        total = sum(p.numel() for p in every)
        parts.append(
            f"{name} {type(model).__name__}: {total:,} parameters, "
            + (f"{trained:,} trainable" if trained != total else "all trainable")
        )
    parts += [f"{name} {type(o).__name__}" for name, o in trainer.named_optimizers().items()]
    parts += [
        f"{name} {type(s).__name__}" for name, s in (trainer.named_schedulers() or {}).items()
    ]
    parts.append(f"on {trainer.device} in {seen.computes_in}")
    return [Check("components", "PASS", "; ".join(parts))]


def training_data(trainer: Trainer, seen: Seen) -> list[Check]:
    """The training data.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    batches, windows = trainer.train_batches, trainer.source.windows_per_epoch
    length = "of unknown length" if batches is None else f"{batches:,} batches an epoch"
    if windows is not None and windows != batches:
        length += f" in {windows:,} steps"
    detail = f"{_samples(trainer.train_dataloader)}, {length}; first batch {seen.batch}"
    checks = [Check("training data", "PASS", detail)]
    if seen.bad_inputs:
        detail = f"{some(seen.bad_inputs)} of the first batch: NaN or infinity among the values"
        checks.append(Check("inputs", "WARN", detail))
    if seen.same_inputs:
        detail = f"{some(seen.same_inputs)}: the same in all samples of the first batch"
        checks.append(Check("inputs", "WARN", detail))
    return checks


def labels(trainer: Trainer, seen: Seen) -> list[Check]:
    """Whether class indices are those of classes that the model has.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    call = seen.call
    if call is None or seen.labels is None or _name_of_loss(trainer) not in _INDEX_LOSSES:
        return []
    lowest, highest = seen.labels
    classes = _classes(call)
    if lowest >= 0 and highest < classes:
        return []
    detail = f"targets from {lowest} to {highest}, and outputs {call.outputs} have {classes} "
    return [Check("labels", "FAIL", detail + f"classes: 0 to {classes - 1}")]


def samples_in(loader: Any) -> int | None:
    """The number of samples in a loader's dataset, None if unknown."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def _samples(loader: Any) -> str:
    count = samples_in(loader)
    return "unknown number of samples" if count is None else f"{count:,} samples"


_LARGE_CHANGE, _SMALL_CHANGE = 1.0, 1e-6  # of weights in a step, relative to their size
_EXPLODES = 10.0  # times the first loss
_SMALL = 0.1  # below which a loss may grow so much by chance


def forward_pass(trainer: Trainer, seen: Seen) -> list[Check]:
    """The loss, the shapes it was computed from, and whether it is that of a random guess.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    loss = "" if seen.loss is None else f"loss {seen.loss:.4g}"
    checks = [Check("forward pass", "PASS", loss or "the first step has a loss")]
    first, largest = next(iter(seen.losses), 0.0), max(seen.losses, default=0.0)
    if len(trainer.named_optimizers()) == 1 and largest > _EXPLODES * max(first, _SMALL):
        why = (
            f"it grows from {first:.3g} to {largest:.3g} within {len(seen.losses)} batches: is lr "
        )
        checks.append(Check("loss in the steps", "FAIL", why + "too high, or a warm-up missing?"))
    if seen.call is None:
        why = "loss_fn was not called with outputs and targets"
        return [*checks, Check("output shape", "SKIP", why)]
    checks.append(_shapes(seen.call))
    if seen.same_outputs and not seen.same_inputs:
        detail = "the model's outputs are the same for all samples: does it use its inputs?"
        checks.append(Check("outputs", "WARN", detail))
    return checks + _chance(trainer, seen.call)


def _shapes(call: LossCall) -> Check:
    shapes = f"outputs {call.outputs}, targets {call.targets}"
    if call.outputs == call.targets:
        return Check("output shape", "PASS", shapes)
    if call.indices and len(call.outputs) == len(call.targets) + 1 and _classes(call) > 1:
        return Check("output shape", "PASS", f"{shapes}: class scores and class indices")
    detail = f"{shapes} differ: is loss_fn meant to broadcast one against the other?"
    return Check("output shape", "WARN", detail)


def _classes(call: LossCall) -> int:
    """The number of classes: the second dimension, or the only one of an unbatched sample."""
    return call.outputs[1 if len(call.outputs) > 1 else 0]


def _chance(trainer: Trainer, call: LossCall) -> list[Check]:
    """For class indices: whether the first loss is about that of a random guess, ln(classes)."""
    name = _name_of_loss(trainer)
    mean = options_of(trainer.loss_fn).get("reduction", "mean") == "mean"
    if name not in _INDEX_LOSSES or not (call.indices and mean) or call.value is None:
        return []
    classes = _classes(call)
    if classes < 2 or not math.isfinite(call.value):
        return []
    guess = math.log(classes)
    margin = max(0.5, 0.2 * guess)
    said = f"{call.value:.3g}, a guess among {classes} classes has ln({classes}) = {guess:.3g}"
    if abs(call.value - guess) <= margin:
        return [Check("loss at the start", "PASS", f"{said}, within {margin:.2g}")]
    if call.value > guess:
        why = "the model starts confident and wrong: are inputs scaled, outputs raw scores (no "
        why += "softmax), weights small?"
    else:
        why = "better than a guess: fine for pretrained weights; else, do inputs hold the answer?"
    return [Check("loss at the start", "WARN", f"{said}, more than {margin:.2g} off; {why}")]


def _name_of_loss(trainer: Trainer) -> str:
    function: Any = trainer.loss_fn
    kind = getattr(function, "func", function)
    return getattr(kind, "__name__", type(kind).__name__)


def backward_pass(trainer: Trainer, seen: Seen) -> list[Check]:
    """The gradients: whether they are finite, and whether every parameter gets one.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    found = seen.parameters
    steps = f"in {min(LOOKED_INTO, max(1, trainer.global_step))} steps"
    broken = [name for name, p in found.items() if not p.finite]
    if broken and trainer.precision != "fp16":
        return [Check("gradients", "FAIL", f"not finite: {some(broken)}")]
    checks = []
    if broken:
        detail = f"beyond fp16's range in {some(broken)}: normal in the first steps, while the "
        checks.append(Check("gradients", "WARN", detail + "loss scale is searched for"))
    else:
        norm = "" if seen.norm is None else f"norm {seen.norm:.4g}, "
        checks.append(Check("gradients", "PASS", f"{norm}finite"))
    never = [name for name, p in found.items() if not p.arrived]
    if never:
        every = len(never) == len(found)
        checks.append(
            Check(
                "unused parameters",
                "FAIL" if every else "WARN",
                f"no gradient {steps}: {some(never)}. Is the loss computed from them? Several "
                "processes (DDP) then exchange in each window which parameters have gradients; "
                "freeze what is not trained with requires_grad_(False)",
            )
        )
    zero = [name for name, p in found.items() if p.arrived and p.finite and not p.nonzero]
    if zero:
        detail = f"the gradient is exactly zero {steps}: {some(zero)}"
        checks.append(Check("zero gradients", "WARN", detail))
    return checks


def optimizer_step(trainer: Trainer, seen: Seen) -> list[Check]:
    """Whether steps change the weights.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    missing = [name for name in trainer.named_optimizers() if name not in seen.optimizers]
    checks = []
    if missing:
        detail = f"{', '.join(missing)}: took no step in the first {LOOKED_INTO} windows"
        checks.append(Check("optimizer step", "WARN", detail))
    pushed: dict[str, Parameter] = {n: p for n, p in seen.parameters.items() if p.nonzero}
    still = [name for name, p in pushed.items() if not p.moved]
    rates = "; ".join(
        f"{name} lr {', '.join(f'{rate:.3g}' for rate in rates)}"
        for name, rates in seen.rates.items()
    )
    if pushed and len(still) == len(pushed):
        why = "no weight changed. Is the learning rate zero or far too small?"
        checks.append(Check("optimizer step", "FAIL", f"{why} ({rates})"))
    elif still:
        detail = f"has a gradient and did not change: {some(still)} ({rates})"
        checks.append(Check("optimizer step", "WARN", detail))
    elif pushed:
        text = f"{len(pushed)} of {len(seen.parameters)} parameter tensors changed; {rates}"
        checks.append(Check("optimizer step", "PASS", text))
    return checks + _changes(seen, rates)


def _changes(seen: Seen, rates: str) -> list[Check]:
    """Whether steps change weights by a sensible part of their size."""
    changes = sorted(p.change for p in seen.parameters.values() if p.change is not None)
    if not changes:
        return []
    usual = changes[len(changes) // 2]
    said = f"a step changes the weights by {usual:.2g} of their size (median over tensors; {rates})"
    rising = any(each[-1] > each[0] for each in seen.rates.values())
    if usual > _LARGE_CHANGE:
        return [Check("learning rate", "WARN", f"{said}: is lr too high, or a warm-up missing?")]
    if 0 < usual < _SMALL_CHANGE and not rising:
        return [Check("learning rate", "WARN", f"{said}: is lr far too low?")]
    return []


def scheduler_step(trainer: Trainer, seen: Seen) -> list[Check]:
    """Whether schedulers are stepped.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    schedulers = trainer.named_schedulers() or {}
    if not schedulers:
        return [Check("scheduler step", "SKIP", "there is no lr_scheduler")]
    interval = trainer.lr_scheduler_interval
    steps = {name: int(getattr(s, "last_epoch", 0)) for name, s in schedulers.items()}
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in trainer.learning_rates.items())
    told = ", ".join(f"{name} stepped {n} times" for name, n in steps.items())
    once = " (once to test it)" if seen.extra_schedule_step else ""
    status = "PASS" if all(steps.values()) else "WARN"
    detail = f"{told}{once}, each {interval}; learning rate now: {rates}"
    return [Check("scheduler step", status, detail)]


def validation(trainer: Trainer, seen: Seen) -> list[Check]:
    """The validation data and metrics.

    Args:
        trainer: the trainer after the rehearsal.
        seen: the observations.
    """
    if not trainer.has_validation:
        return [Check("validation", "SKIP", "there is no val_dataloader")]
    data: list[str] = []
    for name, loader in loaders_by_name(trainer.val_dataloader).items():
        length = trainer.validation[name].length
        batches = "of unknown length" if length is None else f"{length:,} batches"
        which = "" if name is None else f"{name}: "
        data.append(f"{which}{_samples(loader)}, {batches}")
    checks = [Check("validation data", "PASS", "; ".join(data))] if data else []
    if not seen.metrics:
        detail = "it measures nothing: call self.log in validation_step, or return metrics from "
        return [*checks, Check("validation", "WARN", detail + "get_val_metrics")]
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in seen.metrics.items())
    bad = [name for name, value in seen.metrics.items() if not math.isfinite(value)]
    status = "WARN" if bad else "PASS"
    tried = ""
    if trainer.validation:
        each = "" if len(trainer.validation) == 1 else " of each loader"
        tried = f" on {seen.validation_batches} batches (at most {VALIDATED}{each} were tried)"
    return [*checks, Check("validation", status, f"{metrics}{tried}")]


def duration(seconds_per_step: float, horizon: int | None, validations: float | None) -> str:
    """The line about the time of the whole run.

    Args:
        seconds_per_step: the time of an optimizer step.
        horizon: optimizer steps in the run; None if unknown.
        validations: the time of all validations, in seconds; None if unknown.
    """
    if horizon is None:
        return "the run's length is not known in advance"
    steps = seconds_per_step * horizon
    text = f"{horizon:,} steps take about {readable_seconds(steps)}"
    if validations:
        text += f", validations {readable_seconds(validations)}"
    return text
