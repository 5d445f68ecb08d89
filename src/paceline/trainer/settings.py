"""Settings of a Trainer that belong together, and which of them a run has read."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from paceline.errors import ConfigError, refuses_unknown

MODES = ("auto", "never", "must", "fresh")
READ_BY_OPENING = (
    "train_dataloader",
    "val_dataloader",
    "gradient_accumulation_steps",
    "global_batch_size",
    "epoch_length",
)
# What counts from the moment on when it is assigned within a run.
READ_ALWAYS = (
    *("max_grad_norm", "check_gradients", "lr_scheduler_interval", "max_steps", "early_stop"),
    *("validate_every", "max_val_batches", "log_every", "metric_monitor"),
)
# What a run reads at its start: assigned within it, it would be ignored.
READ_ONCE = frozenset(
    {
        "optimizer",
        "lr_scheduler",
        *READ_BY_OPENING,
        "count_items",
        "precision",
        "compile",
        "deterministic",
        "on_nonfinite",
        "checkpoint_policy",
        "parallel",
        "callbacks",
        "loggers",
        "show_progress",
        "run_dir",
        "resume",
        "seed",
    }
)


class _SomeEpochs:
    """Tells pydantic, which checks recipes, which texts are a number of epochs."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: Any) -> Any:
        text = {"type": "str", "pattern": _EPOCHS.pattern}
        error = {"custom_error_type": "epochs", "custom_error_message": "a text like '5 epochs'"}
        return {"type": "custom-error", "schema": text, **error}


_EPOCHS = re.compile(r"^(?:epoch|1 epoch|([1-9]\d*) epochs)$")
InEpochs = Annotated[str, _SomeEpochs()]
"""Epochs between two validations: "epoch", "5 epochs"."""


def epochs_between(every: Any) -> int | None:
    """The epochs between two validations; None if `validate_every` says it in no epochs.

    Args:
        every: "epoch", "5 epochs", or anything else.
    """
    if not isinstance(every, str):
        return None
    found = _EPOCHS.match(every)
    return None if found is None else int(found[1] or 1)


def whole_seed(seed: Any) -> int:
    """A run's seed; None is 0.

    Args:
        seed: as it was given to `train` or `fit`.

    Raises:
        ConfigError: it is no whole number, such as a model that other trainers' `fit` takes.
    """
    try:
        return 0 if seed is None else operator.index(seed)
    except TypeError:
        raise ConfigError(
            f"seed={seed!r:.60}: expected a whole number. Models, optimizers and loaders are given "
            "to Trainer(...)."
        ) from None


def read_already(name: str) -> ConfigError:
    """The error for what is changed within a run that would go on with what it has read.

    Args:
        name: of the Trainer's attribute.
    """
    return ConfigError(
        f"{name}: the run that is open read it at its start, and would ignore the change. Set it "
        "before train(), or in configure(); a run that is stopped and started again reads it anew."
    )


class FixedList(list[Any]):
    """A list of the Trainer's that its open run has read."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise read_already("callbacks, loggers")

    append = extend = insert = remove = pop = clear = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse


class FixedDict(dict[str, Any]):
    """Components or loaders by name, which the Trainer's open run has read.

    Args:
        attribute: of the Trainer.
        held: what it holds.
        grows: whether models may be added, and those that are not trained be replaced.
    """

    def __init__(self, attribute: str, held: Mapping[str, Any], *, grows: bool) -> None:
        super().__init__(held)
        self._attribute, self._grows = attribute, grows

    def __setitem__(self, key: str, value: Any) -> None:
        held = self.get(key)
        if not self._grows or (held is not None and any(map(_trains, held.parameters()))):
            raise read_already(f"{self._attribute}[{key!r}]")
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise read_already(self._attribute)

    pop = popitem = clear = __delitem__ = __ior__ = _refuse

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy is the user's


def _trains(parameter: Any) -> bool:
    return parameter.requires_grad


@refuses_unknown(
    every_n_steps="every", val_steps_per_epoch="max_batches", limit_val_batches="max_batches"
)
@dataclass(frozen=True)
class ValidationPolicy:
    """When to validate, and on how much: what `validate_every` takes besides "epoch" and a number.

    Args:
        every: "epoch", "5 epochs", or a number of optimizer steps.
        max_batches: the first batches of each rank from each loader; None for all of them, 0 for
            no validation.

    Raises:
        ConfigError: `max_batches` is no number of batches.
    """

    every: Literal["epoch"] | int | InEpochs = "epoch"
    max_batches: int | None = None

    def __post_init__(self) -> None:
        count = self.max_batches
        if count is not None and (type(count) is not int or count < 0):
            raise ConfigError(
                f"ValidationPolicy(max_batches={count!r}): expected a number of batches, or None "
                "for all."
            )


@dataclass(frozen=True)
class Resume:
    """What a run does that finds an earlier one in its folder.

    Args:
        mode: "auto" resumes from the newest intact checkpoint, or starts if there is none;
            "must" fails if there is none; "never" fails if there is one; "fresh" moves an earlier
            run aside; any other text is the path of a checkpoint.
        accept: identity keys that may differ from the checkpoint's, e.g. ("optimizer.lr",).
        init_from: a checkpoint, a run folder or an exported safetensors file, whose model weights
            a new run starts from.
    """

    mode: str = "auto"
    accept: tuple[str, ...] = ()
    init_from: str | Path | None = None

    @property
    def path(self) -> Path | None:
        """The checkpoint asked for by path."""
        return None if self.mode in MODES else Path(self.mode)
