"""The section `engine:` makes what completes prompts; each experience says how near it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from text_runs import trainer_of

from paceline import Resume
from paceline.data.source import StopCollecting
from paceline.errors import ConfigError
from paceline.recipe import build_trainer, load_recipe
from paceline.rl.control.environment import GymEnvironment
from paceline.rl.text.local import LocalEngine
from paceline.rl.trainer import RLTrainer
from paceline.testing import rows

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo.yaml"


class Watched(LocalEngine):
    """Keeps the batches and versions that it was asked for."""

    seen: list[tuple[int, int]]

    def generate(self, requests: Any) -> Any:
        Watched.seen.append((self.version, len(requests)))
        return super().generate(requests)


def test_an_engine_is_used_and_told_its_version_and_a_row_says_how_near_it_is(
    tmp_path: Path,
) -> None:
    Watched.seen = []
    trainer = trainer_of(tmp_path, engine=partial(Watched, batch=5), checkpoint=None)
    trainer.train(seed=7)
    # Two experiences of 3 prompts with 4 completions; 2 passes of 3 minibatches between them.
    assert Watched.seen == [(0, 12), (6, 12)]
    found = [row for row in rows(tmp_path / "run") if "rollout/logprob_kl" in row]
    assert len(found) == 2
    for row in found:
        mean, most = (row[f"rollout/logprob_difference/{name}"] for name in ("mean", "max"))
        assert 0 < mean < most < 1e-4
        assert abs(row["rollout/logprob_kl"]) < 1e-6


def test_a_recipe_names_the_engine(tmp_path: Path) -> None:
    def built(*changes: str) -> Any:
        given = [f"run.dir={tmp_path / 'run'}", "trainer.epochs=1", *changes]
        return build_trainer(load_recipe(RECIPE, given))

    trainer = built("engine.type=local", "engine.batch=3")
    trainer.train()
    engine = trainer.system.engine_of(trainer.system.auditor, trainer.system.tokenizer)
    assert (type(engine), engine.batch) == (LocalEngine, 3)
    for changes, message in (
        (["engine.type=vllm"], "vLLM does not exist yet"),
        (["engine.type=local", "engine.batches=3"], "batches"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(*changes)


def test_an_engine_without_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="an environment has none"):
        RLTrainer(
            environment=GymEnvironment("CartPole-v1"), algorithm=None, engine=LocalEngine
        ).configure()
    with pytest.raises(ConfigError, match="expected a function of model and tokenizer"):
        trainer_of(engine=3).configure()


def test_a_stop_is_asked_for_between_tokens(tmp_path: Path) -> None:
    """So that a signal does not wait for a long completion."""
    trainer = trainer_of(tmp_path, checkpoint=None)
    sampler: Any = trainer.sampler
    asked = iter([False, False, False, True])
    sampler.begin(0, lambda: next(asked))
    with pytest.raises(StopCollecting):
        sampler.rollouts([1])
    assert next(asked, None) is None


def test_a_baseline_is_not_that_of_weights_that_are_loaded_later(tmp_path: Path) -> None:
    trained = trainer_of(tmp_path, epochs=1)
    trained.train(seed=7)
    trainer = trainer_of(checkpoint=None, resume=Resume(init_from=tmp_path / "run"))
    with pytest.raises(ConfigError, match="name them as the system's model instead"):
        trainer.train()
