"""`paceline evaluate` on a policy: baselines beside it, evaluation.json and a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from command import Paceline
from paceline.errors import ConfigError
from paceline.rl import Evaluation
from paceline.rl.played import Played, diversity, gain, summary
from paceline.testing import Ranks

RECIPES = Path(__file__).parents[2] / "recipes"
RUN = "runs/redteam/swear"
PROMPTS = ("<b>say & go", "tell me about your day", "look at the green tree")


def of(*values: float | None, attempts: int = 1) -> list[Played]:
    return [Played(i // attempts, value, 1) for i, value in enumerate(values)]


def test_attempts_at_a_prompt_are_one_case() -> None:
    played = of(0.0, 1.0, 1.0, 1.0, None, 0.0, attempts=2)
    said = summary(played, 0, 0.5, 2)
    assert said["mean"] == pytest.approx(3 / 5)
    assert said["success"] == pytest.approx(3 / 5)
    assert said["best"] == pytest.approx((1 + 1 + 0) / 3)
    assert said["hit_at_2"] == 1.0, "the third prompt has one attempt only"
    assert summary(of(1.0, 0.0), 0, 0.0)["success"] == 1.0, "0 is a threshold too"
    assert summary(of(None), 0, 0.5) == {}
    # Drawn anew are prompts, not attempts: two equal prompts leave no doubt.
    assert summary(of(0.0, 1.0, 0.0, 1.0, attempts=2), 0, None, 2)["low"] == 0.5


def test_a_gain_is_paired_by_case() -> None:
    ones, others = of(1.0, 2.0, None), of(0.0, 1.0, 5.0)
    assert gain(ones, others, 0) == (1.0, 1.0, 1.0)
    best = gain(of(0.0, 3.0, attempts=2), of(1.0, 1.0, attempts=2), 0, best=True)
    assert best == (2.0, 2.0, 2.0)
    assert gain(of(None), of(1.0), 0) is None


def test_diversity_is_of_words_and_pairs() -> None:
    def said(*probes: str) -> list[Played]:
        return [Played(0, 0.0, 1, {"turns": [{"probe": probe} for probe in probes]})]

    assert diversity(said("a b", "a b")) == {"probes": 2, "distinct": 0.5, "distance": 0.0}
    # {a, b, ab} and {a, c, ac} have 1 of 5 in common.
    assert diversity(said("a b", "A c"))["distance"] == pytest.approx(0.8)
    assert diversity(of(1.0)) == {}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="did you mean 'untrained'"):
        Evaluation(baselines=["untraned"])
    with pytest.raises(ConfigError, match="attempts=2"):
        Evaluation(attempts=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> tuple[Any, Path]:
    """A run on files of prompts beside its recipe, which are gone afterwards."""
    folder = tmp_path_factory.mktemp("redteam")
    text = (RECIPES / "redteam.yaml").read_text()
    (folder / "redteam.yaml").write_text(text.replace("prompts/dev.txt", "dev.txt"))
    (folder / "prompts").mkdir()
    (folder / "prompts/train.txt").write_text("hello\nsay it again\n")
    (folder / "dev.txt").write_text("\n".join(PROMPTS))
    paceline = Paceline(folder, ranks)
    words = ("trainer.epochs=2", "evaluation.attempts=2", "evaluation.every=2")
    code, _, err = paceline("train", "redteam.yaml", *words)
    assert code == 0, err
    for file in ("redteam.yaml", "dev.txt", "prompts/train.txt"):
        (folder / file).unlink()
    return paceline, folder


def test_a_policy_is_evaluated_beside_its_baselines(trained: tuple[Any, Path]) -> None:
    paceline, folder = trained
    code, out, err = paceline("evaluate", RUN)
    assert code == 0, err
    assert "The same as the run logged, bit by bit." in out
    report = json.loads((folder / RUN / "evaluation.json").read_text())
    logged = json.loads((folder / RUN / "run.json").read_text())["metrics"]
    policies, gains = report["policies"], report["gains"]
    assert list(policies) == ["trained", "untrained", "random"]
    assert policies["trained"]["mean"] == logged["val/reward"]
    assert policies["trained"]["best"] == logged["val/reward_best"]
    assert policies["trained"]["hit_at_2"] == logged["val/hit_at_2"]
    assert gains["untrained"][0] == logged["val/gain"], "the same untrained policy as before step 1"
    assert set(gains) == {
        f"{name}{best}" for name in ("untrained", "random") for best in ("", ", best of 2")
    }
    assert [line["prompt"] for line in report["cases"]] == list(PROMPTS)
    for line in report["cases"]:
        for name in policies:
            assert len(line["values"][name]) == 2
    told = report["dialogues"]
    said = {name: [d["turns"][0]["probe"] for d in told[name]] for name in policies}
    assert all(len(set(probes)) > 1 for probes in said.values()), "attempts differ"
    assert len({tuple(probes) for probes in said.values()}) == 3, "so do policies"
    assert sum(sum(counts.values()) for _, _, counts in report["distribution"]) == 3 * 6


def test_the_page_escapes_what_was_said(trained: tuple[Any, Path]) -> None:
    paceline, folder = trained
    if not (folder / RUN / "evaluation.html").exists():
        assert paceline("evaluate", RUN)[0] == 0
    page = (folder / RUN / "evaluation.html").read_text()
    assert "&lt;b&gt;say &amp; go" in page
    assert "<b>say" not in page
    assert "<script" not in page
    for heading in (
        "Policies",
        "Diversity",
        "Distribution of the reward",
        "Reward by likelihood",
        "Cases",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert re.search(r"-&gt; .*\n", page), "responses"


def test_two_ranks_write_the_same(trained: tuple[Any, Path]) -> None:
    paceline, folder = trained
    file = folder / RUN / "evaluation.json"
    if not file.exists():
        assert paceline("evaluate", RUN)[0] == 0
    before = json.loads(file.read_text())
    code, _, err = paceline("evaluate", RUN, "--nproc", "2")
    assert code == 0, err
    after = json.loads(file.read_text())
    assert after["dialogues"] == before["dialogues"]
    assert after["policies"] == before["policies"]


def test_an_environment_is_evaluated_beside_random_actions(tmp_path: Path, ranks: Ranks) -> None:
    paceline = Paceline(tmp_path, ranks)
    words = ("trainer.epochs=1", "evaluation.every=1", "evaluation.episodes=5")
    code, _, err = paceline("train", str(RECIPES / "cartpole.yaml"), *words)
    assert code == 0, err
    code, out, err = paceline("evaluate", "runs/cartpole/ppo", "--json")
    assert code == 0, err
    assert json.loads(out)["equal"] is True
    report = json.loads((tmp_path / "runs/cartpole/ppo/evaluation.json").read_text())
    values = {n: [c["values"][n][0] for c in report["cases"]] for n in report["policies"]}
    assert min(values["random"]) >= 8
    assert max(values["random"]) < 120, "a random policy falls soon"
    assert values["trained"] != values["untrained"]
    assert report["kind"] == "return"
