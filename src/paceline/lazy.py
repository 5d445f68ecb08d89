"""Public names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(
    package: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562), so that importing it imports little else.

        if TYPE_CHECKING:
            from paceline.trainer.trainer import Trainer
        else:
            __getattr__, __dir__ = lazily(__name__, {"Trainer": "paceline.trainer.trainer"})

    Type checkers and editors see the import alone, and so notice a name that is not there.

    Args:
        package: its dotted name.
        where: the dotted name of the module that has each public name.
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)  # so that this is called once for each
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return get, names
