"""ASTRA-RL's rows on algorithms; a test's name has the row. Systems have texts alone, as there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from paceline.errors import ConfigError, DataError
from paceline.rl.algorithms.dpo import DPO, IPO, DPOBatch
from paceline.rl.algorithms.grpo import GRPO
from paceline.rl.algorithms.policy_gradient import Sample
from paceline.rl.algorithms.ppo import PPO
from paceline.rl.algorithms.reinforce import REINFORCE, RLOO
from paceline.rl.graph import Graph, Node
from paceline.rl.sampler import Sampler
from paceline.rl.system import ValueFunctionSystem
from paceline.rl.trainer import RLTrainer

ROW_25 = {
    *("training/loss", "reward/chosen_rewards", "reward/rejected_rewards"),
    *("reward/reward_accuracies", "reward/reward_margin", "policy/logprobs_chosen"),
    *("policy/logprobs_rejected", "ref/logprobs_chosen", "ref/logprobs_rejected"),
}
ROW_27 = {
    *("training/loss", "training/policy_loss", "training/value_loss", "reward/mean_reward"),
    *("reward/std_reward", "policy/logprobs", "ref/logprobs"),
}


class Given(ValueFunctionSystem):
    """Says what it was told of each continuation, padded as ASTRA pads: the context first."""

    def __init__(
        self,
        auditor: dict[str, Sequence[float]],
        baseline: dict[str, Sequence[float]] | None = None,
        values: dict[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.tables = {"auditor": auditor, "baseline": baseline or auditor, "values": values or {}}
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def _rows(self, name: str, context: Sequence[str], said: Sequence[str]) -> torch.Tensor:
        table = self.tables[name]
        rows = [[0.0] * len(c) + list(table[s]) for c, s in zip(context, said, strict=True)]
        longest = max(map(len, rows))
        return torch.tensor([r + [0.0] * (longest - len(r)) for r in rows], dtype=torch.float64)

    def get_auditor_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._rows("auditor", context, continuation) * self.scale

    def get_baseline_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._rows("baseline", context, continuation)

    def value(self, context: Any, continuation: Any) -> torch.Tensor:
        return (self._rows("values", context, continuation) * self.head)[..., None]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter([self.scale, self.head])


def node(probe: str, reward: float, *children: Node, context: str = "c") -> Node:
    return Node(context, probe, "r", reward, list(children))


def flat(*rewards: float) -> Graph:
    return Graph("c", [node(f"p{i}", reward) for i, reward in enumerate(rewards)])


SPREAD = {"a": [-2.0] * 5, "b": [-2.0] * 6, "x": [-2.75] * 4, "y": [-1.8] * 5}
FROZEN = {"a": [-2.1] * 5, "b": [-12.5 / 6] * 6, "x": [-2.5] * 4, "y": [-2.0] * 5}
PAIRS = DPOBatch(["c", "cc"], ["a", "b"], ["x", "y"])


def test_A17_the_best_and_the_worst_of_siblings_are_a_pair_level_by_level() -> None:
    below = [node("q", 1.0, context="cpr"), node("s", 2.0, context="cpr")]
    later = [node("t", 5.0, context="c2"), node("u", 4.0, context="c2")]
    graph = Graph("c", [node("l", 0.1, *below), node("h", 0.9, *later), node("m", 0.5)])
    steps = DPO(Given({})).flatten(graph)
    assert [(s.prefix, s.suffix_pos, s.suffix_neg) for s in steps] == [
        ("c", "h", "l"),
        ("cpr", "s", "q"),
        ("c2", "t", "u"),
    ]
    graph.children[1].context = "other"
    with pytest.raises(ConfigError, match="must share the same prefix"):
        DPO(Given({})).flatten(graph)


def test_A19_a_chain_has_no_pair_and_a_pair_below_a_single_turn_is_found() -> None:
    system = Given({"p": [-1.0, -2.0], "q": [-1.0]}, values={"p": [0.5, 0.5], "q": [0.1]})
    chain = Graph("c", [node("p", 1.0, node("q", 2.0, node("p", 3.0)))])
    assert [step.reward for step in PPO(system).flatten(chain)] == [1.0, 2.0, 3.0]
    assert DPO(system).flatten(chain) == []
    assert chain.skipped == {"no pair, for a group of one (width 2 is needed)": 3}
    forked = Graph("c", [node("p", 1.0, node("p", 2.0), node("q", 3.0))])
    assert [step.suffix_pos for step in DPO(system).flatten(forked)] == ["q"], "nothing is lost"

    class Chain(Sampler):
        tree_width = 1

        def rollout(self, seed: int | None = None) -> Graph:
            return chain

    class Held(Given):
        def __init__(self) -> None:
            super().__init__({})
            self.net = torch.nn.Linear(1, 1)

        def parameters(self) -> Iterator[torch.nn.Parameter]:
            return self.net.parameters()

    held = Held()
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    trainer = RLTrainer(
        sampler=Chain(held), algorithm=DPO(held), optimizer=optimizer, epochs=1, progress=False,
        checkpoint=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="tree_width=1: DPO compares"):
        trainer.train(seed=0)


def test_A20_A22_dpo_has_astras_loss_and_log_keys() -> None:
    loss, logged = DPO(Given(SPREAD, FROZEN)).step(PAIRS)
    assert loss.item() == pytest.approx(0.6697083479014092, abs=1e-10)
    assert loss.requires_grad
    assert logged.keys() >= ROW_25
    assert all(type(value) is float for value in logged.values())
    assert logged["reward/reward_accuracies"] == 0.5
    assert logged["reward/reward_margin"] == pytest.approx(0.05)
    assert logged["ref/logprobs_rejected"] == pytest.approx(-10)


def test_A21_ipo_is_per_token_and_of_sums_by_name() -> None:
    system = Given(SPREAD, FROZEN)
    per_token, logged = IPO(system).step(PAIRS)
    of_sums, _ = IPO(system, level="sequence").step(PAIRS)
    assert per_token.item() == pytest.approx(23.90138888888889, abs=1e-9)
    assert of_sums.item() == pytest.approx(21.25, abs=1e-9)
    assert logged.keys() >= ROW_25
    with pytest.raises(ConfigError, match="level"):
        IPO(system, level="tokens")


OLD = {"p": [-1.0, -1.5, -0.5, -2.0], "q": [-0.7, -1.2]}
REF = {"p": [-1.1, -1.4, -0.6, -1.8], "q": [-0.9, -1.0]}
VALUES = {"p": [0.1, 0.2, 0.3, 0.4], "q": [0.5, 0.4]}
SCORED = Graph("c", [node("p", 1.0), node("q", -0.5)])
LIKE_TRL = partial(PPO, gamma=1.0, lam=0.95, beta=0.05, clip_range_value=0.2, vf_loss_coef=0.1)


def moved() -> Given:
    """The policy and its values after a step."""
    new = {"p": [-0.9, -1.8, -0.45, -2.0], "q": [-0.45, -1.25]}
    values = {"p": [0.15, -0.1, 0.55, 0.4], "q": [0.5, 0.5]}
    return Given(new, REF, values)


def test_A23_A25_A27_ppo_estimates_advantages_over_tokens_with_the_kl_in_the_reward() -> None:
    algorithm = LIKE_TRL(Given(OLD, REF, VALUES), normalize_advantages=False)
    samples = algorithm.prepare(algorithm.flatten(SCORED))
    first, second = samples
    assert first.advantages.tolist() == pytest.approx(
        [0.80348625, 0.745775, 0.6745, 0.61], abs=1e-6
    )
    assert first.returns.tolist() == pytest.approx([0.90348625, 0.945775, 0.9745, 1.01], abs=1e-6)
    last = -0.5 + 0.05 * 0.2 - 0.4  # the KL of the last token, and its value
    assert second.advantages.tolist() == pytest.approx(
        [-0.05 * 0.2 + 0.4 - 0.5 + 0.95 * last, last], abs=1e-6
    )
    white = LIKE_TRL(Given(OLD, REF, VALUES)).prepare(samples)
    whole = torch.cat([torch.as_tensor(sample.advantages) for sample in white])
    assert whole.mean().item() == pytest.approx(0, abs=1e-6)
    assert whole.std().item() == pytest.approx(1, abs=1e-5)

    batch = PPO.collate_fn(samples)
    system = moved()
    loss, logged = LIKE_TRL(system).step(batch)
    loss.backward()
    assert logged.keys() >= ROW_27
    assert all(type(value) is float for value in logged.values())
    assert system.head.grad.item() != 0
    # By hand: ratios against clip(.8, 1.2), values against clip(old +- .2).
    policy, values = [], []
    news, olds = system.tables, {"auditor": OLD, "values": VALUES}
    for sample in samples:
        said = sample.turn.probe
        rows = (news["auditor"][said], olds["auditor"][said], sample.advantages)
        for new, old, a in zip(*rows, strict=True):
            ratio = torch.tensor(new - old).exp().item()
            policy.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        rows = (news["values"][said], olds["values"][said], sample.returns)
        for new, old, r in zip(*rows, strict=True):
            near = old + min(max(new - old, -0.2), 0.2)
            values.append(max((new - r) ** 2, (near - r) ** 2) / 2)
    by_hand = sum(policy) / 6 + 0.1 * sum(values) / 6
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)

    tight, wide = (PPO(moved(), clip_range=r).step(batch)[0].item() for r in (0.01, 10.0))
    assert abs(tight - wide) > 1e-3
    unvalued = moved()
    PPO(unvalued, vf_loss_coef=0.0).step(batch)[0].backward()
    assert unvalued.head.grad.item() == 0
    assert unvalued.scale.grad.item() != 0


LOGP = {"p": [-1.0, -2.0, -3.0], "q": [-1.5, -0.5]}
BEFORE = {"p": [-1.2, -2.0, -2.5], "q": [-1.0, -0.9]}
REFERENCE = {"p": [-1.1, -1.8, -3.0], "q": [-1.4, -0.7]}


def batch_of(algorithm: Any, advantages: Sequence[float]) -> Any:
    """Both turns with their old log-probabilities, and advantages as given."""
    old = type(algorithm)(Given(BEFORE, REFERENCE), beta=algorithm.beta)
    samples: list[Sample] = old.prepare(old.flatten(SCORED))
    batch = algorithm.collate_fn(samples)
    batch["old"], batch["mask"] = batch["old"].double(), batch["mask"]
    batch["advantages"] = torch.tensor(advantages, dtype=torch.float64)[:, None].expand(2, 3)
    for i, said in enumerate("pq"):  # in float64, in which the golden values are
        for j, (now, ref) in enumerate(zip(BEFORE[said], REFERENCE[said], strict=True)):
            batch["old"][i, j] = now
            if "ref" in batch:
                batch["ref"] = batch["ref"].double()
                batch["ref"][i, j] = ref
    return batch


@pytest.mark.parametrize(
    ("settings", "golden"),
    [
        ({"aggregation": "grpo"}, 0.10520106445821198),
        ({"aggregation": "bnpo"}, -0.1029411924142726),
        ({"aggregation": "dapo"}, -0.1029411924142726),
        ({"aggregation": "dr_grpo", "max_length": 4}, -0.06433824525892037),
        ({"aggregation": "grpo", "level": "sequence"}, 0.023196003232377194),
        ({"aggregation": "grpo", "beta": 0.04}, 0.10561501567772252),
        ({"aggregation": "dapo", "beta": 0.04}, -0.10254005763547451),
        ({"ratio": "cispo", "cap": 0.2}, 0.16),
    ],
    ids=str,
)
def test_A27_grpo_has_the_golden_losses(settings: dict[str, Any], golden: float) -> None:
    algorithm = GRPO(Given(LOGP, REFERENCE), **settings)
    loss, logged = algorithm.step(batch_of(algorithm, [1.0, -1.0]))
    assert loss.item() == pytest.approx(golden, abs=1e-10)
    assert all(type(value) is float for value in logged.values())


def test_A27_rloo_has_the_golden_loss_and_takes_the_kl_from_the_reward() -> None:
    algorithm = RLOO(Given(LOGP, REFERENCE), beta=0.0)
    loss, _ = algorithm.step(batch_of(algorithm, [1.0, -1.0]))
    assert loss.item() == pytest.approx(0.08200959867712077, abs=1e-10)
    held = RLOO(Given(BEFORE, REFERENCE), beta=0.1)
    first, second = held.prepare(held.flatten(SCORED))
    assert first.advantages.tolist() == pytest.approx([1.5 - 0.1 * (0.2 - 0.2)] * 3, abs=1e-6)
    assert second.advantages.tolist() == pytest.approx([-1.5] * 2, abs=1e-6)


def test_A27_reinforce_is_minus_the_advantage_times_the_sum() -> None:
    algorithm = REINFORCE(Given(LOGP))
    samples = algorithm.prepare(algorithm.flatten(SCORED))
    loss, _ = algorithm.step(algorithm.collate_fn(samples))
    assert loss.item() == pytest.approx(-(0.75 * -6.0 + -0.75 * -2.0) / 2, abs=1e-9)
    plain = REINFORCE(Given(LOGP), baseline="none")
    samples = plain.prepare(plain.flatten(SCORED))
    assert [s.advantages[0] for s in samples] == [1.0, -0.5]


@pytest.mark.parametrize("call", [1, 100])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda found: found.detach(), "get_auditor_logprobs: .*no gradient"),
        (lambda found: found[:1], r"get_auditor_logprobs: .*not \[2, tokens\]"),
        (lambda found: found.sum(1), "get_auditor_logprobs"),
        (lambda found: found * float("nan"), "get_auditor_logprobs: .*no finite number"),
        (lambda found: None, "get_auditor_logprobs: .*NoneType"),
    ],
    ids=["no gradient", "other size", "one dimension", "nan", "none"],
)
def test_A28_what_a_system_returns_is_checked_on_every_call(
    call: int, wrong: Any, said: str
) -> None:
    class Wrong(Given):
        calls = 0

        def get_auditor_logprobs(self, context: Any, continuation: Any) -> Any:
            self.calls += 1
            found = super().get_auditor_logprobs(context, continuation)
            return wrong(found) if self.calls == call else found

    algorithm = DPO(Wrong(LOGP))
    batch = DPOBatch(["c"], ["p"], ["q"])
    for _ in range(call - 1):
        algorithm.step(batch)
    with pytest.raises(DataError, match=said):
        algorithm.step(batch)


def test_A28_log_probabilities_on_another_device_are_named() -> None:
    class Elsewhere(Given):
        def get_baseline_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
            return super().get_baseline_logprobs(context, continuation).to("meta")

    with pytest.raises(DataError, match=r"All logprobs must be on the same device.*cpu.*baseline"):
        DPO(Elsewhere(LOGP)).step(DPOBatch(["c"], ["p"], ["q"]))


class Chatty(ValueFunctionSystem):
    """A real policy of letters, with a value head; target and baseline are frozen elsewhere."""

    def __init__(self, *, trains_head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.auditor, self.head = torch.nn.Embedding(30, 30), torch.nn.Embedding(30, 1)
        self.target, self.baseline = torch.nn.Embedding(30, 30), torch.nn.Embedding(30, 30)
        self.trains_head = trains_head

    def _pairs(self, context: Any, said: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        longest = max(map(len, said))
        texts = [[ord(x) % 30 for x in c[-1] + s] for c, s in zip(context, said, strict=True)]
        ids = torch.tensor([t + [0] * (1 + longest - len(t)) for t in texts])
        mask = torch.arange(longest) < torch.tensor([len(s) for s in said])[:, None]
        return ids[:, :-1], ids[:, 1:], mask

    def _logps(self, model: Any, context: Any, said: Any) -> torch.Tensor:
        before, after, mask = self._pairs(context, said)
        found = model(before).log_softmax(-1).gather(2, after[..., None])[..., 0]
        return found.masked_fill(~mask, 0.0)

    def get_auditor_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._logps(self.auditor, context, continuation)

    def get_baseline_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._logps(self.baseline, context, continuation)

    def value(self, context: Any, continuation: Any) -> torch.Tensor:
        return self.head(self._pairs(context, continuation)[0])[..., 0]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        models = [self.auditor, self.head] if self.trains_head else [self.auditor]
        return (parameter for model in models for parameter in model.parameters())


class Tree(Sampler):
    """Two levels of two turns, whose texts follow from the seed."""

    def rollout(self, seed: int | None = None) -> Graph:
        def turns(context: str, depth: int) -> list[Node]:
            made = []
            for i in range(2 if depth else 0):
                probe = "abcdefgh"[(seed or 0) % 5 + i : 6 + i]
                reward = float(probe.count("c")) + 0.1 * i
                made.append(Node(context, probe, "!", reward, turns(context + probe, depth - 1)))
            return made

        return Graph("c", turns("c", 2))


def trained(system: Any, algorithm: Any, epochs: int = 5) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.Adam(system.parameters(), lr=0.01)
    before = {
        f"{name}.{key}": tensor.clone()
        for name, model in vars(system).items()
        if isinstance(model, torch.nn.Module)
        for key, tensor in model.state_dict().items()
    }
    RLTrainer(
        sampler=Tree(system, episodes=3), algorithm=algorithm, optimizer=optimizer, epochs=epochs,
        progress=False, checkpoint=None,
    ).train(seed=0)  # fmt: skip
    return before


@pytest.mark.parametrize(
    "algorithm",
    [DPO, IPO, REINFORCE, RLOO, partial(GRPO, beta=0.1), partial(PPO, beta=0.1, passes=2)],
    ids=["dpo", "ipo", "reinforce", "rloo", "grpo", "ppo"],
)
def test_A30_A31_every_algorithm_trains_a_system_of_texts_and_nothing_frozen(
    algorithm: Any,
) -> None:
    values = isinstance(algorithm, partial) and algorithm.func is PPO
    system = Chatty(trains_head=values)
    before = trained(system, algorithm(system))
    for name in ("auditor", "head", "target", "baseline"):
        weight = getattr(system, name).weight
        trains = name == "auditor" or (values and name == "head")
        assert (not torch.equal(weight, before[f"{name}.weight"])) == trains, name
        assert trains or weight.grad is None


def test_A31_a_value_head_that_nothing_trains_is_refused() -> None:
    system = Chatty(trains_head=False)
    with pytest.raises(ConfigError, match=r"Chatty\.parameters\(\) lacks 1 of the parameters"):
        trained(system, PPO(system))

    class Valueless(Chatty):
        def value(self, context: Any, continuation: Any) -> torch.Tensor:
            return super().value(context, continuation).detach()

    with pytest.raises(ConfigError, match="without a gradient"):
        trained(Valueless(), PPO(Valueless()))


def test_A49_nodes_of_ones_own_class_are_trained_on() -> None:
    @dataclass
    class Judged(Node):
        judge: str = "me"

    graph = Graph("c", [Judged("c", "p", "r", 1.0), Judged("c", "q", "r", 0.0, judge="you")])
    system = Given(LOGP, values=LOGP)
    assert [step.suffix_pos for step in DPO(system).flatten(graph)] == ["p"]
    assert [step.turn.probe for step in PPO(system).flatten(graph)] == ["p", "q"]
    assert [step.turn.probe for step in GRPO(system).flatten(graph)] == ["p", "q"]
