"""Red-teaming goes on bitwise wherever it is killed; settings of its system; recorded versions."""

from __future__ import annotations

import random
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_ast_runs import EPISODES, EPOCHS, TOKENS, WIDTH, train, trainer_of, weights_after
from text_runs import sampler_of
from text_runs import trainer_of as prompts_trainer_of

from endings import ending
from paceline.errors import ConfigError, DataError
from paceline.rl import (
    REINFORCE,
    ASTSampler,
    HFASTSystem,
    HFRolloutConfiguration,
    HFRolloutTrainer,
    read_rollouts,
)
from paceline.rl.redteam.turns import Said
from paceline.rl.text.local import LocalEngine
from paceline.testing import Ranks, rows


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_at_drawn_instants_goes_on_bitwise(
    ranks: Ranks, tmp_path: Path, size: int
) -> None:
    """In front of a token, within the scoring of an experience, and between two minibatches.

    Each start does what the ones before have lost, and is killed later.
    """
    drawn = random.Random(size)
    ranks(train, size, tmp_path / "whole")
    broken = tmp_path / "broken"
    of_a_rank = EPISODES // size * WIDTH  # texts of an experience, at least
    for where, happens in (
        ("sampling", 2 * TOKENS),
        ("scoring", of_a_rank),
        ("training", 3 * 2),
        ("sampling", 2 * TOKENS),
    ):
        after = drawn.randrange(happens)
        killed = ranks.outcomes(train, size, broken, where, after)
        assert killed[-1].code == -signal.SIGKILL, (where, after)
    ranks(train, size, broken)
    assert ending(broken / "run") == ending(tmp_path / "whole" / "run")
    recorded = [one / "run" / "rollouts.jsonl" for one in (broken, tmp_path / "whole")]
    assert recorded[0].read_bytes() == recorded[1].read_bytes()
    played = list(read_rollouts(broken / "run"))
    assert [(one["experience"], one["episode"]) for one in played] == [
        (experience, episode) for experience in range(EPOCHS) for episode in range(EPISODES)
    ]


def test_one_two_and_four_ranks_agree(ranks: Ranks) -> None:
    """Three episodes: of four ranks, one has none."""
    (alone,) = ranks(weights_after, 1)
    for size in (2, 4):
        for weights in ranks(weights_after, size):
            torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)


class Versions(LocalEngine):
    """Keeps the versions that it was told."""

    seen: list[int]

    def generate(self, requests: Any) -> Any:
        Versions.seen.append(self.version)
        return super().generate(requests)


def test_engines_and_recorded_turns_have_the_policys_version(tmp_path: Path) -> None:
    Versions.seen = []
    trainer_of(tmp_path, engine=Versions, epochs=2, checkpoint=None).train(seed=5)
    steps = [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert Versions.seen == [0, 0, max(steps) // 2, max(steps) // 2], "auditor and target"
    versions = [one["turns"][0]["version"] for one in read_rollouts(tmp_path / "run")]
    assert versions == [0] * EPISODES + [max(steps) // 2] * EPISODES


def said_by(**settings: Any) -> list[str]:
    system = HFASTSystem("tiny", "tiny", rewards={"likelihood": 1.0}, max_new_tokens=3, **settings)
    dialogue = system.begin("look at the tree")
    return [one.text for one in system.probe([dialogue] * 24, list(range(24)))]


def test_top_k_and_top_p_say_how_the_system_samples() -> None:
    assert len(set(said_by())) > 20
    greedy = said_by(top_k=1)
    assert len(set(greedy)) == 1
    assert said_by(top_p=1e-6) == greedy
    few = {text.split()[0] for text in said_by(top_k=2) if text.strip()}
    assert 1 < len(few) <= 2
    system = HFASTSystem("tiny", "tiny", rewards={"likelihood": 1.0}, max_new_tokens=3, top_k=1)
    responses = system.respond([system.begin("a")] * 8, [Said(" tree")] * 8, list(range(8)))
    assert len({one.text for one in responses}) == 1, "the target is sampled alike"


def test_the_models_are_put_on_the_device() -> None:
    system = HFASTSystem("tiny", "tiny", rewards={"likelihood": 1.0}, device="meta")
    for model in (system.auditor, system.target, system.baseline):
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_rollout_trainer_with_a_run_folder_resumes_with_its_best_score(tmp_path: Path) -> None:
    def trained(folder: str, epochs: int) -> HFRolloutTrainer:
        system = HFASTSystem(
            "tiny", "tiny", rewards={"a": (1.0, lambda text: text.count("a") / 4)}, max_new_tokens=4
        )
        trainer = HFRolloutTrainer(
            HFRolloutConfiguration(training_steps=epochs, lr=1e-2),
            ASTSampler(system, ["one more", "go home"], 2, 1),
            REINFORCE(system),
            dev_prompts=["look at", "say how"],
            eval_every=1,
            ckpt_dir=tmp_path / folder / "kept",
            run_dir=tmp_path / folder / "run",
            log_every=1,
            progress=False,
        )
        trainer.train(seed=3)
        return trainer

    whole = trained("whole", 3)
    first = trained("parts", 1)
    second = trained("parts", 3)
    assert second.global_step == whole.global_step > first.global_step
    assert second.best_score == whole.best_score
    assert ending(tmp_path / "parts" / "run") == ending(tmp_path / "whole" / "run")
    found = [list(read_rollouts(tmp_path / name / "run")) for name in ("parts", "whole")]
    assert found[0] == found[1]
    assert sorted(p.name for p in (tmp_path / "parts" / "kept").iterdir()) == ["best", "last"]


def test_a_reward_that_hangs_is_left_behind_and_counted() -> None:
    over = threading.Event()

    def hangs(prompts: Any, **_: Any) -> list[float]:
        over.wait(20)
        return [0.0] * len(prompts)

    def of(system: Any, **settings: Any) -> Any:
        sampler = sampler_of(system, reward_timeout=0.05, **settings)
        sampler.rewards["hangs"] = (1.0, hangs)
        return sampler

    try:
        trainer = prompts_trainer_of(sampler=partial(of, max_failures=99), epochs=1)
        (graph,) = trainer.sampler.rollouts([3])
        assert not graph.children
        assert graph.skipped == {"failed: hangs: it took longer than 0.05 s": 4}
        with pytest.raises(DataError, match=r"12 completions .* no reward.*longer than 0.05 s"):
            prompts_trainer_of(sampler=of, epochs=1).train(seed=7)
    finally:
        over.set()
        for thread in threading.enumerate():
            if thread.name == "reward":
                thread.join()
    with pytest.raises(ConfigError, match="reward_timeout=0"):
        sampler_of(None, reward_timeout=0)
