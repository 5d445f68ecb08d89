"""Stages of a model on ranks of their own: who is cut how, what is kept, and what cannot be."""

from __future__ import annotations

from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from builders import assert_each_says
from kept import EachStep, Kept, assert_stages_equal, run
from paceline import Callback, CheckpointPolicy, Parallel, Trainer
from paceline.callbacks import GradientExplosion, GradientMonitor
from paceline.errors import ConfigError
from paceline.parallel.pipeline_stages import balanced, layers_of
from paceline.testing import Ranks
from small import settings

WORDS = 7
LAYOUT = ("dp_shard", "activation_checkpointing")


class Words(nn.Module):
    """Tokens to logits; the embedding is the head's weight too, so that two stages have it."""

    pipeline_order = ("embedding", "blocks", "head")

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(4, 4), nn.BatchNorm1d(3) if batch_norm else nn.LayerNorm(4), nn.Tanh()
            )
            for _ in range(2)
        )
        self.head = nn.Linear(4, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class NextWord(nn.CrossEntropyLoss):
    """A word 6 at the beginning makes a loss that is not finite."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        bad = torch.where(targets[:, 0] == 6, torch.nan, 0.0).sum()
        return super().forward(logits.flatten(0, 1), targets.flatten()) + bad


class Guessing(Trainer):
    """Measures how often it is right, too."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tokens, targets = batch
        logits = self.model(tokens)  # on every rank
        self.log("val/loss", self.loss_fn(logits, targets))
        self.log("val/right", (logits.argmax(-1) == targets).double().mean())


def fit(
    stages: int,
    steps: int | None = None,
    folder: Path | None = None,
    *,
    bad: bool = False,
    model: nn.Module | None = None,
    **changes: Any,
) -> Kept:
    """A run of windows of 3 batches of 4, the last one of 4, 4 and 2.

    With `dp_shard` each of the ranks that share a stage has its part of every batch.
    """
    layout = {key: changes.pop(key) for key in LAYOUT if key in changes}
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(WORDS - 1, (22, 3), generator=generator)
    if bad:
        x[5, 2] = WORDS - 1  # the first of the targets
    data, model = TensorDataset(x, x.flip(1)), model or Words().double()
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05),
        "loss_fn": NextWord(),
        "train_dataloader": DataLoader(data, 4 // layout.get("dp_shard", 1), shuffle=True),
        "val_dataloader": DataLoader(data, 5),
        "max_steps": steps,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.5,
        "parallel": Parallel(pipeline=stages, **layout),
        "checkpoint": CheckpointPolicy(every_steps=1) if folder else None,
        "run_dir": folder,
        "loggers": [],
        "log_every": 1,
    }
    return run(Guessing(**settings(model, **options | changes)))


def assert_same(found: list[Kept], expected: Kept, from_step: int = 0) -> None:
    """As one process, and no rank has all of the weights."""
    assert_stages_equal(found, expected, from_step)
    assert all(len(one.weights) < len(expected.weights) for one in found)


def fit_in_ways(stages: int) -> list[Any]:
    monitored = {"callbacks": [GradientMonitor()], "max_grad_norm": None}
    judged = {"callbacks": [GradientExplosion()], "max_grad_norm": None}
    return [
        fit(stages),
        fit(stages, bad=True, on_nonfinite="skip", **monitored),
        fit(stages, model=on_meta(), **judged),
    ]


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, WORDS)).double()


def test_a_weight_of_two_stages_is_trained_as_one(ranks: Ranks) -> None:
    """Tied weights, running statistics, metrics of a validation step of one's own, a window that is
    left out, gradient norms, and values drawn for a model on the meta device: all as on one."""
    expected = fit_in_ways(1)
    for i, outcome in enumerate(zip(*ranks(fit_in_ways, 2, 2), strict=True)):
        assert_same(list(outcome), expected[i])


def test_a_checkpoint_is_read_with_and_without_stages(ranks: Ranks, tmp_path: Path) -> None:
    """Given a run stopped at step 1 on one process and at step 3 on two stages, it ends on either
    as one that never stopped; names in the checkpoint are the whole model's."""
    expected = fit(1)
    fit(1, 1, tmp_path / "run")
    ranks(fit, 2, 2, 3, tmp_path / "run")
    assert_same(ranks(fit, 2, 2, None, tmp_path / "run"), expected, from_step=3)
    ranks(fit, 2, 2, 3, tmp_path / "other")
    assert_stages_equal([fit(1, None, tmp_path / "other")], expected, from_step=3)


def fit_sharded_in_ways(stages: int, **layout: Any) -> list[Any]:
    monitored = {"callbacks": [GradientMonitor()], "max_grad_norm": None}
    judged = {"callbacks": [GradientExplosion()], "max_grad_norm": None}
    return [
        fit(stages, model=Words(batch_norm=False).double(), **layout),
        fit(
            stages,
            model=Words(batch_norm=False).double(),
            bad=True,
            on_nonfinite="skip",
            **monitored,
            **layout,
        ),
        fit(stages, model=on_meta(), **judged, **layout),
        fit(stages, model=half_frozen(), validate_every=1, callbacks=[Forgetting()], **layout),
    ]


class Forgetting(Callback):
    """Sees that FSDP2 notes the calls of one window, and not those of a whole run."""

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if trainer.pipeline is not None:
            noted = trainer.pipeline.module._get_fsdp_state()._comm_ctx.post_forward_order
            assert (
                len(noted) <= 10
            )  # of the stage and its block, in three micro-batches of two shapes


def half_frozen() -> nn.Module:
    """The first of two stages has nothing to train."""
    model = Words(batch_norm=False)
    model.head = nn.Linear(4, WORDS)
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model.double()


def fit_shards() -> list[Any]:
    return fit_sharded_in_ways(2, dp_shard=2)


def test_each_stage_is_sharded(ranks: Ranks) -> None:
    """The same with each stage sharded over two ranks, which have no sums of one process's."""
    expected = fit_sharded_in_ways(1)
    for i, outcome in enumerate(zip(*ranks(fit_shards, 4), strict=True)):
        assert_same(list(outcome), expected[i])


def go_on(stages: int, shard: int, steps: int | None, folder: Path | None) -> Kept:
    return fit(stages, steps, folder, dp_shard=shard, model=Words(batch_norm=False).double())


def test_a_checkpoint_is_read_with_and_without_shards_of_stages(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Given a run stopped at step 1 on one process and at step 3 on two stages of two shards each,
    it ends on two stages as one that never stopped."""
    expected = go_on(1, 1, None, None)
    go_on(1, 1, 1, tmp_path)
    ranks(go_on, 4, 2, 2, 3, tmp_path)
    assert_same(ranks(go_on, 2, 2, 1, None, tmp_path), expected, from_step=3)


class Counted(Words):
    """Counts the calls of its blocks' first layers."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.calls = 0
        for block in self.blocks:
            block[0].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += torch.is_grad_enabled()


def fit_counted(which: str | None) -> Any:
    model = Counted().double()
    return fit(2, model=model, activation_checkpointing=which), model.calls


def test_blocks_of_a_stage_compute_their_forward_pass_twice(ranks: Ranks) -> None:
    """A block is cut into no parts where it is to repeat its forward pass as a whole."""
    plain, recomputed = (ranks(fit_counted, 2, which) for which in (None, "full"))
    for (found, calls), (expected, once) in zip(recomputed, plain, strict=True):
        assert calls >= 1.5 * once
        assert (found.metrics, found.rows) == (expected.metrics, expected.rows)
        for name in found.weights.keys() & expected.weights.keys():
            assert torch.equal(found.weights[name], expected.weights[name])


def fit_compiled(shard: int) -> Any:
    """By a backend that notes what part of activations it may keep, and changes nothing."""
    from torch._functorch import config

    budgets = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        budgets.append(config.activation_memory_budget)
        return graph.forward

    torch.compile = partial(torch.compile, backend=backend)
    setups: list[Any] = [{}, {"compile": True, "activation_checkpointing": 0.5}]
    plain, ended = (
        fit(2, 2, dp_shard=shard, model=Words(batch_norm=False).double(), **setup)
        for setup in setups
    )
    return plain, ended, set(budgets)


def test_blocks_of_a_stage_are_compiled_within_a_budget(ranks: Ranks) -> None:
    for found, expected, budgets in ranks(fit_compiled, 2, 1):
        assert budgets == {0.5}
        assert (found.metrics, found.rows) == (expected.metrics, expected.rows)
        assert found.weights.keys() <= expected.weights.keys()
        assert all(torch.equal(t, expected.weights[name]) for name, t in found.weights.items())


def fit_half(stages: int, shard: int = 1, times: int = 30) -> tuple[Kept, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    each, x = EachStep(), torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    options = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loss_fn": lambda outputs, targets: times * (outputs.float() - targets).square().mean(),
        "train_dataloader": DataLoader(TensorDataset(x, x.flip(1)), 4 // shard),
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "precision": "fp16",
        "parallel": Parallel(pipeline=stages, dp_shard=shard),
        "callbacks": [each],
    }
    return run(Trainer(**settings(model, **options))), each.scales


def test_an_overflow_in_one_stage_skips_the_step_in_all(ranks: Ranks) -> None:
    # The first losses overflow when they are scaled. Of half as many samples each has twice the
    # part in the mean; norms are clipped to the same.
    expected, scales = fit_half(1, times=60)
    assert scales[0] == 2.0**15
    assert scales[-2:] == [scales[-1]] * 2
    for kept, found in ranks(fit_half, 4, 2, 2):
        assert found == scales
        for name, tensor in kept.weights.items():
            torch.testing.assert_close(tensor, expected.weights[name], rtol=0.02, atol=0.01)


class Mixed(nn.Module):
    """A first layer that takes a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 4), nn.Embedding(3, 4)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.words(inputs["tokens"]) + self.places(inputs["places"])


def fit_mappings(stages: int, targets: str = "labels") -> Kept:
    """Batches of 2 and 1 row, the last of two sorts in one window."""
    torch.manual_seed(0)
    model = nn.Sequential(Mixed(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, WORDS)).double()
    x = torch.randint(WORDS - 1, (7, 3), generator=torch.Generator().manual_seed(1))
    data: Any = [{targets: row.flip(0), "tokens": row, "places": torch.arange(3)} for row in x]
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05),
        "loss_fn": NextWord(),
        "train_dataloader": DataLoader(data, 2, shuffle=True),
        "val_dataloader": DataLoader(data, 3),
        "gradient_accumulation_steps": 2,
        "parallel": Parallel(pipeline=stages),
        "log_every": 1,
    }
    return run(Trainer(**settings(model, **options)))


def test_batches_may_be_mappings(ranks: Ranks) -> None:
    """Its targets go to the loss and the rest to the first layer, with stages and without."""
    expected = fit_mappings(1)
    assert_same(ranks(fit_mappings, 2, 2), expected)
    assert fit_mappings(1, "targets").metrics == expected.metrics
    for one in ranks.outcomes(fit_mappings, 2, 2, "answers"):
        assert one.code != 0
        assert "this one is a dict with 'answers', 'tokens', 'places'" in one.output


class Loose(Words):
    """A parameter of no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("a mistake of the model's")


def refused(stages: int, **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        fit(stages, **changes)
    return str(raised.value)


def refuse_all() -> list[str]:
    used = nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, WORDS))
    fit(2, 1, model=used)
    return [
        refused(2, model=nn.Sequential(nn.Linear(1, 1))),
        refused(2, model=Loose()),
        refused(2, model=used),
        refused(2, callbacks=[GradientMonitor(per_layer=True)]),
        refused(2, compile=True, model=nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, WORDS))),
    ]


def fail(kind: str) -> None:
    if kind == "loss":
        fit(2, loss_fn=lambda logits, targets: logits.sum(0))
    fit(2, model=nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, 4), Broken()))


def test_what_cannot_be_cut_is_refused(ranks: Ranks) -> None:
    expected = (
        "parallel.pipeline=2: 'model' has 1 layers to share out, 0, and each stage needs one",
        "parallel.pipeline: scale of 'model' belong to none of the modules that compute it",
        "the model 'model' is cut already, by an earlier run: make a new Trainer",
        "GradientMonitor(per_layer=True): no rank has the gradients of all layers",
        "compile=True: the model 'model' has no repeated blocks",
    )
    for found in ranks(refuse_all, 2):
        assert_each_says(found, *expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("loss", "loss_fn returned a tensor of shape (3, 7)"), ("model", "a mistake of the model's")],
)
def test_a_mistake_in_a_stage_is_shown_as_it_is(ranks: Ranks, kind: str, expected: str) -> None:
    """What the model or the loss says, not what torch's schedule says of it; both ranks end."""
    outcomes = ranks.outcomes(fail, 2, kind)
    assert all(one.code for one in outcomes)
    assert any(expected in one.output for one in outcomes)
    assert not any("failed to run forward" in one.output for one in outcomes)


def test_an_order_that_is_not_known_is_refused() -> None:
    for module, expected in (
        (nn.Linear(2, 2), "nothing says in which order"),
        (type("Wrong", (Words,), {"pipeline_order": ("embeding",)})(), "embeding"),
        (type("Twice", (Words,), {"pipeline_order": ("head", "head")})(), "twice"),
    ):
        with pytest.raises(ConfigError, match=expected):
            layers_of(module, "model")
    nested = nn.Sequential(nn.Linear(2, 2), Words(), nn.Sequential(nn.ReLU(), nn.Tanh()))
    parts = [f"1.{key}" for key in layers_of(Words(), "model")]
    assert list(layers_of(nested, "model")) == ["0", *parts, "2.0", "2.1"]


def test_blocks_stay_whole_if_they_are_to() -> None:
    model = Words()
    names = ["embedding", "blocks.0", "blocks.1", "head"]
    assert list(layers_of(model, "model", model.blocks)) == names
    in_parts = tuple(f"blocks.{i}.{j}" for i in range(2) for j in range(3))
    model.pipeline_order = ("embedding", *in_parts, "head")
    with pytest.raises(ConfigError, match="names parts of the repeated blocks of 'model'"):
        layers_of(model, "model", model.blocks)


def test_settings_that_do_not_go_with_stages_are_refused_at_once() -> None:
    class Own(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any: ...

    trainer = Own(model=Words(), optimizer=None, epochs=1, parallel=Parallel(pipeline=2))
    layouts = Parallel(
        pipeline=2, dp_shard=2, context=2, context_attention="ring", cpu_offload=True
    )
    messages = []
    for parallel in (trainer.parallel, layouts):
        trainer.parallel = parallel
        with pytest.raises(ConfigError) as raised:
            trainer.train()
        messages.append(str(raised.value))
    assert "training_step: with parallel.pipeline no stage computes a loss" in messages[0]
    for setting in ("context_attention='ring'", "cpu_offload=True"):
        assert f"parallel.{setting}: does not exist yet with parallel.pipeline" in messages[1]


@given(st.data())
def test_the_heaviest_stage_is_as_light_as_can_be(data: Any) -> None:
    weights = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=9))
    stages = data.draw(st.integers(1, len(weights)))

    def heaviest(runs: list[range]) -> int:
        return max(sum(weights[i] for i in run) for run in runs)

    runs = balanced(weights, stages)
    assert [i for run in runs for i in run] == list(range(len(weights)))
    assert len(runs) == stages
    assert all(runs)
    ways = combinations(range(1, len(weights)), stages - 1)
    cuts = [[0, *way, len(weights)] for way in ways]
    assert heaviest(runs) == min(heaviest([range(*pair) for pair in pairwise(cut)]) for cut in cuts)
