"""Systems that use the names of earlier ASTRA-RL versions: tester or attacker, for auditor."""

from __future__ import annotations

import warnings
from typing import Any

_METHODS = {
    "get_auditor_logprobs": ("get_tester_logprobs", "get_attacker_logprobs"),
    "rollout_prompt_with_auditor": ("rollout_prompt_with_tester", "rollout_prompt_with_attacker"),
}


def take_old_names(cls: type) -> None:
    """Gives a class methods of the present names for those of the old ones; says so once.

    Args:
        cls: as it is defined.
    """
    taken = []
    for present, olds in _METHODS.items():
        for old in olds:
            if old in vars(cls) and present not in vars(cls):
                setattr(cls, present, vars(cls)[old])
                taken.append(f"{old} is {present}")
    if taken:
        warnings.warn(
            f"{cls.__qualname__}: {', '.join(taken)} now; the old names are taken for now.",
            DeprecationWarning,
            stacklevel=3,
        )


def with_present_names(system: Any) -> Any:
    """A system that derives from no class of Paceline, with the present names.

    Args:
        system: with methods of old names.

    Returns:
        The same object; its class has got the present names.
    """
    for cls in reversed(type(system).__mro__[:-1]):
        take_old_names(cls)
    return system
