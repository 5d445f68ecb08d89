"""What a run is, as data: values by dotted key, and which part of the identity gives each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import ConfigError
from paceline.log.secrets import without_credentials
from paceline.trainer.source_code import OwnCode

FIRST_PARTS = ("settings", "loss", "data", "optimizers", "slots", "said")
"""The parts that every checkpoint knows."""
ARGUMENTS = (" (recipe)", " (object)")
"""How the names of parts end that are the arguments of components."""
READ_OFF = ("model (object)", "switched off", "code", "content of ")
"""How the names of parts begin that are read off objects."""


@dataclass
class Identity:
    """What a resumed run must find unchanged.

    Attributes:
        keys: all of it, by dotted key.
        parts: which keys each part gives; one that gives none is there too.
        code: the files of the user's own code among it.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    code: OwnCode = field(default_factory=lambda: OwnCode({}, {}, []))

    def add(self, part: str, keys: Mapping[str, Any]) -> None:
        """Adds a part's keys; a credential among them is not kept, and may change.

        Args:
            part: its name.
            keys: its values by dotted key.

        Raises:
            ConfigError: another part gives one of them.
        """
        twice = self.keys.keys() & keys.keys()
        if twice:
            raise ConfigError(
                f"the identity key {min(twice)!r} is given twice: rename it in the run_identity() "
                "that gives it."
            )
        self.keys.update(
            {key: without_credentials(v, key.rpartition(".")[2]) for key, v in keys.items()}
        )
        self.parts.setdefault(part, []).extend(keys)

    def leave_out(self, keys: Collection[str]) -> None:
        """Leaves arguments of components out that their objects say themselves.

        Args:
            keys: what they say.
        """
        for part in [name for name in self.parts if name.endswith(ARGUMENTS)]:
            for key in [key for key in self.parts[part] if key in keys]:
                self.parts[part].remove(key)
                del self.keys[key]
