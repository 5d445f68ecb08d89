"""The sampler `prompts`: rows, reward functions, and what is left out and counted."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_runs import PROMPTS, Letters, sampler_of, trainer_of, vowels

from language_models import bpe_tokenizer, model_of, write_tiny
from paceline.errors import ConfigError, DataError
from paceline.recipe import build_trainer, load_recipe
from paceline.rl.algorithms.grpo import GRPO
from paceline.rl.graph_collector import DRAWN_ANEW
from paceline.rl.recorded import read_rollouts
from paceline.rl.text.policy_system import PolicySystem
from paceline.rl.text.prompt_sampler import PromptSampler
from paceline.testing import Ranks, rows

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def system() -> PolicySystem:
    return PolicySystem(model_of("Llama").eval(), Letters())


def test_a_group_keeps_tokens_columns_and_what_each_reward_gave(system: PolicySystem) -> None:
    seen: list[dict[str, Any]] = []

    def longer(**given: Any) -> list[float | None]:
        seen.append(given)
        return [None if i == 0 else float(i) for i in range(len(given["prompts"]))]

    source = [{"prompt": "a cat", "answer": 4, "hint": "b"}]
    sampler = PromptSampler(
        system, source, {"low": (2.0, vowels), "longer": (0.5, longer)}, group_size=3,
        max_new_tokens=5,
    )  # fmt: skip
    graph = sampler.rollout(seed=3)
    (given,) = seen
    assert given["prompts"] == ["a cat"] * 3
    assert (given["answer"], given["hint"]) == ([4] * 3, ["b"] * 3)
    assert given["completion_ids"] == [node.probe_ids.tolist() for node in graph.children]
    assert given["completions"] == [node.probe for node in graph.children]
    for i, node in enumerate(graph.children):
        assert node.context_ids.tolist() == system.tokenizer("a cat")["input_ids"]
        assert len(node.logprobs) == len(node.probe_ids) > 0
        assert node.rewards.keys() == ({"low"} if i == 0 else {"low", "longer"})
        assert node.reward == pytest.approx(2 * node.rewards["low"] + 0.5 * i)
    again = sampler.rollout(seed=3)
    assert [n.probe for n in again.children] == [n.probe for n in graph.children]
    assert len({n.probe for n in graph.children}) == 3, "each has random numbers of its own"


def test_a_run_goes_through_all_prompts_before_any_comes_again(system: PolicySystem) -> None:
    sampler = sampler_of(system, group_size=2, max_new_tokens=1)
    seen = []
    for experience in range(4):
        sampler.numbers = range(3 * experience, 3 * experience + 3)
        seen += [graph.context for graph in sampler.rollouts([experience, 50, 90])]
    assert Counter(seen[:6]) == Counter(seen[6:]) == Counter(PROMPTS)
    assert seen[:6] != seen[6:], "in another order each time"


def test_an_evaluation_plays_the_prompts_that_it_is_given() -> None:
    sampler = sampler_of(PolicySystem(model_of("Llama").eval(), Letters()))
    held_out = ["never seen", "nor this"]
    assert not set(held_out) & set(PROMPTS)
    assert [graph.context for graph in sampler.eval_rollouts(held_out)] == held_out


def test_dialogues_go_through_the_chat_template(tmp_path: Path) -> None:
    write_tiny(tmp_path, bpe_tokenizer())
    seen: list[Any] = []

    def judge(prompts: Any, completions: Any, topic: Any, **_: Any) -> list[float]:
        seen.extend([prompts[0], completions[0], topic[0]])
        return [1.0] * len(prompts)

    dialogue = [{"role": "user", "content": "Why?"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": dialogue, "topic": "x"}))
    system = PolicySystem(tmp_path / "model")
    sampler = PromptSampler(
        system, {"file": "prompts.jsonl"}, [judge], group_size=2, max_new_tokens=3
    )
    sampler.locate(tmp_path)
    graph = sampler.rollout(seed=1)
    expected = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert graph.context == expected
    ids = system.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert graph.children[0].context_ids.tolist() == ids, "the template alone says what begins it"
    assert seen[0] == dialogue
    assert (seen[1][0]["role"], seen[2]) == ("assistant", "x")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (lambda completions, **_: [float("nan"), 1.0, 1.0, 2.0], "gave nan"),
        (lambda completions, **_: [1.0, "good", 1.0, 2.0], "gave 'good'"),
        (lambda completions, **_: [1.0, 2.0], "gave 2 values for 4 completions"),
        (lambda completions, **_: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions, **_: None, "raised TypeError"),
    ],
    ids=["nan", "text", "too few", "raises", "none"],
)
def test_a_reward_that_fails_is_never_a_zero(
    system: PolicySystem, reward: Any, reason: str
) -> None:
    sampler = PromptSampler(
        system, ["a cat"], {"mine": (1.0, reward), "low": (1.0, vowels)}, group_size=4,
        episodes=1, max_new_tokens=2,
    )  # fmt: skip
    graph = sampler.rollout(seed=1)
    (said,) = graph.skipped
    assert said.startswith("failed: mine")
    assert reason in said
    assert len(graph.children) + graph.skipped[said] == 4
    with pytest.raises(DataError, match=r"max_failures=0: mine"):
        sampler.check_skipped(graph.skipped)
    sampler.max_failures = 4
    sampler.check_skipped(graph.skipped)


def test_what_no_reward_applies_to_or_does_not_fit_is_counted(tmp_path: Path) -> None:
    """And a run in which rewards fail more often than they may ends with the reason."""

    def some(prompts: list[str], **_: Any) -> list[float | None]:
        return [None] + [float(i) for i in range(1, len(prompts))]

    def made(reward: Any, failures: int, system: Any) -> PromptSampler:
        source = ["a cat", "x" * 4096]
        return PromptSampler(
            system, source, [reward], group_size=3, episodes=2, max_new_tokens=2,
            max_failures=failures,
        )  # fmt: skip

    trainer_of(tmp_path, GRPO, partial(made, some, 0), epochs=1).train(seed=7)
    (row,) = [row for row in rows(tmp_path / "run") if "rollout/reward" in row]
    assert row["rollout/skipped/no reward applies"] == 1
    assert row["rollout/skipped/prompt longer than the context"] == 3
    assert row["rollout/steps"] == 2
    broken = partial(made, lambda **_: [1.0, 2.0, float("inf")], 1)
    trainer_of(None, GRPO, broken, epochs=1).train(seed=7)
    with pytest.raises(DataError, match=r"3 completions of an experience got no reward.*boom"):
        trainer_of(None, GRPO, partial(made, boom, 1), epochs=1).train(seed=7)


def boom(**_: Any) -> Any:
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": []}, "no prompt in it"),
        ({"source": "a cat"}, "expected rows"),
        ({"source": [{"question": "a"}]}, "row 0 has no prompt, messages or text"),
        ({"source": {"path": "x"}}, "expected rows"),
        ({"group_size": 0}, "group_size=0"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(
    system: PolicySystem, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        sampler_of(system, **changes).locate(Path())
    with pytest.raises(ConfigError, match="is no function of the recipe's `code:`"):
        PromptSampler(system, PROMPTS, {"os.system": 1.0})


@pytest.mark.parametrize("kind", ["none", "truncate", "mask"])
def test_importance_weights_correct_advantages(system: PolicySystem, kind: str) -> None:
    """As if the sampler had found each token a little less or more likely than the trainer."""
    weighting = None if kind == "none" else {"kind": kind, "cap": 1.2}
    algorithm = GRPO(system, importance_weights=weighting)
    samples = algorithm.flatten(sampler_of(system, source=["a cat"]).rollout(seed=1))
    for sample in samples:
        assert np.abs(sample.sampled - sample.old).max() < 1e-5, "they are one model"
        off = np.linspace(-0.3, 0.3, len(sample.old), dtype=np.float32)
        sample.sampled = sample.old - off
    plain = GRPO(system).prepare(samples)
    for sample, corrected, without in zip(samples, algorithm.prepare(samples), plain, strict=True):
        weights = np.exp(sample.old - sample.sampled)
        if kind == "none":
            weights = np.ones_like(weights)
        elif kind == "truncate":
            weights = np.minimum(weights, 1.2)
        else:
            weights = np.where(weights > 1.2, 0.0, weights)
        np.testing.assert_allclose(
            corrected.advantages, without.advantages * weights, rtol=1e-5, atol=1e-7
        )


def test_groups_of_equal_rewards_are_kept_or_dropped(system: PolicySystem) -> None:
    def alike(prompts: list[str], **_: Any) -> list[float]:
        return [0.3] * len(prompts)

    sampler = PromptSampler(system, ["a"], [alike], group_size=3, max_new_tokens=2)
    kept = GRPO(system)
    samples = kept.prepare(kept.flatten(sampler.rollout(seed=1)))
    assert [sample.advantages.tolist() for sample in samples] == [
        [0.0] * len(sample.old) for sample in samples
    ]
    graph = sampler.rollout(seed=1)
    assert GRPO(system, equal_groups="drop").flatten(graph) == []
    assert graph.skipped == {"a group of equal rewards": 1}
    graph = sampler.rollout(seed=1)
    graph.children[0].reward, graph.children[1].probe_ids = float("nan"), np.array([], np.int32)
    assert kept.flatten(graph) == []
    assert graph.skipped == {"reward not finite": 1, "empty probe": 1, "a group of one": 1}


def test_the_shipped_recipe_learns(tmp_path: Path) -> None:
    changes = ["trainer.epochs=14", f"run.dir={tmp_path}/run", "checkpoint=null"]
    trainer: Any = build_trainer(load_recipe(RECIPES / "grpo.yaml", changes))
    trainer.train(seed=0)
    experiences = [row for row in rows(tmp_path / "run") if "rollout/reward" in row]
    found = [row["rollout/reward/says_it"] for row in experiences]
    assert len(found) == 14
    assert np.mean(found[-3:]) > 3 * np.mean(found[:3]), found
    assert torch.isfinite(next(trainer.system.parameters())).all()


def evens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Two values only, so that many groups of two are of equal rewards."""
    return [float(ids[0] % 8 == 0) for ids in completion_ids]


def drawn_of(system: PolicySystem) -> PromptSampler:
    return PromptSampler(system, PROMPTS, [evens], group_size=2, episodes=6, max_new_tokens=3)


def redrawn(folder: Path, equal_groups: Any) -> None:
    settings = {"equal_groups": equal_groups, "minibatch": None}
    trainer_of(
        folder, lambda system: GRPO(system, **settings), drawn_of, epochs=2, checkpoint=None
    ).train(seed=7)


def test_groups_of_equal_rewards_are_drawn_anew_a_bounded_number_of_times(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The same prompts, other completions, each try counted; the same on two ranks."""
    found = {}
    for name, setting in {"drop": "drop", "few": {"redraw": 1}, "many": {"redraw": 40}}.items():
        ranks(redrawn, 1, tmp_path / name, setting)
        found[name] = list(read_rollouts(tmp_path / name / "run"))[:6]
    anew, dropped = DRAWN_ANEW, "a group of equal rewards"
    kept = {n: [one for one in f if dropped not in one["skipped"]] for n, f in found.items()}
    assert len(kept["drop"]) < len(kept["few"]) < len(kept["many"]) == 6
    for before, few, many in zip(found["drop"], found["few"], found["many"], strict=True):
        assert before["context"] == few["context"] == many["context"]
        if dropped in before["skipped"]:
            assert few["skipped"][anew] == 1 <= many["skipped"][anew] <= 40
            assert before["seed"] != few["seed"]
        else:
            assert before == few == many, "what there is to learn from is played once"
    first = next(row for row in rows(tmp_path / "many" / "run") if "rollout/turns" in row)
    counted = sum(one["skipped"].get(anew, 0) for one in found["many"])
    assert first[f"rollout/skipped/{anew}"] == counted
    ranks(redrawn, 2, tmp_path / "two", {"redraw": 40})
    assert list(read_rollouts(tmp_path / "two" / "run"))[:6] == found["many"]
    for wrong in ({"redraw": 0}, {"redrew": 3}, {"redraw": True}):
        with pytest.raises(ConfigError, match=r"equal_groups=.*\{redraw: TIMES\} with at least 1"):
            GRPO(None, equal_groups=wrong)
