"""The state tree: everything a run is made of, in one place.

    models/<name>         state dict of each model (a stateful loss function is one)
    optimizers/<name>     state and groups, by parameter name
    schedulers/<name>     state dict
    scaler                of fp16 training
    progress              counters, pending parts of a boundary, skipped steps
    data                  position in the training data, if the same on every rank
    monitor               best metric and validations since
    callbacks/<name>      each callback's state_dict; averaged weights among them
    objects/<name>        `Trainer.checkpoint_objects`
    rank/<r>/data         position in this rank's data, if it keeps its own order
    rank/<r>/reader       what this rank's dataset keeps, such as a generator of its own
    rank/<r>/generators   of random generators that are attributes of the trainer, a callback, a
                          module or the loss
    rank/<r>/attributes   plain attributes of models, loss and settings that training has changed
    rank/<r>/validation   what the validation loaders' objects keep, by the loaders' names
    rank/<r>/sums         open metric sums
    rank/0/sinks          byte offsets of the row files
    settings              what tells callbacks and objects of one name apart; the metric watched
    identity, horizon     the settings that a resumed run is compared with
    identity_parts        which keys of the identity each of its parts gives
    made                  what training has changed of how models and optimizers were made: forms of
                          buffers, what requires gradients, modes, parameter groups, later models
    leaves_out            optimizers whose parameters a window may leave without a gradient

There are no random states: streams are derived from their purpose (`world/seeding.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paceline.checkpoint.compatibility import check_forms, form_of, forms_of, is_extra_state
from paceline.errors import MismatchError, StateError
from paceline.world.dtensors import is_dtensor, spread_like


def parameter_names(models: Mapping[str, torch.nn.Module]) -> dict[int, str]:
    """`id(parameter)` -> "model.parameter" for all models; tied parameters have the first name."""
    names: dict[int, str] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), f"{model_name}.{name}")
    return names


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The optimizer's state by parameter name, independent of the parameters' order.

    Args:
        optimizer: the optimizer.
        names: `parameter_names` of the models.

    Returns:
        `state` by parameter and `groups`; `entries`, what else `state` has, and `own`, what else
        its `state_dict()` has, only if there is any.
    """
    state = optimizer.state_dict()
    live = _groups(optimizer, names)
    packed = state.get("param_groups", live)
    known = {
        index: name
        for group, mine in zip(packed, live, strict=True)
        for index, name in zip(group["params"], mine["params"], strict=True)
    }
    entries = state.get("state", {})
    kept = {
        "state": {known[key]: value for key, value in entries.items() if key in known},
        "groups": [{**g, "params": mine["params"]} for g, mine in zip(packed, live, strict=True)],
    }
    other = {key: value for key, value in entries.items() if key not in known}
    own = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return kept | ({"entries": other} if other else {}) | ({"own": own} if own else {})


def _groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    try:
        return [
            {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups
        ]
    except KeyError:
        raise StateError(
            f"{type(optimizer).__name__} trains a parameter that no model has any more, so it "
            "could not be found again: training has replaced it, as tying weights does. Do that in "
            "configure() or on_setup."
        ) from None


def grouping(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """The names of the parameters in each of an optimizer's groups.

    Args:
        optimizer: the optimizer.
        names: `parameter_names` of the models.
    """
    return [group["params"] for group in _groups(optimizer, names)]


def regroup(
    optimizer: torch.optim.Optimizer, stored: Sequence[Mapping[str, Any]], models: Mapping[str, Any]
) -> None:
    """Gives an optimizer the parameter groups of a stored state, as `add_param_group` would.

    Args:
        optimizer: the optimizer.
        stored: `groups` of its state.
        models: by name, with the parameters.
    """
    parameters = {
        f"{model_name}.{name}": parameter
        for model_name, model in models.items()
        for name, parameter in model.named_parameters()
    }
    for i, group in enumerate(stored):
        params = [parameters[name] for name in group["params"]]
        if i < len(optimizer.param_groups):
            optimizer.param_groups[i]["params"] = params
        else:
            optimizer.add_param_group({**group, "params": params})
    del optimizer.param_groups[len(stored) :]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, stored: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    """Restores what `optimizer_state` returned; the groups hold the same parameters.

    Args:
        optimizer: the optimizer to load into.
        stored: the state.
        names: `parameter_names` of the models.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[id(p)]: i for i, p in enumerate(parameters)}
    state = {
        index[name]: _spread_state(values, parameters[index[name]])
        for name, values in stored["state"].items()
        if not parameters[index[name]].is_meta  # those of other ranks
    }
    groups = [{**g, "params": [index[name] for name in g["params"]]} for g in stored["groups"]]
    given = {"state": {**state, **stored.get("entries", {})}, "param_groups": groups}
    takes = optimizer.state_dict()
    own = stored.get("own", {})
    optimizer.load_state_dict({**{key: given[key] for key in given if key in takes}, **own})
    _undo_casts(optimizer, stored["state"], names)


def check_grouping(here: list[list[str]], stored: list[list[str]], what: str) -> None:
    """Compares an optimizer's groups, by `grouping`, with those of a stored state.

    Args:
        here: as the run has made them.
        stored: as the run that saved them had made them.
        what: the optimizer's name, for the message.

    Raises:
        MismatchError: the groups hold other parameters.
    """
    if here != stored:
        mine, theirs = ({name for group in groups for name in group} for groups in (here, stored))
        raise MismatchError(
            f"{what} does not fit the checkpoint's: {len(here)} groups of "
            f"{[len(g) for g in here]} parameters against {len(stored)} of "
            f"{[len(g) for g in stored]}; only here: {sorted(mine - theirs) or 'none'}; only in "
            f"the checkpoint: {sorted(theirs - mine) or 'none'}."
        )


def _spread_state(values: Any, parameter: torch.Tensor) -> Any:
    """One parameter's state, sharded like the parameter; tensors of another shape stay whole."""
    if not is_dtensor(parameter) or not isinstance(values, dict):
        return values
    return {
        key: _spread(value, parameter if getattr(value, "shape", None) == parameter.shape else None)
        for key, value in values.items()
    }


def _spread(value: Any, like: Any) -> Any:
    both = isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor)
    return spread_like(value, like) if both else value


def _undo_casts(
    optimizer: torch.optim.Optimizer, stored: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    """Restores the dtype of state that torch casts to its parameter's dtype on load."""
    for parameter, state in optimizer.state.items():
        before = stored.get(names.get(id(parameter), ""))
        if not isinstance(before, Mapping) or not isinstance(state, dict):
            continue
        for key, value in state.items():
            kept = before.get(key)
            if not isinstance(value, torch.Tensor) or not isinstance(kept, torch.Tensor):
                continue
            if value.dtype != kept.dtype:
                state[key] = kept.to(value.device)


@dataclass(frozen=True)
class ModelForm:
    """How a model was made, to see what training has changed and a resumed run has to change too.

    Attributes:
        tensors: dtype and shape of each entry of its state; an empty buffer's is "none".
        parameters: which of them are parameters.
        trains: whether each parameter requires a gradient.
        modes: whether each module is in training mode.
    """

    tensors: dict[str, str]
    parameters: frozenset[str]
    trains: dict[str, bool]
    modes: dict[str, bool]

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelForm:
        """The form that a model has now."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            {**dict.fromkeys(_empty_buffers(model), _NONE), **forms_of(model.state_dict())},
            frozenset(parameters),
            {name: parameter.requires_grad for name, parameter in parameters.items()},
            {name: module.training for name, module in model.named_modules()},
        )

    def changes(self, now: ModelForm) -> dict[str, Any]:
        """What training has changed: forms as they were made, switches as they are now."""
        return {
            "tensors": {
                name: self.tensors.get(name)
                for name in {**self.tensors, **now.tensors}
                if self.tensors.get(name) != now.tensors.get(name)
            },
            "trains": _changed(self.trains, now.trains),
            "modes": _changed(self.modes, now.modes),
        }

    def check(self, stored: Mapping[str, Any], changes: Mapping[str, Any], what: str) -> None:
        """Compares this form with that of the model whose state was stored.

        Args:
            stored: its state dictionary.
            changes: as `changes` gave them with it.
            what: the model's name, for the message.

        Raises:
            MismatchError: lists every difference.
        """
        made = {**forms_of(stored), **changes.get("tensors", {})}
        for name in self.parameters & stored.keys():
            made[name] = form_of(stored[name])  # training changes no parameter's form
        known = {name: form for name, form in made.items() if form not in (None, _NONE)}
        here = {name: form for name, form in self.tensors.items() if form != _NONE}
        check_forms(here, known, what)

    def switch(self, model: torch.nn.Module, changes: Mapping[str, Any]) -> None:
        """Sets what requires gradients, and modes, as they were when `changes` were taken.

        Args:
            model: that was made in this form.
            changes: as `changes` gave them.
        """
        trains, modes = changes.get("trains", {}), changes.get("modes", {})
        for name, parameter in model.named_parameters(remove_duplicate=False):
            wanted = trains.get(name, self.trains.get(name, parameter.requires_grad))
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        for name, module in model.named_modules():
            module.training = modes.get(name, self.modes.get(name, module.training))


_NONE = "none"


@dataclass(frozen=True)
class Made:
    """How a process made its models and optimizers, before anything was loaded or trained.

    What training has changed of it since then is part of the state, beside the values.

    Attributes:
        models: the form of each.
        groups: the parameters in each optimizer's groups, by name.
    """

    models: dict[str, ModelForm] = field(default_factory=dict)
    groups: dict[str, list[list[str]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        models: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> Made:
        """As they are now.

        Args:
            models, optimizers: by name.
        """
        names = parameter_names(models)
        return cls(
            {name: ModelForm.of(model) for name, model in models.items()},
            {name: grouping(optimizer, names) for name, optimizer in optimizers.items()},
        )

    def changes(
        self,
        models: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> dict[str, Any]:
        """What differs now.

        Args:
            models, optimizers: by name.
        """
        now = Made.of(models, optimizers)
        return {
            "models": {
                name: form.changes(now.models[name])
                for name, form in self.models.items()
                if name in now.models
            },
            "groups": {
                name: made
                for name, made in self.groups.items()
                if now.groups.get(name, made) != made
            },
            "later": sorted(now.models.keys() - self.models.keys()),
        }


def _changed(before: dict[str, bool], now: dict[str, bool]) -> dict[str, bool]:
    return {name: value for name, value in now.items() if before.get(name, value) != value}


def _empty_buffers(model: torch.nn.Module) -> list[str]:
    """The names of persistent buffers that are None."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is None and name not in module._non_persistent_buffers_set
    ]


def load_model_state(model: torch.nn.Module, stored: Mapping[str, Any], what: str) -> None:
    """Loads weights and buffers after checking every name, shape and dtype.

    Tensors that the model's own `state_dict` omits (frozen parts from elsewhere) are not changed.
    Buffers may have grown while training, or may only then have come to be.

    Args:
        model: the model to load into.
        stored: its state dictionary.
        what: the model's name, for the message.

    Raises:
        MismatchError: lists every difference.
    """
    here = ModelForm.of(model)
    buffers = here.tensors.keys() & stored.keys() - here.parameters
    grown = {name: here.tensors[name] for name in buffers if not is_extra_state(name)}
    here.check(stored, {"tensors": grown}, what)
    load_tensors(model, stored)


@torch.no_grad()
def load_tensors(model: torch.nn.Module, stored: Mapping[str, Any]) -> None:
    """Loads a state dictionary into a model, whole or sharded.

    Args:
        model: the model to load into; what `stored` lacks is not changed.
        stored: values by name; parameters are of the model's own shapes.
    """
    left = {name: value for name, value in stored.items() if not _put_buffer(model, name, value)}
    here = model.state_dict()
    spread = {
        name: _spread(value, here.get(name))
        for name, value in left.items()
        if not getattr(here.get(name), "is_meta", False)  # those of other ranks
    }
    # One of the user's own may take nothing but the state.
    strict = "strict" in inspect.signature(model.load_state_dict).parameters
    model.load_state_dict(spread, **({"strict": False} if strict else {}))


def empty_buffers(model: torch.nn.Module, form: ModelForm, stored: Mapping[str, Any]) -> None:
    """Takes away the buffers that a stored state no longer had.

    Args:
        model: the model.
        form: as it was made.
        stored: the state.
    """
    for name in form.tensors:
        owner = None if name in stored else _buffer_owner(model, name)
        if owner is not None:
            owner._buffers[name.rpartition(".")[2]] = None


def _buffer_owner(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The module that has, or may get, a buffer of this name; None if it is something else."""
    prefix, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(prefix)
    except AttributeError:
        return None
    if leaf in owner._buffers:
        return owner
    return None if hasattr(owner, leaf) or is_extra_state(name) else owner


def _put_buffer(model: torch.nn.Module, name: str, value: Any) -> bool:
    """Puts a stored buffer in place where torch's own loading would refuse to."""
    owner = _buffer_owner(model, name) if isinstance(value, torch.Tensor) else None
    if owner is None:
        return False
    leaf = name.rpartition(".")[2]
    here = owner._buffers.get(leaf)
    if here is None or (here.shape, here.dtype) != (value.shape, value.dtype):
        known = here if here is not None else next(model.parameters(), value)
        owner.register_buffer(leaf, value.detach().to(known.device, copy=True))
        return True
    if is_dtensor(here):
        return False
    repeated = [i for i, n in enumerate(here.shape) if n > 1 and here.stride(i) == 0]
    if not repeated:
        return False
    once = here
    for i in repeated:
        once, value = once.narrow(i, 0, 1), value.narrow(i, 0, 1)
    once.copy_(value)
    return True
