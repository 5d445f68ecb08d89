"""HFASTValueSystem: an HFASTSystem whose auditor has a value head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.rl.redteam.hf_ast_system import HFASTSystem, sampled
from paceline.rl.text.logprobs import Scored
from paceline.rl.text.value_head import add_value_head
from paceline.rl.text.value_system import ValueHeadSystem


class HFASTValueSystem(HFASTSystem, ValueHeadSystem):
    """An `HFASTSystem` with a value function: a linear layer on the auditor's last hidden states.

    The layer is the auditor's module `value_head`, made unless the auditor has one; it is 0 before
    training, and is trained, saved and placed with the auditor. All settings are those of
    `HFASTSystem`.

    Raises:
        ConfigError: as of `HFASTSystem`, or the auditor has no output embeddings.
    """

    name = "hf_ast_value"

    def _load(self, role: str, given: Any) -> tuple[Any, Any]:
        model, tokenizer = super()._load(role, given)
        if role == "auditor":
            add_value_head(model)
        return model, tokenizer

    def scored_with_values(self, turns: Sequence[Any]) -> Scored:
        return self._scored(self.auditor, self.auditor_tokenizer, *sampled(turns), values=True)
