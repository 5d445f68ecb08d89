"""Freeze: what it freezes does not move until its step, on any ranks and with any stops.

The references are loops in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader

from kept import flipped
from paceline import Callback, CheckpointPolicy, Parallel, Resume, Trainer
from paceline.callbacks import AveragedWeights, Freeze
from paceline.errors import MismatchError, PacelineError, ResumeError
from paceline.testing import Ranks, StopAt, bits
from paceline.world.dtensors import whole
from small import points, settings

STEPS = 10  # two epochs of five


def network() -> nn.Sequential:
    """A backbone of a line and a batch norm, another line, and a head whose bias is the user's."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model = nn.Sequential(backbone, nn.Linear(4, 4), nn.Linear(4, 1))
    model[2].bias.requires_grad_(False)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def gradual() -> list[Freeze]:
    """The second line joins after four steps, the backbone in the second epoch; biases later."""
    return [
        Freeze("1", until_step=4),
        Freeze(["model.0.*"], until_epoch=1),
        Freeze(["0.0.bias", "1.bias"], until_step=7),
    ]


def by_hand(skipped: Sequence[int] = ()) -> Any:
    """What `gradual` does, step by step."""
    model = network()
    optimizer, (x, y) = adamw(model), points().tensors
    backbone, norm = model[0], model[0][1]
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    norm.eval()
    for step in range(STEPS):
        if step == 4:
            model[1].weight.requires_grad_(True)
        if step == 5:
            backbone.requires_grad_(True)
            backbone[0].bias.requires_grad_(False)
            norm.train()
        if step == 7:
            backbone[0].bias.requires_grad_(True)
            model[1].bias.requires_grad_(True)
        if step in skipped:
            continue
        at = slice(4 * (step % 5), 4 * (step % 5) + 4)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[at]), y[at]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model, optimizer


class TrainsAll(Trainer):
    """Puts its model into train mode at each turn."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.model.train()
        return super().training_step(batch, batch_idx)


def fit(
    folder: Path | None = None,
    *more: Callback,
    kind: type[Trainer] = Trainer,
    freezes: Sequence[Callback] | None = None,
    **changes: Any,
) -> Trainer:
    model = network()
    freezes = gradual() if freezes is None else freezes
    given = {
        "optimizer": adamw(model),
        "max_grad_norm": 0.5,
        "callbacks": [*freezes, *more],
        "run_dir": folder,
        "val_dataloader": DataLoader(points(6), 4),
        "validate_every": 3,
    }
    trainer = kind(**settings(model, **given | changes))
    trainer.fit(seed=1)
    return trainer


def test_it_trains_as_a_loop_in_plain_torch_that_unfreezes_by_and_by() -> None:
    """Given a step that puts the model into train mode, and a parameter that the user froze."""
    model, optimizer = by_hand()

    trainer = fit(kind=TrainsAll)

    assert bits(trainer.model.state_dict()) == bits(model.state_dict())
    assert bits(trainer.optimizer.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    started = network().state_dict()
    assert torch.equal(trainer.model[2].bias, started["2.bias"])
    assert int(model[0][1].num_batches_tracked) == STEPS - 5
    plan = [str(line) for line in trainer.plan]
    assert "freezes 1 for 4 steps: 20 of 49 parameters  [Freeze(until_step)]" in plan
    assert (
        "freezes model.0.* for 1 epoch: 24 of 49 parameters, 1 module with running statistics in "
        "eval mode  [Freeze(until_epoch)]"
    ) in plan


def test_a_run_leaves_the_model_as_it_found_it() -> None:
    """Given what is frozen for good, a part in eval mode of the user's, and a run that fails."""

    class Fails(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            assert not trainer.model[0][0].weight.requires_grad
            raise KeyError("no more")

    model, before = network(), network().state_dict()
    for given, mode in ((model, True), (model, False)):
        model[0][1].train(mode)
        with pytest.raises(KeyError):
            Trainer(**settings(given, callbacks=[Freeze(["0", "2.bias"]), Fails()])).fit()
        assert [p.requires_grad for p in model.parameters()] == [True] * 7 + [False]
        assert model[0][1].training == mode
        assert "train" not in vars(model[0][1])
    for name, value in model[0].state_dict().items():
        assert torch.equal(value, before[f"0.{name}"]), name


BACKBONE = ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"]


@pytest.mark.parametrize(
    ("names", "frozen", "statistics"),
    [
        ("0.0.weight", ["0.0.weight"], False),
        ("*.bias", ["0.0.bias", "0.1.bias", "1.bias"], False),
        ("0.1.*", ["0.1.weight", "0.1.bias"], True),
        ("0.1.running_*", [], True),
        (["model.[01]"], [*BACKBONE, "1.weight", "1.bias"], True),
    ],
)
def test_what_a_name_stands_for(names: Any, frozen: list[str], statistics: bool) -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer) -> None:
            model = trainer.model
            seen[:] = [k for k, p in model.named_parameters() if not p.requires_grad]
            seen.append(not model[0][1].training)

    fit(None, Looks(), freezes=[Freeze(names)], max_steps=1)
    assert seen == [*frozen, "2.bias", statistics]


def test_stopped_anywhere_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Given a run with averaged weights that stops before, at and behind each of its changes."""
    model, optimizer = by_hand()
    once = fit(tmp_path / "once", AveragedWeights(0.9))

    for stop in (3, 4, 5, 6, 7, 8):
        fit(tmp_path / "often", AveragedWeights(0.9), StopAt(stop))
    trainer = fit(tmp_path / "often", AveragedWeights(0.9))

    assert bits(trainer.model.state_dict()) == bits(model.state_dict())
    assert bits(trainer.optimizer.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    assert bits(trainer.callbacks[-1].state_dict()) == bits(once.callbacks[-1].state_dict())


def test_a_run_that_goes_back_freezes_again(tmp_path: Path) -> None:
    """Given a checkpoint of step 4 and a bad step 6, it unfreezes once more, and passes over it."""

    class BadOnce(Callback):
        done = False

        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            if trainer.global_step == 7 and not self.done:
                self.done = True
                trainer.request_rewind(6)

        def on_load_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
            self.frozen = not trainer.model[0][0].weight.requires_grad

    bad = BadOnce()
    saves = CheckpointPolicy(every_epochs=None, every_steps=4)
    trainer = fit(tmp_path, bad, on_nonfinite="rewind", checkpoint=saves)

    assert bad.frozen
    assert bits(trainer.model.state_dict()) == bits(by_hand(skipped=[6])[0].state_dict())


def test_one_that_is_taken_out_of_a_resumed_run_no_longer_freezes(tmp_path: Path) -> None:
    fit(tmp_path, StopAt(3), freezes=[Freeze("0")])
    with pytest.raises((ResumeError, MismatchError), match=r"callbacks\.Freeze\.names"):
        fit(tmp_path, freezes=[])

    accepting = Resume("auto", accept=("callbacks.Freeze",))
    trainer = fit(tmp_path, freezes=[], resume=accepting)

    assert not torch.equal(trainer.model[0][0].weight, network()[0][0].weight)
    assert int(trainer.model[0][1].num_batches_tracked) == STEPS - 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(Freeze, "0.0.wieght"), "nothing to freeze under this name; did you mean '0.0.we"),
        (partial(Freeze, ["0", "bakcbone.*"]), r"'bakcbone.\*'\): .* name; there is model.0, mo"),
        (partial(Freeze, "3"), r"Freeze\('3'\): it has no parameters to freeze$"),
        (partial(Freeze, "*"), r"nothing is left to train at step 1: every parameter is frozen"),
        (partial(Freeze, []), "expected a name, or a list of names"),
        (partial(Freeze, "0", until_step=0), r"until_step=0\): expected a number from 1 on"),
        (partial(Freeze, "0", until_epoch=0.5), r"until_epoch=0.5\): expected a number from 1 on"),
        (partial(Freeze, "0", until_step=3, until_epoch=1), "give one of them"),
    ],
)
def test_what_cannot_be_frozen_is_refused(make: Any, said: str) -> None:
    model = network().append(nn.Identity())
    with pytest.raises(PacelineError, match=said):
        Trainer(**settings(model, callbacks=[make()])).fit()
    assert all(p.requires_grad for p in model[0].parameters())


# On several ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    pipeline_order = ("stem", "blocks", "head")
    tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


class Ends(Trainer):
    """Keeps what it has at the end of training, before its ranks part."""

    def on_train_end(self) -> None:
        [model] = self.named_models().values()
        here = {k: v for k, v in model.state_dict().items() if not v.is_meta}
        self.ended = {name: whole(value.detach()).clone() for name, value in here.items()}
        self.state = bits([self.optimizer.state_dict()["state"], here])
        self.state.append(bits(self.callbacks[0].state_dict()))


class Exchanged(Callback):
    """Notes how many numbers DDP exchanges in each window."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_setup(self, trainer: Any) -> None:
        for replica in trainer.replicas:
            if hasattr(replica, "register_comm_hook"):
                replica.register_comm_hook(self, _noted)

    def on_train_batch_start(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.window.batch_idx == trainer.progress.batch:
            self.sizes.append(0)


def _noted(state, bucket):  # DDP would accept no annotations but its own
    state.sizes[-1] += bucket.buffer().numel()
    return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)


def spread(
    parallel: Parallel | None, batch: int, folder: Path | None = None, stops: Sequence[int] = ()
) -> tuple[dict[str, torch.Tensor], Any, list[int]]:
    """Six windows of 8 samples; the head's bias, the smallest parameter, is frozen at first, too.

    In the epoch's last window there are 6 samples, with which a rank may have none.
    """
    rows = [(x.double(), y.double()) for x, y in flipped(22)]
    for stop in (*stops, None):
        model, exchanged = Net(), Exchanged()
        callbacks = [
            AveragedWeights(0.9),
            Freeze(["stem", "blocks.0", "head.bias"], until_step=2),
            Freeze("blocks.0.up", until_epoch=1),
            exchanged,
        ]
        trainer = Ends(
            **settings(
                model,
                optimizer=torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1),
                train_dataloader=DataLoader(rows, batch, shuffle=True),
                callbacks=callbacks if stop is None else [*callbacks, StopAt(stop)],
                parallel=parallel,
                global_batch_size=8,
                max_grad_norm=0.5,
                run_dir=folder,
            )
        )
        trainer.fit(seed=2)
    return trainer.ended, trainer.state, exchanged.sizes


def in_parts(parallel: Parallel, batch: int, folder: Path) -> list[Any]:
    return [
        spread(parallel, batch, folder / "whole"),
        spread(parallel, batch, folder / "parts", (2, 4)),
    ]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (4, Parallel()),
        (2, Parallel(dp_shard=2)),
        (2, Parallel(tensor=2)),
        (2, Parallel(pipeline=2)),
    ],
    ids=["ddp", "fsdp", "tensor", "pipeline"],
)
def test_on_ranks_it_is_the_same_run_and_resumes_exactly(
    size: int, parallel: Parallel, ranks: Ranks, tmp_path: Path
) -> None:
    expected, *_ = spread(None, 8)
    started = Net().state_dict()
    assert all(not torch.equal(value, started[name]) for name, value in expected.items())
    for at_once, stopped in ranks(in_parts, size, parallel, 2, tmp_path):
        ended, state, sizes = at_once
        for name, value in ended.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
        assert state == stopped[1]
        if size == 4:  # replicas exchange what is trained, and nothing else
            block, head, stem, up = 2 * (8 * 8 + 8) + 16, 8 * 4 + 4, 4 * 8 + 8, 8 * 8 + 8
            every = stem + 2 * block + head
            first = block + head - 4
            assert sizes == [first, first, every - up, every, every, every]


def train_in_bfloat16() -> list[Any]:
    """A block that is frozen whole when torch first asks what is trained."""
    model = Net().float()
    trainer = Ends(
        **settings(
            model,
            train_dataloader=DataLoader(flipped(16), 2),
            callbacks=[AveragedWeights(0.9), Freeze("blocks.0", until_step=2)],
            parallel=Parallel(dp_shard=2),
            precision="bf16",
        )
    )
    trainer.fit(seed=2)
    return [{str(p.dtype) for p in trainer.ended.values()}, trainer.ended["blocks.0.up.bias"]]


class Adversaries(Trainer):
    """A judge that the net learns from before it learns itself."""

    def step(self, window: Any) -> None:
        for (x, y), _ in window:
            made = self.model["net"](x)
            judge = self.model["judge"]
            self.backward(judge(made - y).square().mean(), "net")
            if self.global_step >= 2:
                self.backward((judge(y) - judge(made.detach()) - 1).square().mean(), "judge")
        self.optimizer_step("net")
        self.optimizer_step("judge")

    def on_train_end(self) -> None:
        models = self.named_models().values()
        self.ended = [p.detach().clone() for model in models for p in model.parameters()]


def judged(batch: int) -> list[torch.Tensor]:
    torch.manual_seed(2)
    models = {"net": nn.Linear(4, 4).double(), "judge": nn.Linear(4, 1).double()}
    rows = [(x.double(), y.double()) for x, y in flipped(24)]
    trainer = Adversaries(
        model=models,
        optimizer={k: torch.optim.AdamW(m.parameters(), lr=0.05) for k, m in models.items()},
        train_dataloader=DataLoader(rows, batch),
        callbacks=[Freeze("judge", until_step=2)],
        max_steps=5,
        progress=False,
    )
    trainer.fit()
    return trainer.ended


def wholes() -> tuple[Any, Any]:
    return train_in_bfloat16(), judged(2)


def test_on_ranks_blocks_and_models_are_frozen_whole(ranks: Ranks) -> None:
    """Given a block that FSDP2 gathers in bfloat16, and one of two models under DDP."""
    expected = judged(4)
    for (dtypes, bias), ended in ranks(wholes, 2):
        assert dtypes == {"torch.float32"}
        assert not torch.equal(bias, Net().float().blocks[0].up.bias)
        torch.testing.assert_close(ended, expected)
