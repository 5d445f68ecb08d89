"""Value heads on language models: what PPO on text learns values with."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_runs import Letters, trainer_of

from endings import ending, saved_steps
from language_models import model_of
from paceline.errors import ConfigError
from paceline.rl import PPO, HFASTValueSystem, PolicyValueSystem
from paceline.rl.algorithm import Turn
from paceline.rl.algorithms.ppo import check_trained
from paceline.testing import Ranks, rows


def system_of() -> PolicyValueSystem:
    return PolicyValueSystem(model_of("Llama").eval(), Letters())


def ppo_of(folder: Path | None, kill_at: int | None = None, **changes: Any) -> Any:
    trainer = trainer_of(
        folder, partial(PPO, passes=2, minibatch=5, beta=0.05), system=system_of(), **changes
    )

    def on_step_end(metrics: Any) -> None:
        if kill_at is not None and trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.on_step_end = on_step_end
    return trainer


def train(folder: Path, kill_at: int | None = None) -> None:
    ppo_of(folder, kill_at).train(seed=7)


def weights_after(accumulation: int = 1) -> torch.Tensor:
    trainer = ppo_of(None, gradient_accumulation_steps=accumulation)
    trainer.optimizer = torch.optim.SGD(trainer.algorithm.system.parameters(), lr=0.1)
    trainer.train(seed=7)
    model = getattr(trainer.system.auditor, "module", trainer.system.auditor)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_values_are_those_before_each_token_whatever_else_is_in_the_batch() -> None:
    """A linear layer on the last hidden states, read in the same call as the logits."""
    system = system_of()
    head = system.auditor.value_head.score
    torch.nn.init.normal_(head.weight)
    turns = [
        Turn("a cat", "ran", np.array([1, 5, 9]), np.array([7, 8, 2])),
        Turn("x", "no", np.array([1]), np.array([4, 2])),
    ]
    scored, values = system.auditor_logps_and_values(turns)
    torch.testing.assert_close(scored.logps, system.auditor_logps(turns).logps)
    for i, turn in enumerate(turns):
        ids = torch.tensor([[*turn.context_ids, *turn.probe_ids]])
        hidden = system.auditor.model(ids).last_hidden_state[0]
        before = len(turn.context_ids) - 1
        wanted = (hidden @ head.weight[0] + head.bias)[before : before + len(turn.probe_ids)]
        torch.testing.assert_close(values[i, : len(wanted)], wanted, atol=1e-5, rtol=1e-5)
        assert not values[i, len(wanted) :].any()
    texts = system.value(["a cat", "x"], ["ran", "no"])
    assert texts.shape == (2, 3)
    assert values.requires_grad
    assert not any(m._forward_pre_hooks for m in system.auditor.modules()), "no hook is left"


def test_ppo_on_text_learns_values_and_resumes_bitwise(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train, 1, tmp_path / "whole")
    killed = ranks.outcomes(train, 1, tmp_path / "killed", 3)
    assert killed[0].code == -signal.SIGKILL
    assert 0 < saved_steps(tmp_path / "killed" / "run")[-1] < 6, "within the first experience"
    ranks(train, 1, tmp_path / "killed")
    assert ending(tmp_path / "killed" / "run") == ending(tmp_path / "whole" / "run")
    found = [row for row in rows(tmp_path / "whole" / "run") if "train/value_loss" in row]
    assert found[-1]["train/value_loss"] < 0.75 * found[0]["train/value_loss"]


def test_micro_batches_and_ranks_change_nothing_of_values(ranks: Ranks) -> None:
    (alone,) = ranks(weights_after, 1)
    (parts,) = ranks(weights_after, 1, 3)
    torch.testing.assert_close(parts, alone, rtol=0, atol=1e-6)
    for weights in ranks(weights_after, 2):
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)


def test_a_head_that_nothing_trains_is_refused_before_training() -> None:
    trainer = ppo_of(None)
    body = [p for n, p in trainer.sampler.system.auditor.named_parameters() if "value" not in n]
    trainer.optimizer = torch.optim.SGD(body, lr=0.1)
    with pytest.raises(ConfigError, match=r"in no optimizer: model\.value_head\.score"):
        trainer.train(seed=7)

    class Forgets(PolicyValueSystem):
        def parameters(self) -> Any:
            return (p for n, p in self.auditor.named_parameters() if "value" not in n)

    system = Forgets(model_of("Llama"), Letters())
    with pytest.raises(ConfigError, match="lacks 2 of the parameters that value"):
        check_trained(system, system.value(["a"], ["cat"]))
    with pytest.raises(ConfigError, match="no ValueFunctionSystem"):
        trainer_of(algorithm=PPO).train(seed=7)

    class Bare(torch.nn.Module):
        weight = torch.nn.Parameter(torch.ones(2))

    with pytest.raises(ConfigError, match="Bare has none"):
        PolicyValueSystem(Bare(), Letters())


def test_an_auditor_in_dialogues_may_have_a_head() -> None:
    system = HFASTValueSystem("tiny", "tiny", rewards={"likelihood": 1.0}, max_new_tokens=4)
    assert {n for n, _ in system.auditor.named_modules() if n == "value_head"}
    turn = Turn("look at", " the tree", None, None)
    scored, values = system.auditor_logps_and_values([turn])
    assert values.shape == scored.logps.shape == (1, 2)
    assert any(p is system.auditor.value_head.score.bias for p in system.parameters())
