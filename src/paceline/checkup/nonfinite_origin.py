"""Watches one optimizer step, and finds where a value first becomes non-finite.

Every operation of the step's forward passes is looked at as it returns, with the module in whose
forward it ran. One that makes NaN or infinity of finite numbers is a source, and what is computed
from its result carries it on: the source that the loss carries is the origin. So an attention mask
of minus infinities, which a softmax takes away, and a metric that is logged are none. If the loss
is finite, the nodes of its graph are watched in the backward pass. torch's anomaly mode is not
used: it knows no module, takes an infinity for a number, and raises within a backward pass in which
other ranks take part.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path

from paceline.log.traceback import is_users
from paceline.trainer.callback import Callback
from paceline.trainer.trainer import Trainer
from paceline.world.dtensors import dense_part, local_part

if TYPE_CHECKING:
    from torch.autograd.graph import Node

# Frames further out are those that train, and did not compute.
_LOOP = frozenset(
    f.__code__
    for method in (Trainer.train, Trainer.fit, Trainer.epoch)
    for f in (method, inspect.unwrap(method))
)


@dataclass(frozen=True)
class Origin:
    """Where a value first became non-finite.

    Attributes:
        phase: "forward" or "backward".
        module: the fully qualified name of the module in whose forward it was computed; None
            outside of all modules, in the training step or the loss.
        operation: what computed it, or its node in the graph; None if that is not known.
        place: file and line of the user's code that called it, if it is there.
        value: "nan", "inf" or "-inf".
        rank: which found it.
        batch_idx: of the micro-batch, in the epoch.
    """

    phase: str
    module: str | None
    operation: str | None = None
    place: str | None = None
    value: str = ""
    rank: int = 0
    batch_idx: int = 0

    def __str__(self) -> str:
        where = f"module {self.module}" if self.module else "the training step, outside of modules"
        what = f": {self.operation} gives {self.value}" if self.operation else f": {self.value}"
        place = f" ({self.place})" if self.place else ""
        return f"in the {self.phase} pass of {where}{what}{place}"


@dataclass(frozen=True)
class Seen:
    """What a rank has seen of the step.

    Attributes:
        rank: which.
        losses: those that are not finite, as weighted for the window, by micro-batch.
        gradient: the first parameter whose gradient is not finite.
        origin: where it began here, if it did.
        inputs, weights: tensors of the batches and parameters that were not finite to begin with.
        samples: of the first micro-batch with such a loss, or else of the last.
    """

    rank: int
    losses: dict[int, float]
    gradient: str | None
    origin: Origin | None
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    samples: tuple[Any, ...]

    @property
    def is_bad(self) -> bool:
        """Whether the step is not finite on this rank."""
        return bool(self.losses) or self.gradient is not None


@dataclass(eq=False)
class _Source:
    """An operation that made something non-finite of finite numbers."""

    origin: Origin
    node: Node | None  # of the result, in the graph
    number: int  # in their order


class StepWatch(Callback):
    """Watches one step of a run.

    Args:
        step: which, from 1.
        run_dir: of the run that was not finite in it.
        skips: steps before it, from 0, that the run has passed over since it went back.

    Attributes:
        ranks: what each rank has seen, once the step's gradients are there.
    """

    priority = 10**9

    def __init__(self, step: int, run_dir: Path, skips: Iterable[int] = ()) -> None:
        self.name = "replay"
        self.step = step
        self._run_dir = run_dir
        self._skips = set(skips)
        self.ranks: list[Seen] = []
        self._losses: dict[int, float] = {}
        self._origin: Origin | None = None
        self._inputs: list[str] = []
        self._weights: list[str] = []
        self._samples: list[Any] = []
        self._forward: _Forward | None = None
        self._undo = ExitStack()

    def on_setup(self, trainer: Trainer) -> None:
        """What is said of the failure names the run's folder, which has its batch."""
        trainer.optimization.guard.replayed = self._run_dir

    def on_train_start(self, trainer: Trainer) -> None:
        """Passes over what the run has passed over, but for the step itself."""
        skips = {*trainer.progress.skips, *self._skips} - {self.step - 1}
        trainer.progress.skips = sorted(skips)

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Begins with the step's first micro-batch."""
        if trainer.global_step != self.step - 1:
            return
        if self._forward is None:
            self._forward = _Forward(_names(trainer))
            self._undo.enter_context(self._forward)
            self._weights = [
                f"{name}.{inner}"
                for name, model in trainer.named_models().items()
                for inner, parameter in model.named_parameters()
                if _bad([parameter])
            ]
        self._forward.begin(trainer.world.rank, batch_idx)
        self._inputs += [
            f"batch {batch_idx}{keystr(path)}"
            for path, leaf in tree_leaves_with_path(batch)
            if _bad([leaf])
        ]

    def on_before_backward(self, trainer: Trainer, loss: torch.Tensor) -> None:
        """Judges the forward pass, or has the backward pass watched."""
        if self._forward is None:
            return
        value = float(loss.detach().sum())
        batch_idx = trainer.window.batch_idx
        if not self._losses and self._origin is None:
            self._samples = trainer.window.ids()
        if not math.isfinite(value):
            self._losses[batch_idx] = value
            self._origin = self._origin or self._forward.origin_of(loss)
        elif self._origin is None and trainer.optimization.scaler is None:  # which may overflow
            self._forward.watch_backward(loss, self._note)

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Every rank learns what the others have seen."""
        if self._forward is None:
            return
        gradient = None if trainer.optimization.scaler is not None else _first_bad_gradient(trainer)
        seen = Seen(
            trainer.world.rank,
            self._losses,
            gradient,
            self._origin,
            tuple(self._inputs),
            tuple(self._weights),
            tuple(self._samples),
        )
        self.ranks = trainer.world.all_gather_object(seen)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Ends the run behind the step."""
        if trainer.global_step >= self.step:
            raise StepIsOver

    def on_teardown(self, trainer: Trainer) -> None:
        """Watches nothing any more."""
        self._undo.close()

    def _note(self, origin: Origin) -> None:
        self._origin = self._origin or origin


class StepIsOver(Exception):
    """The step that is watched is done, and nothing is left to do."""


class _Forward(TorchFunctionMode):
    """Looks at each operation of forward passes, and knows which module and line each node is of.

    Args:
        names: of the modules, by `id`.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self._modules: list[tuple[str | None, int]] = []  # that run, each with sources before
        self._sources: list[_Source] = []
        self._carried: dict[int, tuple[torch.Tensor, _Source]] = {}  # by `id`, while it is one
        self._owner: dict[Node, Origin] = {}
        self._place = (0, 0)
        self._undo = ExitStack()

    def begin(self, rank: int, batch_idx: int) -> None:
        """A micro-batch.

        Args:
            rank: this one.
            batch_idx: its index in the epoch.
        """
        self._place = rank, batch_idx
        self._sources.clear()
        self._carried.clear()
        self._owner.clear()

    def __enter__(self) -> Any:
        hooks: tuple[Any, ...] = (
            module_hooks.register_module_forward_pre_hook(self._before),
            module_hooks.register_module_forward_hook(self._after, always_call=True),
        )
        for hook in hooks:
            self._undo.callback(hook.remove)
        if "torch._dynamo" in sys.modules:  # something may be compiled, which shows no operations
            self._undo.enter_context(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        results = _floating(tree_leaves(out))
        if results:
            self._look(func, (args, kwargs), results)
        return out

    def _look(self, func: Any, given: Any, results: list[torch.Tensor]) -> None:
        of = self._at(_name_of(func), _place_of_call())
        for result in results:
            self._take(result.grad_fn, of)
        if not (value := _bad(results)):
            return
        taken = [each for each in _floating(tree_leaves(given)) if _bad([each])]
        if taken:
            self._carry_on(taken, results)
        elif "empty" not in (of.operation or ""):  # which computes nothing
            self._begin(replace(of, value=value), results)

    def _begin(self, origin: Origin, results: list[torch.Tensor]) -> None:
        source = _Source(origin, results[0].grad_fn, len(self._sources))
        self._sources.append(source)
        self._carried.update({id(result): (result, source) for result in results})

    def _carry_on(self, taken: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        known = [self._carried[id(each)][1] for each in taken if id(each) in self._carried]
        if known:
            first = min(known, key=lambda source: source.number)
            self._carried.update({id(result): (result, first) for result in results})

    def _at(self, operation: str | None, place: str | None) -> Origin:
        module = self._modules[-1][0] if self._modules else None
        rank, batch_idx = self._place
        return Origin("forward", module, operation, place, rank=rank, batch_idx=batch_idx)

    def _take(self, node: Node | None, of: Origin) -> None:
        """Notes whose a node is, and those behind it that nobody has taken."""
        ahead = [node]
        while ahead:
            each = ahead.pop()
            if each is not None and each not in self._owner:
                self._owner[each] = of
                ahead += [following for following, _ in each.next_functions]

    def _before(self, module: torch.nn.Module, inputs: Any) -> None:
        outer = self._modules[-1][0] if self._modules else None
        self._modules.append((self._names.get(id(module), outer), len(self._sources)))

    def _after(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Looks at a module as a whole, which may have computed beside torch's functions."""
        results = _floating(tree_leaves(output))
        within = len(self._sources) > self._modules[-1][1]
        if not within and (value := _bad(results)) and not _bad(tree_leaves(inputs)):
            self._begin(replace(self._at(None, None), value=value), results)
        self._modules.pop()

    def origin_of(self, loss: torch.Tensor) -> Origin | None:
        """Where a loss became non-finite.

        Args:
            loss: with its graph.
        """
        if id(loss) in self._carried:
            return self._carried[id(loss)][1].origin
        reached = set(_nodes(loss))  # something on the way was computed beside torch's functions
        return next((source.origin for source in self._sources if source.node in reached), None)

    def watch_backward(self, loss: torch.Tensor, note: Callable[[Origin], None]) -> None:
        """Watches the nodes of a loss's graph.

        Args:
            loss: finite.
            note: gets the first that makes something non-finite of finite gradients.
        """
        for node in _nodes(loss):
            of = self._owner.get(node) or self._at(None, None)
            of = replace(of, phase="backward", operation=node.name())
            node.register_hook(partial(_watch_node, of, note))


def _watch_node(of: Origin, note: Callable[[Origin], None], made: Any, given: Any) -> None:
    value = _bad(made)
    if value and not _bad(given):
        note(replace(of, value=value))


def _nodes(loss: torch.Tensor) -> list[Node]:
    """The nodes of a graph. They are held, since another look makes other objects of them."""
    found: dict[Node, None] = {}
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found[node] = None
            ahead += [following for following, _ in node.next_functions]
    return list(found)


def _floating(values: Iterable[Any]) -> list[torch.Tensor]:
    return [
        v
        for v in values
        if isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex())
    ]


def _bad(values: Iterable[Any]) -> str:
    """What is not finite here, "nan" before "inf" before "-inf"; nothing if all is finite."""
    parts = [dense_part(local_part(each.detach())) for each in _floating(values)]
    parts = [part for part in parts if part.numel() and not part.is_meta]
    if all(bool(torch.isfinite(part).all()) for part in parts):
        return ""
    if any(bool(torch.isnan(part).any()) for part in parts):
        return "nan"
    return "-inf" if not any(bool((part == math.inf).any()) for part in parts) else "inf"


def _names(trainer: Trainer) -> dict[int, str]:
    """The fully qualified name of each module, by `id`."""
    models: dict[str, Any] = dict(trainer.named_models())
    if isinstance(trainer.loss_fn, torch.nn.Module):
        models.setdefault("loss_fn", trainer.loss_fn)
    return {
        id(module): f"{name}.{inner}" if inner else name
        for name, model in models.items()
        for inner, module in model.named_modules()
    }


def _first_bad_gradient(trainer: Trainer) -> str | None:
    for name, model in trainer.named_models().items():
        for inner, parameter in model.named_parameters():
            if parameter.grad is not None and _bad([parameter.grad]):
                return f"{name}.{inner}"
    return None


def _name_of(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in _LOOP:
        yield frame
        frame = frame.f_back


def _place_of_call() -> str | None:
    """File and line of the user's code that is at work, if it is the user's that computes."""
    for frame in _frames():
        file = frame.f_code.co_filename
        if is_users(file):
            return f"{file}:{frame.f_lineno}"
    return None
