"""Backward, clipping, the optimizer step and its schedulers, and what is not finite.

A non-finite loss never reaches the weights. Where reading a value is free (a CPU) the window is
dropped at once. On several ranks a bad loss enters the backward pass as NaN, so that every rank
finds it in the gradients it receives, without a collective of its own. On an accelerator nothing is
read: the verdict stays on the device, masks the step of fused optimizers there (`found_inf`), and
is read with the next row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from contextlib import suppress
from copy import deepcopy
from functools import partial, wraps
from itertools import chain
from types import MethodType
from typing import Any

import torch

from paceline.checkpoint.state import parameter_names
from paceline.errors import ConfigError, LossError, some
from paceline.parallel.ddp import Replica
from paceline.parallel.placement import check_synchronized
from paceline.trainer.nonfinite import NonFiniteGuard
from paceline.trainer.recorder import Recorder
from paceline.trainer.run import Run
from paceline.trainer.weighting import check_loss, weighted
from paceline.trainer.window import Window, gradients_aside
from paceline.world.dtensors import (
    clip_gradients,
    dense_part,
    groups_by_mesh,
    local_part,
    whole,
)
from paceline.world.world import World

_OWN_STEP = (
    "training_step steps {} itself, and the loop does so too: leave it out, and return the loss. "
    "To step yourself, override step(window) with self.backward(loss) and self.optimizer_step()."
)
_OWN_CLEARING = (
    "training_step clears gradients itself, which drops those of the window's micro-batches before "
    "this one: leave zero_grad() out. The loop clears them before each window."
)
_CLEARED = (
    "the gradients of the window's micro-batches before this one were cleared: leave zero_grad() "
    "out of training_step and of hooks. The loop clears them before each window."
)


class Optimization:
    """Does a window's mathematics.

    Args:
        run: whose models, optimizers, schedulers and settings these are, placed.
        recorder: takes losses and gradient norms.

    Attributes:
        optimizers: by name.
        guard: keeps what is not finite from the weights.
        norms: of each optimizer's gradients in its last step, if that took one.
        compared: whether ranks of a split are known to agree on the gradients of what is whole.
    """

    def __init__(self, run: Run, recorder: Recorder) -> None:
        components, parallel = run.components, run.world.parallel
        self._run = run
        self._settings = run.settings
        self._recorder = recorder
        self._placement = run.placement
        self.optimizers = components.named_optimizers()
        self._schedulers: dict[str, list[Any]] = {name: [] for name in self.optimizers}
        for scheduler in (components.named_schedulers() or {}).values():
            name = components.get_name_by_optimizer(scheduler.optimizer)
            self._schedulers[name].append(scheduler)
        replicas = self._placement.replicas
        self._covered = self._placement.covered
        self._copies = {
            name: [
                replica
                for replica in replicas
                if isinstance(replica, Replica)
                and not replica.covered.isdisjoint(map(id, _parameters(optimizer)))
            ]
            for name, optimizer in self.optimizers.items()
        }
        # Two backward passes of one call are one exchange, which ends in the second.
        owners = [id(replica) for replicas in self._copies.values() for replica in replicas]
        self._shares_copies = len(owners) > len(set(owners))
        # The optimizers whose parameters may be without a gradient on every rank; None: not known.
        always = parallel.find_unused_parameters
        self._leaves_out = dict.fromkeys(self.optimizers, True if always else None)
        self._stood_in: set[int] = set()  # parameters with a gradient from stand-ins alone
        self._single = next(iter(self.optimizers)) if len(self.optimizers) == 1 else None
        # Before the first backward pass; stages have no training_step.
        staged = self._placement.pipeline is not None
        self._checks_clear = self._guards = not (staged or components.is_overridden("step"))
        self._sent = -1  # the window's micro-batch that was sent backward last
        self._kept: list[torch.nn.Parameter] = []  # some that have its gradient
        # By optimizer, what takes the place of its step, and that step.
        self._steps: dict[torch.optim.Optimizer, tuple[Any, Any]] = {}
        self._refusals: list[Callable[[], Any]] = []  # what takes them back then
        self._counts: list[Any] = []  # the schedulers' before it
        self._found_independent = False  # losses by optimizer name have been checked
        self._splits = parallel.tensor > 1
        self._several_meshes = parallel.tensor * parallel.expert > 1
        self.compared = not self._splits
        self._stepping = self._single or ""  # the optimizer whose step is being taken
        self.norms: dict[str, torch.Tensor] = {}
        self._weight: Any = 1.0  # of the last micro-batch that was sent backward
        self._scale_is_due = False  # a step was unscaled; the scale may change before the next
        run.scaler = _scaler(run.world) if self._settings.precision == "fp16" else None
        self.guard = NonFiniteGuard(run, optimizers=len(self.optimizers))
        if self._guards:
            for optimizer in self.optimizers.values():
                self._guard_step(optimizer)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales losses in fp16; None otherwise."""
        return self._run.scaler

    @scaler.setter
    def scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        self._run.scaler = scaler

    @property
    def leaves_out(self) -> list[str]:
        """The optimizers whose parameters may be without a gradient: found once in a run's life."""
        return [name for name, known in self._leaves_out.items() if known]

    def load_leaves_out(self, names: Collection[str]) -> None:
        """Restores it, so that a window which happens to leave nothing out decides nothing.

        Args:
            names: what `leaves_out` was.
        """
        for name in self._leaves_out.keys() & names:
            known, self._leaves_out[name] = self._leaves_out[name], True
            if not known and self._copies[name]:
                line = "exchanges in each window which parameters have gradients"
                self._run.plan.add(line, "parallel.find_unused_parameters")

    def exchange_without(self, frozen: Set[int]) -> None:
        """Leaves frozen parameters out of what the ranks exchange; all ranks do at one boundary.

        Args:
            frozen: the `id` of each parameter that is frozen for a while; what was frozen before
                and is not among them is exchanged again.
        """
        self._placement.exchange_without(frozen)
        self._covered = self._placement.covered
        # What trains from now on may be left out by losses that reached all before.
        self._leaves_out = {name: known or None for name, known in self._leaves_out.items()}
        self.compared = not self._splits

    def begin(self, window: Window) -> None:
        """A new window: gradients from before it are no part of it, whoever has made them.

        Args:
            window: the one at hand from now on.
        """
        if self._checks_clear:
            self._take_refusals_back()  # of a window that was passed over
        for optimizer in self.optimizers.values():
            clear_gradients(optimizer)
        self._stood_in.clear()
        self._sent, self._kept = -1, []
        self.guard.begin(window)
        if self._checks_clear:
            self._refuse_clearing(window)

    def backward(self, loss: Any, only: str | Collection[str] | None = None) -> None:
        """Adds the gradients of one micro-batch, weighted for the window's mean over items.

        Args:
            loss: the mean over the micro-batch's items; a dictionary with it as "loss", and what to
                log; or independent losses by optimizer name.
            only: the optimizer, or several, whose parameters are to get gradients; all, unless
                given.

        Raises:
            LossError: it is no loss, or names an optimizer that there is not.
        """
        run, window = self._run, self.guard.window
        assert window is not None
        if isinstance(loss, dict):
            loss = self._of_dictionary(loss)
        if self._checks_clear:
            self._check_clear(loss)
        for parameter in self._kept:
            if parameter.grad is None:
                raise LossError(_CLEARED)
        self._sent = window.position
        check_loss(loss)
        if self._splits:
            loss = whole(loss)  # of logits whose classes are split
        if self._scale_is_due:
            self._update_scale()
        window.loss = raw = loss.detach()
        self._recorder.log_loss(raw)
        self._weight = window.weight
        nothing = window.weighs_nothing
        share = self._zero_loss() if nothing else weighted(loss, window.weight)
        for hook in run.events.on_before_backward:
            hook(share)
        if not nothing:
            share = self.guard.guarded(share, raw)
        if run.scaler is not None:
            share = run.scaler.scale(share)
        if only is None:
            share.backward()
        else:
            self._backward_for((only,) if isinstance(only, str) else only, share)
        for hook in run.events.on_after_backward:
            hook()
        if self._guards and len(window.counts) > 1:
            firsts = map(_first_with_gradient, self.optimizers.values())
            self._kept = [parameter for parameter in firsts if parameter is not None]

    def step(self, name: str | None = None) -> torch.Tensor | None:
        """Steps one optimizer and its schedulers; the only one if no name is given.

        Returns:
            The norm of its gradients before clipping, on the device; None if none was measured.

        Raises:
            ConfigError: no such optimizer, or several and none was named.
        """
        name = name or self._single or ""
        if name not in self.optimizers:
            raise self._unknown(name)
        optimizer, run, settings = self.optimizers[name], self._run, self._settings
        self._stepping = name
        self.norms.pop(name, None)
        if run.groups is not None and not run.groups.commit(optimizer):
            clear_gradients(optimizer)
            return None
        for replica in self._placement.replicas:
            replica.check_exchanged()
        if self._copies[name]:
            self._finish_exchange(name)
        if run.world.parts > 1:
            check_synchronized(optimizer, name, self._covered, run.components.named_models())
        if not self.compared:
            self._compare_whole_gradients()
        scales = run.scaler is not None and any(p.grad is not None for p in _parameters(optimizer))
        if run.scaler is not None and scales:
            run.scaler.unscale_(optimizer)
            self._scale_is_due = True
        for hook in run.events.on_before_optimizer_step:
            hook(optimizer)
        if settings.max_grad_norm is not None:
            self._clip(optimizer, settings.max_grad_norm)
        elif settings.check_gradients or isinstance(self._weight, torch.Tensor):
            # A batch without items is weighed with zero; where counts are not read, nothing but its
            # gradients tells whether that was enough (0 / 0 stays NaN).
            self.guard.check_norm(optimizer)
        run.progress.rates[name] = _rates(optimizer.param_groups)
        if self.guard.allows(optimizer):
            self._advance(optimizer, scales=scales)
        clear_gradients(optimizer)
        if settings.lr_scheduler_interval == "step":
            for scheduler in self._schedulers[name]:
                scheduler.step()
        return self.norms.get(name) if self.norms else None

    def step_with(
        self, closure: Callable[[], torch.Tensor], name: str | None = None
    ) -> torch.Tensor | None:
        """As `step`, of an optimizer that evaluates the loss itself, several times (LBFGS).

        Each loss is read as it comes, as the optimizer does itself.

        Args:
            closure: computes the loss, sends it backward and returns it.
            name: the optimizer's; the only one if None.

        Returns:
            The norm of its first gradients before clipping; None if none was measured.

        Raises:
            ConfigError: no such optimizer; or there are several ranks, a loss scaler or more than
                one micro-batch.
            NonFiniteError: a loss is not finite and the policy is "raise".
        """
        name = name or self._single or ""
        if name not in self.optimizers:
            raise self._unknown(name)
        optimizer, run, settings = self.optimizers[name], self._run, self._settings
        window = self.guard.window
        assert window is not None
        if run.world.size > 1 or run.groups is not None or run.scaler is not None:
            raise ConfigError("optimizer_step(closure=...) does not exist yet on ranks or in fp16.")
        if len(window) > 1:
            raise ConfigError(
                f"optimizer_step(closure=...) takes one micro-batch a window, and this has "
                f"{len(window)}: leave gradient_accumulation_steps and global_batch_size out, and "
                "give larger batches."
            )
        self._stepping, muted, first = name, run.muted, True
        self.norms.pop(name, None)
        self.guard.read_at_once()
        before = _Held(optimizer, with_state=settings.on_nonfinite in ("stop", "skip"))

        def evaluate() -> torch.Tensor:
            nonlocal first
            clear_gradients(optimizer)
            loss = closure()
            check_loss(loss, giver="the closure")
            self.guard.guarded(loss, loss.detach())
            if first:
                for hook in run.events.on_before_optimizer_step:
                    hook(optimizer)
            norms = dict(self.norms)
            if settings.max_grad_norm is not None:
                self._clip(optimizer, settings.max_grad_norm)
            elif settings.check_gradients:
                self.guard.check_norm(optimizer)
            if not first:
                self.norms = norms
            if self.guard.found is not None:
                raise _NotFiniteError
            first, run.muted = False, True  # a step is logged once
            return loss.detach()

        try:
            optimizer.step(evaluate)  # pyright: ignore - torch says that it returns a float
        except _NotFiniteError:
            before.put_back()
        finally:
            run.muted = muted
        run.progress.rates[name] = _rates(optimizer.param_groups)
        self.guard.allows(optimizer)
        clear_gradients(optimizer)
        if settings.lr_scheduler_interval == "step":
            for scheduler in self._schedulers[name]:
                scheduler.step()
        return self.norms.get(name)

    def _unknown(self, name: str) -> ConfigError:
        return ConfigError(f"optimizer_step({name!r}): name one of {', '.join(self.optimizers)}.")

    def _clip(self, optimizer: torch.optim.Optimizer, largest: float) -> None:
        norm = clip_gradients(_parameters(optimizer), largest, self._placement.norm_of)
        self._recorder.log("grad_norm", norm, weight=1)
        self.note_norm(norm)

    def note_norm(self, norm: torch.Tensor) -> None:
        """Takes a norm of the gradients of the optimizer whose step is being taken."""
        self.norms[self._stepping] = norm
        self.guard.note_norm(norm)

    def step_schedulers(self, interval: str, metric: float | None = None) -> None:
        """Steps all schedulers if theirs is this interval.

        Args:
            interval: "epoch" or "metric".
            metric: what schedulers of interval "metric" get.
        """
        if self._settings.lr_scheduler_interval != interval:
            return
        for schedulers in self._schedulers.values():
            for scheduler in schedulers:
                scheduler.step(*(() if metric is None else (metric,)))

    def _zero_loss(self) -> torch.Tensor:
        """In the place of a loss over no items, which may be anything."""
        window = self.guard.window
        if any(self._copies.values()) and window is not None and window.stand_in:
            parameters = chain.from_iterable(map(_parameters, self.optimizers.values()))
            self._stood_in.update(id(p) for p in parameters if p.grad is None)
        return self._placement.zero_loss(self._run.components.named_models())

    def _finish_exchange(self, name: str) -> None:
        """Completes the exchange of gradients; what has one on no rank is left without.

        Raises:
            LossError: this rank has none for some parameters, which the first window did not show.
        """
        run, known = self._run, self._leaves_out[name]
        left_out = [p for replica in self._copies[name] for p in replica.finish_exchange()]
        if known is None:
            told = run.world.all_gather_object(self._names(left_out))
            known = self._leaves_out[name] = any(told)
            if known:
                names = some(list(dict.fromkeys(chain.from_iterable(told))))
                line = f"exchanges in each window which parameters have gradients: not all {names}"
                run.plan.add(line, "parallel.find_unused_parameters")
                run.world.say(f"plan: {line}  [parallel.find_unused_parameters]")
                with suppress(OSError):  # it is written again at the end
                    run.record.update(plan=run.plan.as_list())
        if known:
            self._drop_unused(name, {id(p) for p in left_out} | self._stood_in)
        elif left_out:
            raise LossError(
                f"step {run.global_step + 1}: no loss of rank {run.world.rank} reached "
                f"{some(self._names(left_out))}, as all did in the first window. Set "
                "parallel.find_unused_parameters=True to exchange in each window which parameters "
                "have gradients."
            )

    def _drop_unused(self, name: str, unused_here: Set[int]) -> None:
        """Leaves parameters without a gradient that no rank uses, those of other optimizers too."""
        own = {id(p): p for p in _parameters(self.optimizers[name])}
        exchanged = {id(p): p for replica in self._copies[name] for p in replica.exchanged}
        parameters = list({**own, **exchanged}.values())
        # On the CPU: the ranks wait for each other, and no rank waits for its device.
        used = torch.tensor([p.grad is not None and id(p) not in unused_here for p in parameters])
        everywhere = self._run.world.all_reduce(used.to(torch.uint8), "max")
        for parameter, is_used in zip(parameters, everywhere.tolist(), strict=True):
            if not is_used:
                parameter.grad = None

    def _names(self, parameters: list[torch.nn.Parameter]) -> list[str]:
        if not parameters:
            return []
        known = parameter_names(self._run.components.named_models())
        return [known.get(id(p), "a parameter of no model") for p in parameters]

    def end_window(self) -> None:
        """Settles the scale for the next window."""
        if self._scale_is_due:
            self._update_scale()

    def _backward_for(self, only: Collection[str], loss: torch.Tensor) -> None:
        """Leaves the gradients of every other optimizer's parameters as they were."""
        _check_names(only, self.optimizers, "backward(loss, only=...)")
        if self._shares_copies:
            own = chain.from_iterable(_parameters(self.optimizers[name]) for name in only)
            loss.backward(inputs=[p for p in own if p.requires_grad])
            return
        with gradients_aside(o for name, o in self.optimizers.items() if name not in only):
            loss.backward()

    def _of_dictionary(self, returned: dict[str, Any]) -> Any:
        """The loss of a dictionary: its "loss", beside which the rest is logged, or a sum."""
        if "loss" not in returned:
            return self._sum_of_independent(returned)
        for name, value in returned.items():
            if name != "loss":
                self._recorder.log(f"train/{name.removeprefix('train/')}", value)
        return returned["loss"]

    def _sum_of_independent(self, losses: dict[str, Any]) -> torch.Tensor:
        """One loss from those by optimizer name, whose gradients must not mix."""
        if self._single and losses and self._single not in losses:
            raise LossError(
                f"training_step returned a dictionary with {some(map(repr, losses))}, and the loop "
                "takes the loss from its 'loss': return {'loss': loss, ...}. What else is in it is "
                "logged."
            )
        _check_names(losses, self.optimizers, "training_step")
        for name, part in losses.items():
            check_loss(part, f" for {name!r}")
            self._recorder.log(f"train/loss/{name}", part)
            if not self._found_independent:
                self._check_independent(name, part)
        if not losses:
            raise LossError("training_step returned no loss: the dictionary is empty.")
        self._found_independent = True
        return torch.stack([part.reshape(()) for part in losses.values()]).sum()

    def _check_independent(self, name: str, loss: torch.Tensor) -> None:
        reached = _reachable(loss)
        for other, optimizer in self.optimizers.items():
            if other != name and any(id(p) in reached for p in _parameters(optimizer)):
                raise LossError(
                    f"the loss for {name!r} also reaches parameters of {other!r}, which would be "
                    "trained by both losses. Detach what it should not train, or override "
                    f"step(window) and call self.backward(loss, {name!r}), which leaves the "
                    "gradients of the others alone."
                )

    def _guard_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Has an optimizer's step raise if training_step calls it, in any micro-batch.

        The loop itself calls the step of before, so that this costs it nothing.
        """
        before, had = optimizer.step, vars(optimizer).get("step")

        @wraps(getattr(before, "__func__", before))
        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            window = self.guard.window
            if window is None or window.batch is None or not self._guards:
                return before(*args, **kwargs)
            if window.position > self._sent:
                raise LossError(_OWN_STEP.format("the optimizer"))
            return before(*args, **kwargs)

        def take_back() -> None:
            self._guards = False
            if vars(optimizer).get("step") is guarded:  # else somebody has wrapped it
                vars(optimizer).pop("step")
                vars(optimizer).update({} if had is None else {"step": had})

        guarded = MethodType(step, optimizer)  # schedulers of torch wrap methods
        vars(optimizer)["step"] = guarded
        self._steps[optimizer] = guarded, before
        self._run.cleanup.callback(take_back)

    def _refuse_clearing(self, window: Window) -> None:
        """Has the first training_step raise if it clears an optimizer's gradients."""

        def refuse_clearing(set_to_none: bool = True) -> None:
            raise LossError(_OWN_CLEARING)

        for optimizer in self.optimizers.values():
            if len(window) > 1 and "zero_grad" not in vars(optimizer):
                vars(optimizer)["zero_grad"] = refuse_clearing
                self._refusals.append(partial(vars(optimizer).pop, "zero_grad", None))
        for take_back in self._refusals:
            self._run.cleanup.callback(take_back)
        self._counts = self._steps_of_schedulers()

    def _take_refusals_back(self) -> None:
        while self._refusals:
            self._refusals.pop()()

    def _steps_of_schedulers(self) -> list[Any]:
        schedulers = chain.from_iterable(self._schedulers.values())
        return [getattr(scheduler, "last_epoch", None) for scheduler in schedulers]

    def _check_clear(self, loss: Any) -> None:
        """Refuses what a training_step must leave to the loop: steps, and gradients of its own.

        Args:
            loss: that it returned; nothing is refused with a reason of its own.

        Raises:
            LossError: it has stepped a scheduler, or made gradients to which the loss's would add.
        """
        self._checks_clear = False  # a training_step that does so does so in its first call
        self._take_refusals_back()
        if loss is None:
            return
        if self._counts != self._steps_of_schedulers():
            raise LossError(_OWN_STEP.format("the learning-rate scheduler"))
        parameters = chain.from_iterable(map(_parameters, self.optimizers.values()))
        gradients = [(p, dense_part(local_part(p.grad))) for p in parameters if p.grad is not None]
        made = [parameter for parameter, gradient in gradients if gradient.any()]
        if made:
            raise LossError(
                f"training_step leaves gradients on {some(self._names(made))}, and those of its "
                "loss would be added to them. Does training_step call backward() itself? It "
                "returns the loss, and the loop calls backward(). For backward passes of your own "
                "override step(window), with self.backward(loss); gradients that serve something "
                "else are to be cleared before the loss is returned."
            )

    def _advance(self, optimizer: torch.optim.Optimizer, *, scales: bool) -> None:
        scaler, step = self._run.scaler, optimizer.step
        guarded, before = self._steps.get(optimizer, (None, None))
        if step is guarded:
            step = before
        if scaler is not None and scales:
            step = partial(scaler.step, optimizer)
        if self._several_meshes:
            with groups_by_mesh(optimizer):
                step()
        else:
            step()
        vars(optimizer).pop("found_inf", None)  # the guard's mask is for this step alone

    def _compare_whole_gradients(self) -> None:
        from paceline.parallel.tensor_parallel import check_whole_gradients

        check_whole_gradients(self._run.components.named_models(), self._run.world)
        self.compared = True

    def _update_scale(self) -> None:
        # Once all optimizers of a backward pass have stepped: their gradients have one scale.
        assert self._run.scaler is not None
        self._run.scaler.update()
        self._scale_is_due = False


class _NotFiniteError(Exception):
    """Ends an optimizer's step from within its closure."""


class _Held:
    """An optimizer's parameters as they are now, to be put back.

    Args:
        optimizer: that may change them.
        with_state: whether its own state is put back too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, with_state: bool) -> None:
        self._optimizer = optimizer
        self._values = [(p, p.detach().clone()) for p in _parameters(optimizer)]
        state = optimizer.state.items() if with_state else ()
        self._state = {parameter: deepcopy(of_it) for parameter, of_it in state}
        self._with_state = with_state

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter, value in self._values:
            parameter.copy_(value)
        if self._with_state:
            self._optimizer.state.clear()
            self._optimizer.state.update(self._state)


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Does what `zero_grad` does, without the profiler's label that makes up most of its time.

    Args:
        optimizer: whose parameters' gradients are dropped; a `zero_grad` of its own is called.
    """
    if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def takes_metric(scheduler: Any) -> bool:
    """Whether a scheduler steps with a metric, so that its course cannot be computed."""
    takes = inspect.signature(scheduler.step).parameters.get("metrics")
    return takes is not None and takes.default is inspect.Parameter.empty


def _scaler(world: World) -> torch.amp.GradScaler:
    if not world.parallel.partitions_state:
        return torch.amp.GradScaler(world.device.type)
    from paceline.parallel.grad_scaler import SpreadScaler

    return SpreadScaler(world.device.type, world)


def _rates(groups: list[dict[str, Any]]) -> list[Any]:
    return [groups[0]["lr"]] if len(groups) == 1 else [group["lr"] for group in groups]


def _first_with_gradient(optimizer: torch.optim.Optimizer) -> torch.nn.Parameter | None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return parameter
    return None


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _reachable(loss: torch.Tensor) -> set[int]:
    """`id` of every tensor whose gradient a loss has a part in."""
    reached: set[int] = set()
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        ahead += [following for following, _ in node.next_functions]
    return reached


def _check_names(names: Iterable[str], known: Mapping[str, Any], where: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LossError(
            f"{where} names {', '.join(map(repr, unknown))}; the optimizers are {', '.join(known)}."
        )
