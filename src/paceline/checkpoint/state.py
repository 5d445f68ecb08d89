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
    rank/<r>/sums         open metric sums
    rank/0/sinks          byte offsets of the row files
    identity, horizon     the settings that a resumed run is compared with
    identity_parts        which keys of the identity each of its parts gives

There are no random states: streams are derived from their purpose (`world/seeding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.checkpoint.compatibility import check_fits
from paceline.errors import MismatchError
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
    """
    state = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {order[index]: value for index, value in state["state"].items()},
        "groups": [
            {**group, "params": [order[index] for index in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Any],
    names: Mapping[int, str],
    what: str,
) -> None:
    """Restores what `optimizer_state` returned.

    Args:
        optimizer: the optimizer to load into.
        stored: the state.
        names: `parameter_names` of the models.
        what: the optimizer's name, for the message.

    Raises:
        MismatchError: the groups hold other parameters.
    """
    check_optimizer_state(optimizer, stored, names, what)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    index = {name: i for i, name in enumerate(order)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict(
        {
            "state": {
                index[name]: _spread_state(values, parameters[index[name]])
                for name, values in stored["state"].items()
                if not parameters[index[name]].is_meta  # those of other ranks
            },
            "param_groups": [
                {**group, "params": [index[name] for name in group["params"]]}
                for group in stored["groups"]
            ],
        }
    )
    _undo_casts(optimizer, stored["state"], names)


def check_optimizer_state(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Any],
    names: Mapping[int, str],
    what: str,
) -> None:
    """Compares the groups' parameters with those of a stored state; changes nothing.

    Args:
        optimizer: the optimizer.
        stored: the state.
        names: `parameter_names` of the models.
        what: the optimizer's name, for the message.

    Raises:
        MismatchError: the groups hold other parameters.
    """
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if groups != [group["params"] for group in stored["groups"]]:
        theirs = [name for group in stored["groups"] for name in group["params"]]
        raise MismatchError(
            f"{what} does not fit the checkpoint's: {len(groups)} groups of "
            f"{[len(g) for g in groups]} parameters against {len(stored['groups'])} of "
            f"{[len(g['params']) for g in stored['groups']]}; only here: "
            f"{sorted(set(order) - set(theirs)) or 'none'}; only in the checkpoint: "
            f"{sorted(set(theirs) - set(order)) or 'none'}."
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
        for key, value in state.items():
            kept = stored[names[id(parameter)]][key]
            if isinstance(value, torch.Tensor) and value.dtype != kept.dtype:
                state[key] = kept.to(value.device)


def load_model_state(model: torch.nn.Module, stored: Mapping[str, Any], what: str) -> None:
    """Loads weights and buffers after checking every name, shape and dtype.

    Tensors that the model's own `state_dict` omits (frozen parts from elsewhere) are not changed.

    Args:
        model: the model to load into.
        stored: its state dictionary.
        what: the model's name, for the message.

    Raises:
        MismatchError: lists every difference.
    """
    check_fits(model.state_dict(), dict(stored), what)
    load_tensors(model, stored)


def load_tensors(model: torch.nn.Module, stored: Mapping[str, Any]) -> None:
    """Loads tensors into a model, whole or sharded.

    Args:
        model: the model to load into; tensors that `stored` lacks are not changed.
        stored: tensors by name, of the model's own shapes.
    """
    here = model.state_dict()
    spread = {
        name: _spread(value, here.get(name))
        for name, value in stored.items()
        if not (name in here and here[name].is_meta)  # those of other ranks
    }
    model.load_state_dict(spread, strict=False)
