"""Parameter groups of an optimizer in a recipe: which parameters get other settings.

```yaml
optimizer:
  _target_: torch.optim.AdamW
  lr: 1e-3
  weight_decay: 0.1
  groups:
    - {params: vectors, weight_decay: 0}          # biases, norms: everything below two dimensions
    - {params: ["encoder.*", "embed*"], lr: 1e-4}  # by name, in the shell's patterns
```

A parameter belongs to the first group that matches it; one that matches none keeps the optimizer's
own settings. A group without parameters is a mistake, found when the model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Parameter

from paceline.errors import RecipeError
from paceline.recipe.components import Component, fit, signature_of
from paceline.recipe.mistakes import Mistakes, Path, dotted, suggestion

VECTORS = "vectors"


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    Attributes:
        path: the group's place in the recipe.
        patterns: of the parameters' names, or `("vectors",)`.
        settings: the optimizer's arguments that differ for them.
    """

    path: Path
    patterns: tuple[str, ...]
    settings: Mapping[str, Any]

    def takes(self, name: str, parameter: Parameter) -> bool:
        """Whether a parameter belongs to this group.

        Args:
            name: the parameter's name in its model.
            parameter: of any shape; "vectors" matches those below two dimensions.
        """
        if self.patterns == (VECTORS,):
            return parameter.dim() < 2
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


def check_groups(
    node: Any, path: Path, optimizer: Component | None, mistakes: Mistakes
) -> list[Group]:
    """Checks a recipe's `groups:`.

    Args:
        node: the recipe's list.
        path: its place in the recipe.
        optimizer: the optimizer, whose arguments the settings are; None if it is unknown.
        mistakes: collects the mistakes.

    Returns:
        The groups without mistakes.
    """
    if not isinstance(node, list):
        mistakes.add(path, f"expected a list of groups, got {node!r}")
        return []
    groups = []
    for i, one in enumerate(node):
        where = (*path, str(i))
        patterns: Any = one.get("params") if isinstance(one, Mapping) else None
        patterns = [patterns] if isinstance(patterns, str) else patterns
        right = isinstance(patterns, list) and patterns and all(type(p) is str for p in patterns)
        if not right or len(one) < 2:
            wanted = f"{{params: {VECTORS} or patterns of names, and what differs}}"
            mistakes.add(where, f"expected {wanted}, got {one!r}")
            continue
        differing = {key: value for key, value in one.items() if key != "params"}
        if optimizer is not None:
            _check_settings(differing, where, optimizer, mistakes)
        groups.append(Group(where, tuple(patterns), differing))
    return groups


def _check_settings(
    differing: dict[str, Any], path: Path, optimizer: Component, mistakes: Mistakes
) -> None:
    """Checks a group's settings, and turns each into what its annotation says."""
    signature = signature_of(optimizer.target)
    known = [name for name in signature.named if name != "params"]
    for name, value in [*differing.items()]:
        if name not in known:
            text = f"{signature.name} has no such setting{suggestion(name, known)}"
            mistakes.add((*path, name), text)
        elif name in signature.hints:
            try:
                differing[name] = fit(value, signature.hints[name])
            except ValueError as error:
                mistakes.add((*path, name), str(error))


def grouped(
    named: Iterable[tuple[str, Parameter]], groups: list[Group]
) -> list[Parameter] | list[dict[str, Any]]:
    """The `params` of an optimizer.

    Args:
        named: the model's parameters by name.
        groups: the groups; empty for one group with the optimizer's own settings.

    Raises:
        RecipeError: a group has no parameter.
    """
    named = list(named)
    if not groups:
        return [parameter for _, parameter in named]
    rest: list[Parameter] = []
    taken: list[list[Parameter]] = [[] for _ in groups]
    for name, parameter in named:
        index = next((i for i, g in enumerate(groups) if g.takes(name, parameter)), None)
        (rest if index is None else taken[index]).append(parameter)
    for group, parameters in zip(groups, taken, strict=True):
        if not parameters:
            names = ", ".join(name for name, _ in named[:8])
            raise RecipeError(
                f"{dotted(group.path)}: no parameter is left for {', '.join(group.patterns)}. "
                f"There is: {names}{', ...' if len(named) > 8 else ''}"
            )
    found = [{"params": rest}] if rest else []
    return found + [
        {"params": parameters, **group.settings}
        for group, parameters in zip(groups, taken, strict=True)
    ]
