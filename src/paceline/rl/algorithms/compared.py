"""What all algorithms share that hold the policy to a reference."""

from __future__ import annotations

from typing import Any

from paceline.errors import ConfigError
from paceline.rl.algorithm import Algorithm


class Compared(Algorithm):
    """An algorithm that may compare the policy with a reference.

    Args:
        system: whose policy is trained.
        reference: what the policy is compared with: "baseline", the system's, which is a frozen
            copy of the policy or another model. "lora base", the policy without its adapter, needs
            training with adapters, which does not exist yet.
        **settings: `passes` and `minibatch`, as of `Algorithm`.

    Raises:
        ConfigError: there is no such reference.
    """

    def __init__(self, system: Any, *, reference: str = "baseline", **settings: Any) -> None:
        super().__init__(system, **settings)
        if reference == "lora base":
            raise ConfigError(
                "algorithm.reference='lora base': a reference without its adapter needs training "
                "with adapters (LoRA), which does not exist yet; take 'baseline'."
            )
        if reference != "baseline":
            raise ConfigError(f"algorithm.reference={reference!r}: there is 'baseline' only.")
        self.reference = reference
