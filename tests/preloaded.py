"""What ranks and commands of the tests import as they go, which each would otherwise do anew."""

from __future__ import annotations

import importlib
import pkgutil

from hydra.core.plugins import Plugins

import paceline

for _module in pkgutil.walk_packages(paceline.__path__, "paceline."):
    if _module.name != "paceline.__main__":
        importlib.import_module(_module.name)
# Of the recipes on digits, and of whoever compiles.
for _name in ("sklearn.datasets", "sklearn.model_selection", "functorch.compile", "networkx"):
    importlib.import_module(_name)
Plugins.instance()  # imports Hydra's
