"""The public surface is a golden file: changing a name, a signature or an event is deliberate.

`python tests/test_public_surface.py` writes the file anew.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import paceline
from paceline.lazy import lazily
from paceline.recipe.typed import Config

GOLDEN = Path(__file__).with_name("public_surface.json")
MODULES = (
    *("paceline", "paceline.callbacks", "paceline.errors", "paceline.factories", "paceline.lm"),
    *("paceline.lm.data", "paceline.losses", "paceline.testing", "paceline.tune"),
)


def surface() -> dict[str, Any]:
    """Every public name with its signature, and the events in order."""
    from paceline.trainer.events import EVENTS

    found: dict[str, Any] = {"events": list(EVENTS)}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        public = getattr(module, "__all__", [n for n in dir(module) if n[0].isupper()])
        for name in sorted(public):
            thing = getattr(module, name)
            if getattr(thing, "__module__", "").startswith("paceline"):
                found[f"{module_name}.{name}"] = describe(thing)
    # The repr of a function in an annotation ends with where it lies in memory.
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(found)))


def describe(thing: Any) -> Any:
    from paceline.trainer.elsewhere import is_answer

    if not inspect.isclass(thing):
        return str(inspect.signature(thing))
    if issubclass(thing, Config):
        fields = thing.model_fields.items()
        return {n: f"{inspect.formatannotation(f.annotation)} = {f.default}" for n, f in fields}
    if issubclass(thing, BaseException):
        return [base.__name__ for base in thing.__mro__[1:-1]]
    members = {
        name: signature(value)
        for name, value in inspect.getmembers_static(thing)
        if not name.startswith("_") and not hasattr(object, name) and not is_answer(thing, name)
    }
    return {"": str(inspect.signature(thing)), **members}


def signature(value: Any) -> str:
    function = value.fget if isinstance(value, property) else getattr(value, "func", value)
    if isinstance(value, property):
        return "property"
    return str(inspect.signature(function)) if callable(function) else "attribute"


def test_the_public_surface_is_the_golden_one() -> None:
    assert json.loads(GOLDEN.read_text()) == surface()


def test_every_public_name_is_there() -> None:
    assert set(paceline.__all__) <= set(dir(paceline))
    assert all(getattr(paceline, name) is not None for name in paceline.__all__)


def test_a_public_name_is_imported_when_it_is_first_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = types.ModuleType("a_package")
    monkeypatch.setitem(sys.modules, "a_package", package)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    get, names = lazily("a_package", {"ONE_SIXTH": "colorsys"})
    vars(package).update(__getattr__=get, __dir__=names)
    assert "ONE_SIXTH" in dir(package)
    assert "colorsys" not in sys.modules
    assert pytest.approx(1 / 6) == package.ONE_SIXTH
    assert vars(package)["ONE_SIXTH"] == package.ONE_SIXTH
    with pytest.raises(AttributeError, match="module 'a_package' has no attribute 'ONE_SEVENTH'"):
        _ = package.ONE_SEVENTH


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(surface(), indent=1) + "\n")
