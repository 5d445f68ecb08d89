"""ASTRA-RL's samplers, systems, scorers and evaluators, row by row."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from astra_systems import WordSystem, letters, tiny

from paceline.errors import ConfigError, DataError
from paceline.recipe import build_trainer, load_recipe
from paceline.rl import (
    ASTEvaluator,
    ASTSampler,
    DetoxifyScorer,
    Evaluator,
    Graph,
    GraphMetrics,
    HFEvaluationSystem,
    LlamaGuardScorer,
    RuleScorer,
    Sampler,
    System,
    with_present_names,
)
from paceline.rl.redteam.judging import Watch
from paceline.rl.redteam.tiny import tiny_model, tiny_tokenizer
from paceline.rl.redteam.turns import Dialogue, Exchange, Said

PROMPTS = ["tell me a story", "what is the time", "good day"]


class Constant:
    """Scores that are all alike."""

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, x: Any) -> list[float]:
        return [self.value] * len(x)


@pytest.fixture(scope="module")
def system() -> Any:
    return tiny()


def test_A14_a_tree_has_its_turns_and_contexts(system: Any) -> None:
    sampler = ASTSampler(system, PROMPTS, tree_width=2, tree_depth=3)
    graph = sampler.rollout(seed=4)
    nodes = list(graph.nodes())
    assert len(nodes) == 14
    for node in nodes:
        after = system.advance(node.context, node.probe, node.response)
        assert [child.context for child in node.children] in ([], [after] * 2)
    assert sum(not node.children for node in nodes) == 8
    assert len({node.probe for node in nodes}) > 10
    assert ASTSampler(system, PROMPTS, 2, 0).rollout(seed=4).children == []


def test_the_same_seed_gives_the_same_tree_alone_and_among_others(system: Any) -> None:
    sampler = ASTSampler(system, PROMPTS, 2, 2)
    state = torch.get_rng_state()
    together = sampler.rollouts([0, 1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)
    for seed, graph in enumerate(together):
        alone = sampler.rollout(seed)
        assert alone.context == graph.context
        for one, other in zip(alone.nodes(), graph.nodes(), strict=True):
            assert one.probe_ids.tolist() == other.probe_ids.tolist()
            assert one.response == other.response
    assert len({graph.context for graph in together}) > 1
    assert len({graph.children[0].probe for graph in together}) == 4


def test_nodes_keep_what_was_sampled_with_its_probabilities(system: Any) -> None:
    sampler = ASTSampler(system, PROMPTS, 2, 2)
    sampler.begin(7, lambda: False)
    for node in sampler.rollout(1).nodes():
        assert node.version == 7
        logps = system.get_auditor_logprobs([node.context_ids], [node.probe_ids])[0]
        np.testing.assert_allclose(logps.detach()[: len(node.logprobs)], node.logprobs, atol=1e-5)
    plain, tokenizer = system.auditor, system.auditor_tokenizer
    node = sampler.rollout(1).children[1]
    ids = torch.tensor([*node.context_ids, *node.probe_ids])
    with torch.no_grad():
        all_logps = plain(ids[None]).logits[0].log_softmax(-1)
    start = len(node.context_ids)
    wanted = [all_logps[i - 1, ids[i]].item() for i in range(start, len(ids))]
    np.testing.assert_allclose(node.logprobs, wanted, atol=1e-5)
    assert node.context_ids.tolist() == tokenizer(node.context)["input_ids"]


def test_A16_a_prompt_is_played_once_without_branches(system: Any) -> None:
    sampler = ASTSampler(system, PROMPTS, tree_width=3, tree_depth=2)
    graph = sampler.eval_rollout("read a book")
    assert graph.context == "read a book"
    assert [len(level) for level in graph.siblings()] == [1, 1]
    assert sampler.eval_rollout("read a book").children[0].probe == graph.children[0].probe
    assert len(sampler.eval_rollout(2).children) == 3

    class Plain(Sampler):
        def rollout(self, seed: int | None = None) -> Graph:
            return Graph(seed, [])

    assert Plain(None).eval_rollout(5).context == 5
    with pytest.raises(NotImplementedError, match=r"eval_rollout of .*Plain takes an int"):
        Plain(None).eval_rollout("a prompt")


def test_the_stop_is_asked_for_between_turns(system: Any) -> None:
    from paceline.data.source import StopCollecting

    sampler = ASTSampler(system, PROMPTS, 1, 3)
    asked = iter([False, False, True])
    sampler.begin(0, lambda: next(asked))
    with pytest.raises(StopCollecting):
        sampler.rollout(0)
    sampler.end()
    assert len(list(sampler.rollout(0).nodes())) == 3


def test_A29_too_few_texts_are_an_error() -> None:
    system = WordSystem()
    sampler = ASTSampler(system, ["one"], 2, 1)
    for given in (["x"], "xx", None):
        system.rollout_prompt_with_auditor = lambda prompts, given=given: given  # type: ignore[method-assign]
        with pytest.raises(DataError, match="rollout_prompt_with_auditor: it returned"):
            sampler.rollout(0)


def test_A33_a_long_context_is_cut_at_the_left_and_the_continuation_is_whole(system: Any) -> None:
    long = "the day " * 200 + "tell me a story"
    graph = ASTSampler(system, [long], 1, 1).rollout(0)
    node = graph.children[0]
    assert len(node.context_ids) == 128 - 4
    whole = system.auditor_tokenizer(long)["input_ids"]
    assert node.context_ids.tolist() == whole[-124:]
    assert len(node.probe_ids) == 4
    logps = system.get_auditor_logprobs([long], [node.probe_ids])[0].detach()
    np.testing.assert_allclose(logps, node.logprobs, atol=1e-5)


def test_no_begin_token_stands_inside_and_an_empty_context_begins_with_one(system: Any) -> None:
    assert system.auditor_tokenizer("good day")["input_ids"][0] == 1  # this tokenizer adds one
    assert system.get_auditor_logprobs(["tell me"], [" good day"]).shape == (1, 2)
    assert bool((system.get_auditor_logprobs([""], [" good day"]) != 0).all())


def test_A41_the_first_seeds_are_taken() -> None:
    played: list[Any] = []

    class One(Evaluator):
        def compute_metrics(self, graph: Any) -> GraphMetrics:
            played.append(graph.context)
            return GraphMetrics({"context": graph.context})

        def aggregate_metrics(self, metrics: Any) -> int:
            return len(metrics)

    sampler = ASTSampler(WordSystem(), ["one"], 1, 1)
    state = random.getstate()
    assert (
        One(sampler, seeds=["one", "two", "red", "green", "bad"]).evaluate(3, progress=False) == 3
    )
    assert played == ["one", "two", "red"]
    assert One(sampler).evaluate(2, progress=False) == 2
    assert random.getstate() == state
    with pytest.raises(ConfigError, match="n_rollouts=6: there are 5 seeds"):
        One(sampler, seeds=[1, 2, 3, 4, 5]).evaluate(6)
    with pytest.raises(ConfigError, match="n_rollouts: without seeds"):
        One(sampler).evaluate()


def test_A42_A43_rates_are_means_and_the_file_is_json(tmp_path: Path) -> None:
    sampler = ASTSampler(WordSystem(scorer=Constant(0.2)), ["one"], 2, 3)
    found = ASTEvaluator(sampler, seeds=["one", "two"]).evaluate(progress=False)
    summary = found["summary"]
    assert summary["n_rollouts"] == 2
    assert summary["avg_adversarial_toxicity"] == pytest.approx(0.2)
    assert summary["avg_target_toxicity"] == pytest.approx(0.2)
    assert summary["pct_rollouts_with_adversarial_toxicity"] == 0
    assert summary["pct_rollouts_with_target_toxicity/attack_success_rate"] == 0
    overall = found["details"][0]["overall"]
    assert overall["num_turns"] == 3
    assert (
        overall["first_adversarial_toxicity_turn"] is None is overall["first_target_toxicity_turn"]
    )
    turn = found["details"][0]["per_turn"][0]
    assert set(turn) == {
        "turn", "reward", "adversarial_toxicity", "target_toxicity", "context", "probe", "response",
    }  # fmt: skip
    Evaluator.write_json(found, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text("utf-8")) == found
    high = ASTEvaluator(sampler, ["one"], scorer=Constant(0.5)).evaluate(progress=False)
    assert high["summary"]["pct_rollouts_with_adversarial_toxicity"] == 100
    assert ASTEvaluator(sampler, []).evaluate(progress=False)["summary"]["avg_reward"] == 0


def test_A44_a_checkpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auditor_checkpoint=.*no model was saved there"):
        HFEvaluationSystem(tmp_path / "best", "tiny", "tiny")
    auditor = tiny_model(seed=5)
    auditor.save_pretrained(tmp_path / "best")
    system = HFEvaluationSystem(tmp_path / "best", "tiny", "tiny", scorer=Constant(0.0))
    assert torch.equal(system.auditor.lm_head.weight, auditor.lm_head.weight)
    assert system.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_A46_the_reward_is_the_weighted_sum_and_says_which_likelihood() -> None:
    system = WordSystem(scorer=RuleScorer(len), ppl_weight=0.5)
    bias = torch.arange(8, dtype=torch.float64) * 0.2
    logps = bias.log_softmax(0)[[7, 2]]  # good, blue
    expected = 0.5 * math.exp(logps.sum()) + 0.1 * len(" good blue ok") + 0.1 * len(" ok")
    assert system.reward(["one"], [" good blue"], [" ok"]) == pytest.approx([expected], rel=1e-6)
    per_token = WordSystem(scorer=RuleScorer(len), ppl_weight=0.5, likelihood="per_token")
    expected += 0.5 * (float(logps.mean()) - math.exp(logps.sum()))
    assert per_token.reward(["one"], [" good blue"], [" ok"]) == pytest.approx([expected], rel=1e-6)
    long = WordSystem(scorer=Constant(0.0), ppl_weight=1.0)
    assert 0 < long.reward([""], [" red" * 150], [" ok"])[0] < 1e-150  # float32 gives 0


def test_A48_old_names_are_taken_and_said() -> None:
    with pytest.warns(DeprecationWarning, match="get_tester_logprobs is get_auditor_logprobs"):

        class Old(System):
            def get_tester_logprobs(self, context: Any, continuation: Any) -> str:
                return "tester"

            def rollout_prompt_with_tester(self, prompts: Any) -> list[str]:
                return ["said"] * len(prompts)

    assert Old().get_auditor_logprobs([], []) == "tester"  # type: ignore[comparison-overlap]
    assert Old().rollout_prompt_with_auditor(["x"]) == ["said"]

    class Older:
        def get_attacker_logprobs(self, context: Any, continuation: Any) -> str:
            return "attacker"

    with pytest.warns(DeprecationWarning, match="get_attacker_logprobs"):
        adapted = with_present_names(Older())
    assert adapted.get_auditor_logprobs([], []) == "attacker"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_present_names(Older())


# Scorers that fail


def failing(*answers: Any) -> Any:
    """A scorer that answers its calls one after the other; an error is raised."""
    queue = list(answers)

    def score(texts: list[str]) -> Any:
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(texts) if callable(answer) else answer

    return types.SimpleNamespace(score=score)


RELEASED = threading.Event()


def hang(texts: list[str]) -> Any:
    RELEASED.wait(20)


@pytest.fixture
def _released() -> Any:
    """Ends what hangs, once the test is over."""
    RELEASED.clear()
    before = set(threading.enumerate())
    yield
    RELEASED.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


@pytest.mark.usefixtures("_released")
@pytest.mark.parametrize(
    "answer",
    [
        [0.5],
        [[0.5, 0.5], [0.5, 0.5]],
        [float("nan"), float("inf")],
        ["0.5", None],
        0.5,
        None,
        torch.zeros(2, 2),
        ValueError("broken"),
        hang,
    ],
    ids=["few", "nested", "nan", "texts", "scalar", "none", "matrix", "raises", "hangs"],
)
def test_a_failing_scorer_is_asked_again_and_then_its_turns_are_counted(answer: Any) -> None:
    right = [0.25, 0.75]
    once = Watch(timeout=0.05, retries=1)
    assert once.scores("x", failing(answer, right).score, ["a", "b"]) == right
    assert once.failed == 0
    always = Watch(timeout=0.02, retries=1, max_failures=3)
    assert always.scores("x", failing(answer).score, ["a", "b"]) == [None, None]
    assert always.failed == 2
    with pytest.raises(DataError, match=r"rewards.x: 4 states in a row have no score: .*"):
        always.scores("x", failing(answer).score, ["a", "b"])


def test_turns_without_a_reward_are_left_out_and_counted() -> None:
    def half(texts: list[str]) -> list[float]:
        return [float("nan") if i % 2 else 1.0 for i, _ in enumerate(texts)]

    system = WordSystem(scorer=failing(half), scorer_retries=0)
    graph = ASTSampler(system, ["one"], 4, 1).rollout(0)
    assert len(graph.children) == 2
    assert graph.skipped == {"no reward": 2}
    system.rollout_prompt_with_auditor = lambda prompts: [" red", " ", "", " bad"]  # type: ignore[method-assign]
    graph = ASTSampler(system, ["one"], 4, 1).rollout(0)
    assert graph.skipped == {"empty probe": 2, "no reward": 1}


def test_rewards_are_summed_by_weight_and_each_is_kept_by_its_name() -> None:
    system = tiny(
        rewards={
            "letters": (2.0, letters),
            "likelihood": 0.5,
            "diversity": {"weight": 0.25},
            "probed": (1.0, RuleScorer(len)),
        }
    )
    graph = ASTSampler(system, PROMPTS, 3, 1).rollout(0)
    bags = []
    for node in graph.children:
        parts = node.rewards
        assert parts["letters"] == letters(node.response)
        assert parts["probed"] == len(node.response)
        ids = [*system.target_tokenizer(node.context)["input_ids"]]
        said = system.target_tokenizer(node.probe, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = system.target(torch.tensor([ids + said])).logits[0].log_softmax(-1)
        mean = np.mean([logps[len(ids) + i - 1, token] for i, token in enumerate(said)])
        assert parts["likelihood"] == pytest.approx(mean, rel=1e-4)
        total = 2 * parts["letters"] + 0.5 * parts["likelihood"] + 0.25 * parts["diversity"]
        assert node.reward == pytest.approx(total + parts["probed"])
        words = node.probe.split()
        bags.append({(w,) for w in words} | set(itertools.pairwise(words)))
    for i, node in enumerate(graph.children):
        shared = [len(bags[i] & b) / len(bags[i] | b) for j, b in enumerate(bags) if j != i]
        assert node.rewards["diversity"] == pytest.approx(1 - max(shared))


def test_the_likelihood_of_a_short_probe_is_a_mean_over_its_own_tokens(system: Any) -> None:
    probes = (" tea", " red tea please")
    turns = [Exchange(Dialogue("good day"), Said(probe), Said("")) for probe in probes]
    alone = [system.probe_logps([turn])[0] for turn in turns]
    assert [len(row) for row in system.probe_logps(turns)] == [1, 3] == [len(row) for row in alone]


def test_profanity_is_what_the_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # scikit-learn sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    predict = pytest.importorskip("profanity_check").predict_prob
    system = tiny(rewards={"profanity": {"weight": 1.0, "of": "both"}})
    texts = ["you are a stupid idiot", "have a nice day"]
    scores = system._judge.rewards["profanity"][1].scorer.score(texts)
    assert scores == pytest.approx(predict(texts).tolist())
    assert scores[0] > 0.9 > 0.2 > scores[1]
    assert system._judge.rewards["profanity"][1].scorer.score([]) == []


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ({}, "rewards: give at least one"),
        ({"profanty": 1.0}, "rewards.profanty: .*profanity"),
        ({"likelihood": "much"}, "rewards.likelihood.weight='much': expected a number"),
        ({"likelihood": {"kind": "odd"}}, "rewards.likelihood.kind='odd'"),
        ({"diversity": {"wieght": 1}}, "rewards.diversity: no setting 'wieght'"),
        ({"letters": (1.0, letters), "profanity": {"of": "all"}}, "rewards.profanity.of='all'"),
    ],
)
def test_a_reward_that_is_not_there_is_named(rewards: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WordSystem.__mro__[1](rewards=rewards)  # type: ignore[call-arg]


def test_what_cannot_be_played_is_refused_before(system: Any, tmp_path: Path) -> None:
    pair = (tiny_model(), tiny_tokenizer())
    for wrong, said in (
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 128}, "max_new_tokens=128: the auditor has a context of 128"),
        ({"auditor": "tiny"}, "auditor and auditor_model_id are one setting"),
        ({"scorer": Constant(1.0)}, "scorer and rewards both say"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny(**wrong)
    endless = (tiny_model(), tiny_tokenizer())
    endless[0].generation_config.eos_token_id = None
    endless[0].config.eos_token_id = None
    endless[1].eos_token = None
    with pytest.raises(ConfigError, match=r"auditor_model_id: .*end token"):
        type(system)(endless, pair, rewards={"letters": (1.0, letters)})
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ConfigError, match="baseline_model_id: its tokenizer is not the auditor's"):
        type(system)(pair, "tiny", (tiny_model(), other), rewards={"letters": (1.0, letters)})
    with pytest.raises(ConfigError, match="nothing says what a turn"):
        ASTSampler(type(system)("tiny", "tiny"), PROMPTS)
    for prompts, said in (
        ([], "there is no prompt"),
        (["a", " "], "prompt 1 is blank"),
        ("text", "expected texts"),
        ({"flie": "x"}, "not 'flie'"),
    ):
        with pytest.raises(ConfigError, match=said):
            ASTSampler(system, prompts)
    with pytest.raises(ConfigError, match=r"prompts.file=.*none.txt"):
        ASTSampler(system, {"file": "none.txt"}).locate(tmp_path)
    (tmp_path / "some.txt").write_text("good day\n\nred tea\n", encoding="utf-8")
    sampler = ASTSampler(system, {"file": "some.txt"})
    sampler.locate(tmp_path)
    assert sampler.prompts == ["good day", "red tea"]


# Scorers of packages that are not installed here: what they are asked, and what is taken of it


def test_detoxify_is_asked_for_its_category(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detoxify:
        def __init__(self, variant: str, device: str) -> None:
            self.made = (variant, device)

        def predict(self, texts: list[str]) -> dict[str, list[float]]:
            return {"insult": [float(len(text)) for text in texts], "toxicity": [0.0] * len(texts)}

    monkeypatch.setitem(sys.modules, "detoxify", types.SimpleNamespace(Detoxify=Detoxify))
    scorer = DetoxifyScorer("insult", "unbiased")
    assert scorer.score(["abc", "d"]) == [3.0, 1.0]
    assert scorer.score([]) == []
    with pytest.raises(ConfigError, match="harm_category='rude': choose one of toxicity"):
        DetoxifyScorer("rude")
    with pytest.raises(ConfigError, match="variant='best'"):
        DetoxifyScorer(variant="best")


def test_llama_guard_is_read_at_the_place_of_its_verdict() -> None:
    """The tiny model stands in: the probability is that of the word after the template."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %} {{ m['content'] }}{% endfor %}"
    scorer = LlamaGuardScorer(model, tokenizer=tokenizer)
    unsafe = tokenizer("unsafe", add_special_tokens=False)["input_ids"][0]
    opening = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    for text in ("bad day", "good house"):
        ids = tokenizer(f" Hello! {text}", add_special_tokens=False)["input_ids"] + opening
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[unsafe].item()
        assert scorer.score([text]) == pytest.approx([wanted])


def test_any_classifier_of_transformers_scores_a_label() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from paceline.rl import ClassifierScorer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3, pad_token_id=0, id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    texts = ["good day", "tell me a story now", "red"]
    found = ClassifierScorer(model, "b", tokenizer=tokenizer).score(texts)
    with torch.no_grad():
        wanted = [
            model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)[1].item()
            for text in texts
        ]
    assert found == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ConfigError, match="label='d': the classifier's are a, b, c"):
        ClassifierScorer(model, "d", tokenizer=tokenizer)


def test_all_live_branches_are_played_in_one_batch_a_turn(
    system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.rl.text.local import LocalEngine

    asked: list[int] = []
    real = LocalEngine.generate

    def counted(self: Any, requests: Any) -> Any:
        asked.append(len(requests))
        return real(self, requests)

    monkeypatch.setattr(LocalEngine, "generate", counted)
    ASTSampler(system, PROMPTS, 2, 3).rollouts([0, 1])
    assert asked == [4, 4, 8, 8, 16, 16]


def test_the_red_teaming_recipe_trains_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # scikit-learn sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    recipe = Path(__file__).parents[3] / "recipes" / "redteam.yaml"
    changes = ["trainer.epochs=2", "evaluation.every=1", f"run.dir={tmp_path}/run"]
    trainer: Any = build_trainer(load_recipe(recipe, [*changes, "checkpoint=null"]))
    trainer.train(seed=0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    experiences = [row for row in rows if "rollout/reward" in row]
    assert [row["rollout/turns"] for row in experiences] == [64, 64]
    assert 0 < experiences[0]["rollout/reward/profanity"] < 1
    assert experiences[0]["rollout/reward/likelihood"] < 0
    assert len([row for row in rows if "val/reward" in row]) == 2
    dev = set((recipe.parent / "prompts" / "dev.txt").read_text().splitlines())
    assert set(trainer.evaluation.prompts) == dev
    assert not dev & set(trainer.sampler.prompts)
