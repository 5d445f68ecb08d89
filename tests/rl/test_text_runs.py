"""Runs of GRPO on text: the same at any layout, resumed bitwise, as a loop in plain torch."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_runs import Letters, sampler_of, train, trainer_of, weights_after

from endings import ending, saved_steps
from language_models import model_of
from paceline.errors import ConfigError, ResumeError
from paceline.recipe.components import signature_of
from paceline.rl import DPO, IPO, PPO, REINFORCE, RLOO
from paceline.rl.algorithms.grpo import GRPO
from paceline.rl.text.policy_system import PolicySystem
from paceline.testing import Ranks, rows
from paceline.trainer.arguments import arguments_of


def test_a_run_killed_between_minibatches_of_an_experience_goes_on_bitwise(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The checkpoint holds its tokens, log-probabilities and advantages; the reference is as at
    the start, though the weights are not."""
    ranks(train, 1, tmp_path / "whole")
    killed = ranks.outcomes(train, 1, tmp_path / "killed", 3)
    assert killed[0].code == -signal.SIGKILL
    assert 0 < saved_steps(tmp_path / "killed" / "run")[-1] < 6, "within the first experience"
    ranks(train, 1, tmp_path / "killed")
    assert ending(tmp_path / "killed" / "run") == ending(tmp_path / "whole" / "run")


def test_micro_batches_and_ranks_change_nothing(ranks: Ranks) -> None:
    """Minibatches of 5 ragged completions in 3 parts, or on two ranks."""
    (alone,) = ranks(weights_after, 1)
    (parts,) = ranks(weights_after, 1, 3)
    of_two = ranks(weights_after, 2)
    torch.testing.assert_close(parts, alone, rtol=0, atol=1e-6)
    for weights in of_two:
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)


def test_grpo_equals_a_loop_in_plain_torch_on_the_same_tokens() -> None:
    """Three steps of SGD on one experience: ratios leave 1, clipping acts, the reference holds."""
    kept: list[Any] = []

    class Kept(GRPO):
        def prepare(self, steps: Any) -> Any:
            kept.append(steps)
            return super().prepare(steps)

    algorithm = partial(
        Kept, beta=0.1, passes=3, aggregation="dapo", scale="group", clip_low=0.02, clip_high=0.03
    )
    trainer = trainer_of(algorithm=algorithm, epochs=1)
    trainer.optimizer = torch.optim.SGD(trainer.algorithm.system.auditor.parameters(), lr=0.5)
    trainer.train(seed=7)
    (samples,) = kept

    model, reference = model_of("Llama").eval(), model_of("Llama").eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def logps(of: Any, sample: Any) -> torch.Tensor:
        """One completion at a time, so without any padding."""
        ids = torch.tensor([*sample.turn.context_ids, *sample.turn.probe_ids])[None]
        count = len(sample.turn.probe_ids)
        found = of(ids).logits[0, :-1].log_softmax(-1)[-count:]
        return found.gather(1, ids[0, -count:, None])[:, 0]

    rewards = np.array([sample.reward for sample in samples]).reshape(3, 4)
    gaps = rewards - rewards.mean(1, keepdims=True)
    advantages = (gaps / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)).flatten()
    with torch.no_grad():
        old = [logps(model, sample) for sample in samples]
        ref = [logps(reference, sample) for sample in samples]
    clipped = 0
    for _ in range(3):
        losses = []
        for sample, a, o, r in zip(samples, advantages, old, ref, strict=True):
            now = logps(model, sample)
            ratio = (now - o).exp()
            held = ratio.clamp(0.98, 1.03)
            clipped += int((held != ratio).sum())
            k3 = (r - now).exp() - (r - now) - 1
            losses.append(-torch.minimum(ratio * float(a), held * float(a)) + 0.1 * k3)
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    assert clipped > 10, "the first pass is at a ratio of 1, the others are not"
    for mine, plain in zip(trainer.system.auditor.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-6)


def test_the_ratio_leaves_one_on_the_second_pass(tmp_path: Path) -> None:
    algorithm = partial(GRPO, passes=2, clip_low=1e-3, clip_high=1e-3)
    trainer_of(tmp_path, algorithm, epochs=1).train(seed=7)
    for row in rows(tmp_path / "run"):
        if "rollout/reward" in row:
            assert 0 < row["rollout/logprob_difference/max"] < 1e-5, "sampled by the same weights"
    first, second = [row for row in rows(tmp_path / "run") if "train/ratio" in row]
    assert first["train/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["train/clip_low"] == first["train/clip_high"] == 0
    assert abs(second["train/ratio"] - 1) > 1e-3
    assert second["train/clip_low"] + second["train/clip_high"] > 0.2


def test_another_reference_or_other_prompts_are_refused_at_a_resume(tmp_path: Path) -> None:
    trainer_of(tmp_path, epochs=1).train(seed=7)

    def moved(system: PolicySystem) -> GRPO:
        with torch.no_grad():
            next(system.auditor.parameters()).add_(0.1)  # the reference is a copy of it
        return GRPO(system, beta=0.05, passes=2, minibatch=5)

    with pytest.raises(ResumeError, match=r"system\.baseline"):
        trainer_of(tmp_path, algorithm=moved).train(seed=7)
    with pytest.raises(ResumeError, match=r"sampler\.prompts"):
        trainer_of(tmp_path, sampler=partial(sampler_of, source=["a cat", "b"])).train(seed=7)
    assert trainer_of(tmp_path).train(seed=7).stopped_by == "epochs"


def test_what_cannot_be_trained_on_is_refused_before_training() -> None:
    system = PolicySystem(model_of("Llama"), Letters())
    with pytest.raises(ConfigError, match=r"LoRA"):
        GRPO(system, reference="lora base")
    with pytest.raises(ConfigError, match="cispo"):
        GRPO(system, ratio="cispo")
    with pytest.raises(ConfigError, match="max_length"):
        GRPO(system, aggregation="dr_grpo")
    with pytest.raises(ConfigError, match="cap=None"):
        GRPO(system, importance_weights={"kind": "truncate"})
    with pytest.raises(ConfigError, match=r"group_size=1.*GRPO compares"):
        trainer_of(sampler=partial(sampler_of, group_size=1)).train(seed=7)
    with pytest.raises(ConfigError, match=r"minibatch=13: an experience has 12"):
        trainer_of(algorithm=partial(GRPO, minibatch=13)).train(seed=7)


@pytest.mark.parametrize("algorithm", [DPO, IPO, PPO, REINFORCE, RLOO, GRPO])
def test_shared_settings_are_those_of_every_algorithm(algorithm: Any) -> None:
    """In one place each: recipes know them by name, and a run's identity holds them."""
    own = {"minibatch", "reference"} | ({"passes"} if algorithm is not REINFORCE else set())
    assert own <= {*signature_of(algorithm).named}
    with pytest.raises(ConfigError, match="LoRA"):
        algorithm(None, reference="lora base")
    with pytest.raises(ConfigError, match="there is 'baseline' only"):
        algorithm(None, reference="basline")
    held = arguments_of("algorithm", algorithm(None, minibatch=7))
    assert (held["algorithm.minibatch"], held["algorithm.reference"]) == (7, "baseline")
    assert held.get("algorithm.passes", 1) == (10 if algorithm is PPO else 1)
    for name in {"passes"} - own | ({"label_smoothing"} if algorithm is IPO else set()):
        assert name not in signature_of(algorithm).named
        with pytest.raises(TypeError, match=name):
            algorithm(None, **{name: 0.1})
